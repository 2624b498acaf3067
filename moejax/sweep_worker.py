"""A worker of a sweep: takes trials, and runs each as `moejax train` in a workdir of its own.

A worker can die at any time. Its training then gets SIGTERM and saves, and whoever takes the trial
next goes on from there. JAX is not imported.
"""

import contextlib
import ctypes
import fcntl
import functools
import glob
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moejax.command_line import safe_path
from moejax.errors import BAD_INPUT, DIVERGED, DONE, PREEMPTED, ConfigError, require
from moejax.lock import LOCK
from moejax.metrics import read_metrics
from moejax.supervisor import Forwarding, Group
from moejax.sweep_runs import override_words
from moejax.sweep_space import MEASURED, QUANTITIES, Objective
from moejax.sweep_study import BASE, Job, Study, open_study, telling_of_loss

POLL_SECONDS = 0.3
WAIT_SECONDS = 2.0  # between looks for a trial when all are somebody's
LEAVE_SECONDS = 120.0  # what a training has to save and end before its trial is begun again
# What a training on some nodes reads to find its own others; a trial is one process.
CLUSTER = re.compile(r"SLURM_|PMI|JAX_(COORDINATOR|NUM_PROCESSES|PROCESS_ID)")


def work(workdir: Path, storage: str | None, cpu_devices: int | None) -> int:
    """Takes trials of the sweep in `workdir` until there is none left, or a signal comes.

    Returns:
        0 when all trials have ended, PREEMPTED when this worker was stopped: its trial was saved.

    Raises:
        ConfigError: there is no sweep, or its storage cannot be reached.
        UnavailableError: its storage was lost.
    """
    study = open_study(workdir, storage)
    with telling_of_loss(workdir), Forwarding() as signals, contextlib.closing(study):
        while signals.asked is None:
            job = study.take()
            if job == "done":
                return DONE
            if job == "wait":
                signals.sleep(WAIT_SECONDS)
                continue
            assert isinstance(job, Job)
            try:
                run_trial(study, job, signals, cpu_devices)
            finally:
                os.close(job.claim)
    return PREEMPTED


def run_trial(study: Study, job: Job, signals: Forwarding, cpu_devices: int | None) -> None:
    """Trains a trial to its end, or until the pruner or a signal stops it, and records that."""
    folder, log = study.trial_dir(job.number), study.log_of(job.number)
    folder.mkdir(exist_ok=True)
    wait_until_free(folder)
    with open(log, "ab") as output:
        start = output.tell()
        training = subprocess.Popen(
            _command(study, job, cpu_devices),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(study.workdir, os.environ),
            preexec_fn=functools.partial(end_with_parent, os.getpid()),
        )
    signals.watch(Group([training]))
    pruned = False
    while training.poll() is None:
        time.sleep(POLL_SECONDS)
        if not pruned and signals.asked is None and is_behind(study, job, folder):
            training.send_signal(signal.SIGTERM)
            pruned = True
    if pruned and training.returncode != DONE:
        study.prune(job.trial)
    elif training.returncode == DONE:
        _record(study, job, folder)
    elif signals.asked is None and training.returncode != PREEMPTED:  # that is taken again
        # the same config would be refused again, or diverge again; all else may be the machine's
        crashed = training.returncode not in (BAD_INPUT, DIVERGED)
        study.fail(job.trial, describe_failure(training.returncode, log, start), crashed=crashed)


def _command(study: Study, job: Job, cpu_devices: int | None) -> list[str]:
    devices = [] if cpu_devices is None else ["--cpu_devices", str(cpu_devices)]
    folder, settings = study.trial_dir(job.number), override_words(job.run.settings)
    words = ["train", str(study.workdir / BASE), "--workdir", str(folder), *devices, *settings]
    return [sys.executable, *safe_path(), "-m", "moejax", *words]


def _record(study: Study, job: Job, folder: Path) -> None:
    values = {o.name: objective_value(o, folder, job) for o in study.sweep.objectives}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        study.fail(job.trial, f"{', '.join(missing)} is not a finite number in its metrics")
    else:
        study.complete(job.trial, [value for value in values.values() if value is not None])


def is_behind(study: Study, job: Job, folder: Path) -> bool:
    """Reports new evaluations to the pruner, and asks it."""
    objective = study.sweep.objectives[0]
    if not study.prunes(job.stage):
        return False
    reported = study.reported(job.trial)
    for step, value in evaluations(folder, objective.name):
        if step not in reported:
            job.trial.report(value, step)
            # at its end a training is paid for: to stop it then would lose its result
            if step < job.run.config.train.steps and job.trial.should_prune():
                return True
    return False


def evaluations(folder: Path, name: str) -> Iterator[tuple[int, float]]:
    """Yields step and value of each evaluation of a run that has a finite value."""
    for record in _metrics(folder):
        if record["split"] == "eval" and record.get(name) is not None:
            yield record["step"], record[name]


def objective_value(objective: Objective, folder: Path, job: Job) -> float | None:
    """Returns what a run that is done came to, or None where that is not a finite number."""
    if objective.name in QUANTITIES:
        return float(QUANTITIES[objective.name](job.run.config))
    if objective.name in MEASURED:
        last = [r for r in _metrics(folder) if r["split"] == "eval"][-1:]
        return last[0].get(objective.name) if last else None
    records = [r.get(objective.name) for r in _metrics(folder) if r["split"] == "train"]
    found = [value for value in records if value is not None]
    return statistics.median(found) if found else None


def _metrics(folder: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(ValueError, OSError):
        return read_metrics(folder)
    return []


def describe_failure(code: int, log: Path, start: int = 0) -> str:
    """Returns how a training ended: its exit code or signal, and the last line of its log.

    Args:
        start: where its part of the log begins; before that are earlier tries.
    """
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if ": error: " in line), "".join(lines[-1:]))
    return f"{how}: {said}"


# Processes


def end_with_parent(parent: int) -> None:
    """Asks Linux for SIGTERM when the parent dies, however that happens."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before
            os.kill(os.getpid(), signal.SIGTERM)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def wait_until_free(folder: Path) -> None:
    """Waits for the training of a worker that died, which saves and ends.

    Raises:
        ConfigError: it does not end.
    """
    deadline = time.monotonic() + LEAVE_SECONDS
    while time.monotonic() < deadline:
        if not (folder / LOCK).exists():
            return
        with open(folder / LOCK) as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(POLL_SECONDS)
    raise ConfigError(
        f"{folder} is in use by a process for {LEAVE_SECONDS:g} s after its worker died; end it, "
        f"{folder / LOCK} says which it is, and resume the sweep"
    )


def _environment(workdir: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of a training: alone, with programs compiled once for all seeds."""
    programs = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.resolve() / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    alone = {name: v for name, v in environment.items() if not CLUSTER.match(name)}
    return {**programs, **alone}


def core_share(index: int, count: int, cores: list[int]) -> list[int]:
    """Returns the cores of the `index`-th of `count` workers; all where there are too few."""
    size = len(cores) // count
    return cores[index * size : (index + 1) * size] if size else cores


def gpu_share(
    index: int, count: int, environment: Mapping[str, str], gpus: list[str]
) -> dict[str, str]:
    """Returns the variables that give one of `count` workers its share of the GPUs.

    Raises:
        ConfigError: they cannot be shared equally.
    """
    if "CUDA_VISIBLE_DEVICES" in environment:
        gpus = [gpu for gpu in environment["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    if count == 1 or not gpus:
        return {}
    require(
        len(gpus) % count == 0,
        f"--workers {count} cannot share the {len(gpus)} GPUs of this machine equally; use a "
        f"divisor of {len(gpus)}, or --cpu_devices N",
    )
    size = len(gpus) // count
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * size : (index + 1) * size])}


def gpus_here() -> list[str]:
    """Returns the numbers of this machine's GPUs."""
    found = (re.search(r"\d+$", path) for path in glob.glob("/dev/nvidia[0-9]*"))
    return sorted((match[0] for match in found if match), key=int)
