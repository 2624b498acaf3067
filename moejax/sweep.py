"""`moejax sweep`: checks a sweep, has workers run it, shows how it goes, writes what came of it.

Workers are processes of this machine, or tasks of a SLURM array; see `sweep_worker`. JAX is not
imported.
"""

import contextlib
import functools
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moejax.command_line import safe_path
from moejax.errors import CHECK_FAILED, DONE, INTERRUPTED, PREEMPTED, ConfigError, require
from moejax.progress import printable
from moejax.supervisor import Forwarding, Group
from moejax.sweep_points import describe_point, points
from moejax.sweep_report import ranking, write_report
from moejax.sweep_runs import Prepared, load_sweep, resolve
from moejax.sweep_study import (
    CLAIMS,
    LOGS,
    STORAGE_VARIABLE,
    SWEEP,
    Retry,
    Study,
    TrialRecord,
    claim,
    create,
    open_study,
    storage_url,
    telling_of_loss,
)
from moejax.sweep_worker import core_share, end_with_parent, evaluations, gpu_share, gpus_here

LOOK_SECONDS = 1.0
SHOWN = 20  # rows of the table
ENDED = ("complete", "pruned", "failed")


class Options(NamedTuple):
    """What the command line of `moejax sweep` says; see its help."""

    workdir: Path
    workers: int = 1
    launcher: str = "local"
    slurm: str = ""
    resume: bool = False
    retry_failed: Retry | None = None
    storage: str | None = None
    cpu_devices: int | None = None


def sweep(file: str, overrides: dict[str, Any], options: Options) -> int:
    """Runs a sweep, or goes on with it.

    Returns:
        0 when all trials ended and one is complete, 1 when none is or workers died, PREEMPTED or
        INTERRUPTED when a signal stopped it: `--resume` goes on.

    Raises:
        ConfigError: something in it cannot be; nothing was begun.
        UnavailableError: its storage was lost; `--resume` goes on.
    """
    prepared = load_sweep(file, overrides)
    _check_devices(prepared, options)
    with telling_of_loss(options.workdir), contextlib.ExitStack() as stack:
        study = stack.enter_context(contextlib.closing(_study(prepared, options)))
        held = claim(options.workdir / CLAIMS / "sweep")
        if held is None:
            raise ConfigError(
                f"workdir {options.workdir} is in use by another `moejax sweep`; end that one first"
            )
        stack.callback(os.close, held)
        if options.retry_failed is not None:
            _retry(study, options.retry_failed)
        _show_plan(study)
        code = _run(study, options)
        unfinished = [r for r in study.records() if r.state not in ENDED]
        if any(r.state == "complete" for r in study.records()):
            page = write_report(study)
            print(f"report: {page}" + (f" ({len(unfinished)} trials to go)" if unfinished else ""))
            for line in _best(study):
                print(line)
        return code


def _check_devices(prepared: Prepared, options: Options) -> None:
    """Checks what is known of meshes and programs before a study is made."""
    require(
        options.launcher == "slurm" or not options.slurm,
        f"--slurm={options.slurm!r} is for --launcher slurm; give both, or leave it out",
    )
    require(
        options.resume or options.retry_failed is None,
        f"--retry_failed {options.retry_failed} is for a sweep that has run; give --resume too, or "
        "leave it out",
    )
    if options.launcher == "slurm":
        _slurm_script()
        _slurm_words(options)
    devices, space = options.cpu_devices, prepared.sweep
    if devices is None:
        _shares(options)
        return
    for point in [{}] if space.adaptive else points(space):
        config = resolve(prepared, point, space.seeds[0]).config
        try:
            config.check_mesh(config.mesh.resolve(devices))
        except ConfigError as error:
            raise ConfigError(f"{describe_point(point)}: {error}") from None


def _study(prepared: Prepared, options: Options) -> Study:
    workdir = options.workdir
    if not (workdir / SWEEP).exists():
        return create(workdir, prepared, options.storage)
    require(
        options.resume,
        f"workdir {workdir} has a sweep; go on with it by --resume, or give another --workdir",
    )
    return open_study(workdir, options.storage, prepared)


def _retry(study: Study, which: Retry) -> None:
    again = study.retry(which)
    told = ", ".join(f"{record.number:03d}" for record in again)
    print(f"failed trials that are tried again: {told or 'none'}")
    left = sum(r.state == "failed" for r in study.records())
    if which == "crashed" and left > 0:
        why = "by their config, or before this was recorded"
        print(f"{left} more failed {why}; --retry_failed all tries them too")


def _show_plan(study: Study) -> None:
    """Says how many trials there are, what constraints were solved to, what is of later keys."""
    if study.new_keys:
        told = ", ".join(f"{name}={value}" for name, value in study.new_keys.items())
        print(f"keys that are newer than this sweep have their defaults: {told}")
    records = study.records()
    counts = Counter("done" if r.state in ENDED else "to do" for r in records)
    told = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    print(f"sweep in {study.workdir}: {told or 'trials are proposed as it goes'}", flush=True)
    if study.sweep.equal and not study.sweep.adaptive:
        for point in points(study.sweep):
            run = resolve(study.prepared, point, study.sweep.seeds[0])
            solved = " ".join(f"{name}={value}" for name, value in run.solved.items())
            print(f"  {describe_point(point)}: solved {solved}", flush=True)


# Workers


class Workers(Protocol):
    """What runs the trials."""

    def left(self) -> bool:
        """Whether any still runs."""
        ...

    def stop(self) -> None:
        """Asks all to save and end, after a signal that they did not get."""
        ...


class LocalWorkers:
    """Processes of this machine, each with its share of the cores and GPUs."""

    def __init__(self, study: Study, options: Options, signals: Forwarding):
        environment = {**os.environ, STORAGE_VARIABLE: storage_url(study.workdir, options.storage)}
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        started = []
        for index, share in enumerate(_shares(options)):
            prepare = functools.partial(
                _prepare_worker, os.getpid(), core_share(index, options.workers, cores)
            )
            with open(study.workdir / LOGS / f"worker-{index}.log", "ab") as log:
                started.append(
                    subprocess.Popen(
                        _worker_command(study, options),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env={**environment, **share},
                        preexec_fn=prepare,
                    )
                )
        self._group = Group(started)
        signals.watch(self._group)

    def left(self) -> bool:
        return any(process.poll() is None for process in self._group.started)

    def stop(self) -> None:
        pass  # `signals` told them, and tells them again at a second signal


def _prepare_worker(parent: int, cores: list[int]) -> None:
    end_with_parent(parent)
    if cores:
        os.sched_setaffinity(0, cores)


def _shares(options: Options) -> list[dict[str, str]]:
    """Returns each worker's share of the GPUs; raises ConfigError where there is none."""
    gpus = [] if options.cpu_devices is not None else gpus_here()
    environment = {} if options.cpu_devices is not None else os.environ
    count = options.workers if options.launcher == "local" else 1
    return [gpu_share(index, count, environment, gpus) for index in range(count)]


def _worker_command(study: Study, options: Options) -> list[str]:
    devices = options.cpu_devices
    words = ["sweep_worker", "--workdir", str(study.workdir)]
    words += [] if devices is None else ["--cpu_devices", str(devices)]
    return [sys.executable, *safe_path(), "-m", "moejax", *words]


class SlurmWorkers:
    """The tasks of an array, which `launch/slurm.py` submits."""

    def __init__(self, study: Study, options: Options):
        words = _worker_command(study, options)[3:]
        logs = ["--logs", str(study.workdir / LOGS), "--name", f"sweep-{study.workdir.name}"]
        asked = ["--nodes", "1", "--copies", str(options.workers), *_slurm_words(options)]
        url = storage_url(study.workdir, options.storage)
        done = subprocess.run(
            [sys.executable, str(_slurm_script()), *logs, *asked, "--", *words],
            capture_output=True,
            text=True,
            env={**os.environ, STORAGE_VARIABLE: url},  # sbatch hands the environment on
        )
        require(
            done.returncode == 0,
            f"launch/slurm.py: {done.stderr.strip()}; nothing was submitted",
        )
        self.job = done.stdout.strip()
        print(f"submitted SLURM array {self.job} of {options.workers} workers", flush=True)

    def left(self) -> bool:
        told = subprocess.run(
            ["squeue", "-h", "-j", self.job, "-o", "%T"], capture_output=True, text=True
        )
        if told.returncode != 0 and "Invalid job id" not in told.stderr:
            return True  # the controller does not answer now
        return bool(told.stdout.strip())

    def stop(self) -> None:
        subprocess.run(["scancel", self.job], capture_output=True)


def _slurm_words(options: Options) -> list[str]:
    try:
        return shlex.split(options.slurm)
    except ValueError as error:
        raise ConfigError(f"--slurm={options.slurm!r}: {error}; close the quotation") from None


def _slurm_script() -> Path:
    script = Path(__file__).parents[1] / "launch" / "slurm.py"
    require(
        script.is_file(),
        f"--launcher slurm needs {script}, which is in the repository and not in the package; run "
        "moejax from a checkout, or start `moejax sweep_worker` in jobs of your own",
    )
    return script


def _run(study: Study, options: Options) -> int:
    """Starts the workers and shows what they do until they end."""
    with Forwarding() as signals, _Display(study) as display:
        if options.launcher == "slurm":
            workers: Workers = SlurmWorkers(study, options)
        else:
            workers = LocalWorkers(study, options, signals)
        told = False
        while workers.left():
            display.update()
            signals.sleep(LOOK_SECONDS)
            if signals.asked is not None:
                if not told:
                    workers.stop()
                told = True
                time.sleep(LOOK_SECONDS)  # `sleep` returns at once from here on
        display.update()
        if signals.asked is not None:
            print(f"stopped; the same command with --resume goes on in {study.workdir}")
            return INTERRUPTED if signals.asked.name == "SIGINT" else PREEMPTED
    records = study.records()
    if left := [r for r in records if r.state not in ENDED]:
        print(
            f"moejax sweep: its workers ended and {len(left)} trials are left; "
            f"{study.workdir / LOGS} says why, and --resume goes on",
            file=sys.stderr,
        )
        return CHECK_FAILED
    if any(r.state == "complete" for r in records):
        return DONE
    counts = Counter(r.state for r in records)
    told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    errors = [f"; trial {r.number:03d}: {printable(r.error)}" for r in records if r.error]
    print(
        f"moejax sweep: no trial is complete ({told}){''.join(errors[:1])}; see "
        f"{study.workdir / LOGS}; when it is mended, --resume --retry_failed all tries them again",
        file=sys.stderr,
    )
    return CHECK_FAILED


# What is shown


class _Display:
    """A live table in a terminal, a line a trial that ended elsewhere."""

    def __init__(self, study: Study):
        self._study, self._console = study, Console()
        self._live = Live(console=self._console, refresh_per_second=2, transient=False)
        self._ended = {r.number for r in study.records() if r.state in ENDED}

    def __enter__(self) -> "_Display":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self) -> None:
        records = self._study.records()
        if self._console.is_terminal:
            self._live.update(table(self._study, records))
            return
        for record in records:
            if record.state in ENDED and record.number not in self._ended:
                self._ended.add(record.number)
                print(" ".join(_row(self._study, record)), flush=True)


def table(study: Study, records: Sequence[TrialRecord]) -> Table:
    """Returns the trials as a table: those that run, then the last that ended."""
    counts = Counter(r.state for r in records)
    title = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    shown = Table(title=title, title_justify="left")
    for name in ("trial", "state", "seed", "point", study.sweep.objectives[0].name):
        shown.add_column(name)
    running = [r for r in records if r.state == "running"]
    ended = [r for r in records if r.state in ENDED]
    left = max(0, SHOWN - len(running))
    for record in [*running, *ended[len(ended) - min(left, len(ended)) :]]:
        shown.add_row(*(Text(cell) for cell in _row(study, record)))  # no markup
    return shown


def _row(study: Study, record: TrialRecord) -> list[str]:
    name = study.sweep.objectives[0].name
    solved = "".join(f" {key}={value}" for key, value in record.solved.items())
    result = record.error or ""
    if record.values:
        result = f"{record.values[0]:.4f}"
    elif record.state in ("running", "pruned"):
        seen = list(evaluations(study.trial_dir(record.number), name))
        result = f"{seen[-1][1]:.4f} after step {seen[-1][0]}" if seen else ""
    point = describe_point(record.point) + solved
    cells = [f"{record.number:03d}", record.state, f"seed={record.seed}", point, result]
    return [printable(cell) for cell in cells]


def _best(study: Study) -> list[str]:
    """Returns what the ranking begins with, for the terminal."""
    rows = ranking(study.records(), study.sweep)
    return [f"{i}. {row.name}: {row.text}" for i, row in enumerate(rows[:3], start=1)]
