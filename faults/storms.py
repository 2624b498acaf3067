"""SIGKILL: at random moments of a training that saves all the time, and at chosen ones."""

import json
import random
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

from faults.bench import (
    CLI,
    LIMIT,
    Bench,
    Broken,
    Outcome,
    Process,
    expect,
    newest,
    resumed_after,
    steps_done,
)
from faults.size import Size
from moejax.events import append_line
from moejax.ledger import totals
from moejax.manifest import Unsound
from moejax.store import Store
from moejax.workdir import CHECKPOINTS, checkpoint_steps

STORM_STEPS = 600
MOMENTS = ("start", "step", "save")
EARLY = 0.2  # share of kills at a moment of the start: imports, restore, compile
START_SECONDS, TRAIN_SECONDS = 6.0, 2.5  # within which the moment is drawn


class Part(NamedTuple):
    """One training of a storm, from its start to its end through all kills.

    Attributes:
        in_start, in_step, in_save: how many kills came in which moment.
        losses: that were compared.
        checked: committed checkpoints that were read through after a kill.
        lost: seconds.
    """

    in_start: int
    in_step: int
    in_save: int
    losses: int
    checked: int
    lost: float

    @property
    def kills(self) -> int:
        return self.in_start + self.in_step + self.in_save


def storm(bench: Bench, size: Size) -> Outcome:
    """SIGKILL at random moments; all committed steps survive, all losses are as undisturbed.

    Each training that is through is noted, so that a storm that is interrupted goes on.
    """
    notes = bench.root / f"storm-{size.kills}.jsonl"
    lines = notes.read_text().splitlines() if notes.exists() else []
    parts = [Part(*json.loads(line)) for line in lines]
    while (left := size.kills - sum(part.kills for part in parts)) > 0:
        parts.append(_through(bench, len(parts) + 1, left))
        append_line(notes, json.dumps(parts[-1]))
    notes.unlink()
    starts, steps, saves, losses, checked, lost = map(sum, zip(*parts, strict=True))
    return Outcome(
        f"0 committed steps lost, 0 silent wrong resumes; of the kills {starts} in the start, "
        f"{steps} in a step, {saves} in a save or a deletion; {checked} committed checkpoints read "
        "through after the kills, all sound",
        size.kills,
        losses,
        lost / size.kills,
    )


def _through(bench: Bench, number: int, most: int) -> Part:
    """Takes one training through to its end, with at most so many kills."""
    rng = random.Random(f"{bench.seed} storm {number}")
    workdir = bench.folder(f"storm/{number}")
    bench.undisturbed(STORM_STEPS)
    moments: dict[str, int] = dict.fromkeys(MOMENTS, 0)
    losses, checked, committed = 0, 0, 0
    while True:
        process = _start(bench, workdir)
        with bench.running(process):
            moment = _kill(process, workdir, rng) if sum(moments.values()) < most else None
            if moment is None:
                done = process.wait()
                expect(done.code == 0, f"ended with {done.code}: {done.err[-400:]}")
            else:
                moments[moment] += 1
        _check_resume(process, committed)
        if moment is None:
            losses += bench.same(workdir, STORM_STEPS)
            in_start, in_step, in_save = (moments[name] for name in MOMENTS)
            lost = _seconds_lost(workdir)
            return Part(in_start, in_step, in_save, losses, checked, lost)
        committed = newest(workdir)
        losses += bench.same(workdir, STORM_STEPS, whole=False)
        checked += _check_all(workdir)


def _start(bench: Bench, workdir: Path) -> Process:
    return bench.start(workdir, f"train.steps={STORM_STEPS}", "checkpoint.every=5")


def _kill(process: Process, workdir: Path, rng: random.Random) -> str | None:
    """Kills a training at a random moment; says in which, or None if it had ended by itself."""
    if rng.random() < EARLY:
        time.sleep(rng.uniform(0, START_SECONDS))
    else:
        size = _size(workdir)
        while process.runs and _size(workdir) <= size:
            waited = time.monotonic() - process.begun
            expect(waited < LIMIT, f"hangs before its first step: {process.last()}")
            time.sleep(0.01)
            size = min(size, _size(workdir))  # a resume cuts off what it does again
        time.sleep(rng.uniform(0, TRAIN_SECONDS))
    if not process.runs:
        return None
    process.popen.kill()
    process.popen.wait()
    return "save" if _is_saving(workdir) else "step" if _trained(process) else "start"


def _trained(process: Process) -> bool:
    return any(line.startswith("step ") for line in process.out.splitlines())


def _size(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return file.stat().st_size if file.exists() else 0


def _is_saving(workdir: Path) -> bool:
    """Says whether a save or a deletion was under way."""
    return any((workdir / CHECKPOINTS / ".unfinished").glob("*"))


def _check_resume(process: Process, committed: int) -> None:
    """A training that got so far as to say where it goes on must not be before `committed`."""
    if _trained(process):
        after = resumed_after(process.out)
        expect(
            after >= committed, f"COMMITTED STEP LOST: {committed} was there, resumed at {after}"
        )


def _check_all(workdir: Path) -> int:
    """Reads every committed checkpoint through."""
    run = workdir / "run.json"
    steps = checkpoint_steps(workdir)
    if not steps:
        return 0
    store = Store(workdir / CHECKPOINTS, json.loads(run.read_text())["run"])
    for step in steps:
        try:
            store.check(step)
        except Unsound as error:
            raise Broken(f"the committed checkpoint of step {step} is unsound: {error}") from None
    return len(steps)


def _seconds_lost(workdir: Path) -> float:
    """What a run's restarts cost: steps done again, nothing running, starting and compiling."""
    spent = totals(workdir)
    seconds, again = spent.seconds, (spent.sessions - 1) / spent.sessions
    begun = again * (seconds["start"] + seconds["compile"])
    return seconds["lost"] + seconds["restart"] + begun


def in_first_save(bench: Bench, _: Size) -> Outcome:
    """SIGKILL while the first save is being written: there is nothing to go on from."""
    for tried in range(10):
        workdir = bench.folder(f"first_save/{tried}")
        process = bench.start(workdir)
        model = workdir / CHECKPOINTS / "10" / "model"
        with bench.running(process):
            process.until(model.exists, "its first save")
        if not checkpoint_steps(workdir):
            break
    expect(not checkpoint_steps(workdir), "no kill came before the first save was committed")
    done = bench.train(workdir)
    expect(done.code == 0, f"ended with {done.code}: {done.err[-400:]}")
    expect(resumed_after(done.out) == 0, "it resumed from nothing")
    told = "left by a process that was killed; removed" in done.err
    expect(told, f"nothing was said of what was left: {done.err[-400:]}")
    return Outcome(
        "began anew at step 0; what was left was removed, with a line",
        *(1, bench.same(workdir), _seconds_lost(workdir)),
    )


KILL = "import os, signal\ndie = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
AT_SEAL = f"""{KILL}
from moejax.store import Store
seal = Store.seal
def killed(self, step, *arguments):
    if step == 30:
        die()
    return seal(self, step, *arguments)
Store.seal = killed
{CLI}
"""
AT_DELETE = f"""{KILL}
import pathlib, types
from moejax import store
def killed(folder, **_):
    files = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    for file in files[: len(files) // 2]:
        file.unlink()
    die()
store.shutil = types.SimpleNamespace(rmtree=killed)
{CLI}
"""


def before_manifest(bench: Bench, _: Size) -> Outcome:
    """SIGKILL when Orbax has committed and the manifest is not written: step 20 is the newest."""
    workdir = bench.folder("before_manifest/run")
    died = bench.train(workdir, code=AT_SEAL)
    expect(died.code == -9, f"ended with {died.code}, not by SIGKILL: {died.err[-400:]}")
    whole = (workdir / CHECKPOINTS / "30" / "commit_success.txt").exists()
    expect(whole and newest(workdir) == 20, "it was not killed between commit and manifest")
    losses = bench.resumes(workdir, 20)
    return Outcome(
        "Orbax had step 30 committed, it counted as unfinished and was removed; resumed after 20",
        *(1, losses, _seconds_lost(workdir)),
    )


def in_deletion(bench: Bench, _: Size) -> Outcome:
    """SIGKILL when retention has removed half of the files of an old checkpoint."""
    workdir = bench.folder("in_deletion/run")
    died = bench.train(workdir, code=AT_DELETE)
    expect(died.code == -9, f"ended with {died.code}, not by SIGKILL: {died.err[-400:]}")
    steps = checkpoint_steps(workdir)
    expect((workdir / CHECKPOINTS / "10").exists(), "nothing of it is left")
    expect(10 not in steps, "what is half deleted is listed as a checkpoint")
    _check_all(workdir)
    losses = bench.resumes(workdir, max(steps))
    expect(not (workdir / CHECKPOINTS / "10").exists(), "what it left stays")
    return Outcome(
        "no checkpoint any more; the next start removed the rest; resumed after the newest one",
        *(1, losses, _seconds_lost(workdir)),
    )


def disk_full(bench: Bench, _: Size) -> Outcome:
    """Where the disk is full for a while: no file of the process may grow beyond 16 KiB."""
    workdir = bench.folder("full/run")
    process = bench.start(workdir, "checkpoint.every=5")
    with bench.running(process):
        process.until(lambda: newest(workdir) >= 10, "a checkpoint")
        soft, hard = resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (1 << 14, hard))
        events = workdir / "events.jsonl"
        process.until(lambda: "checkpoint_failed" in events.read_text(), "a save that fails")
        at = newest(workdir)
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (soft, hard))
        process.until(lambda: newest(workdir) > at or not process.runs, "a save that works")
        done = process.wait()
    expect(done.code == 0, f"ended with {done.code}: {done.err[-400:]}")
    expect("NOT SAVED: " in done.err, "nothing was said")
    failed = done.err.count("NOT SAVED: ")
    _check_all(workdir)
    return Outcome(
        f"training went on; saves reported as not saved, with the free space: {failed}; "
        "what they left was removed; the next one worked once there was room",
        *(failed, bench.same(workdir), 0.0),
    )


def asked_to_stop(bench: Bench, _: Size) -> Outcome:
    """SIGTERM: saved at a step that no `checkpoint.every` asked for, exit code 75."""
    workdir = bench.folder("sigterm/run")
    process = bench.start(workdir, "checkpoint.every=100", f"train.steps={STORM_STEPS}")
    with bench.running(process):
        process.until(lambda: steps_done(workdir) >= 20, "step 20")
        process.popen.terminate()
        ended = process.wait(30)
    expect(ended.code == 75, f"ended with {ended.code}: {ended.err[-400:]}")
    saved = newest(workdir)
    expect(f"saved at step {saved}" in ended.err, "it did not say which step it saved")
    losses = bench.resumes(workdir, saved, "checkpoint.every=100", steps=STORM_STEPS)
    return Outcome(
        f"exit code 75 in {ended.seconds:.1f} s, saved at step {saved}; the same command went on",
        *(1, losses, ended.seconds),
    )


OUT_OF_MEMORY = f"""
import jax
from moejax.replicas import Comparisons
step = Comparisons.step
def hungry(self, number, *arguments):
    if number == 25:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 TiB")
    return step(self, number, *arguments)
Comparisons.step = hungry
{CLI}
"""


def out_of_memory(bench: Bench, _: Size) -> Outcome:
    """A step fails for want of memory; then without the fault."""
    workdir = bench.folder("memory/run")
    died = bench.train(workdir, code=OUT_OF_MEMORY)
    expect(died.code == 2, f"ended with {died.code}: {died.err[-400:]}")
    expect("error: out of memory (RESOURCE_EXHAUSTED" in died.err, "it does not say why")
    expect("Traceback" not in died.err, "a traceback")
    expect(newest(workdir) == 20, f"the newest checkpoint is of step {newest(workdir)}, not 20")
    _check_all(workdir)
    losses = bench.resumes(workdir, 20)
    return Outcome(
        "exit code 2, one line with the bytes of a device and what helps; no partial checkpoint",
        *(1, losses),
    )


CRASHES = f"""
from moejax.replicas import Comparisons
step = Comparisons.step
def crashing(self, number, *arguments):
    if number == 33:
        raise RuntimeError("always at this step")
    return step(self, number, *arguments)
Comparisons.step = crashing
{CLI}
"""


def crash_loop(bench: Bench, _: Size) -> Outcome:
    """`moejax supervise` of a training that fails at step 33 each time it comes there."""
    workdir = bench.folder("crash_loop/run")
    words = [sys.executable, "-c", CRASHES, *bench.train_words(workdir)]
    supervise = [sys.executable, "-m", "moejax", "supervise", "--restarts", "1", "--", *words]
    done = bench.run(*supervise, log="supervise").wait()
    expect(done.code == 70, f"ended with {done.code}: {done.err[-400:]}")
    expect("watch.skip_batches" in done.err, "no suggestion")
    tries = done.err.count("always at this step")
    losses = bench.resumes(workdir, 30)
    return Outcome(
        f"exit code 70 after {tries} tries at the same step, the last one without a newer "
        "checkpoint; it suggests watch.skip_batches",
        *(1, losses),
    )
