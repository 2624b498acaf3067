"""The tiny training that every fault is done to, and the undisturbed run that it is held to."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moejax.metrics import read_metrics
from moejax.workdir import checkpoint_steps

ROOT = Path(__file__).parents[1]
STEPS = 120
# 1 device, 2 layers, width 32: a step takes milliseconds, so that saves are always under way
TINY = {
    "model.num_layers": 2,
    "model.d_model": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 16,
    "moe.num_experts": 4,
    "moe.expert_hidden": 32,
    "data.sequence_length": 32,
    "data.source": "prepared",
    "train.batch_size": 4,
    "train.steps": STEPS,
    "logging.every": 1,
    "eval.every": None,
    "eval.batches": 1,
    "checkpoint.every": 10,
    "checkpoint.keep": 3,
    "mesh.data": 1,
    "mesh.expert": None,
}
# what may differ between equal runs
CLOCK = ("step_seconds", "tokens_per_second", "mfu", "goodput")
CLOCK += ("host_seconds_least", "host_seconds_most", "slowest_process")
CLI = "import sys; from moejax.cli import main; sys.exit(main(sys.argv[1:]))"
WORDS = "the of and to in that is was he for it with as his on be at by had not are but from or"
LIMIT = 240.0  # seconds after which anything is a hang


class Broken(Exception):
    """What was seen is not what has to be; the message says it."""


def expect(condition: object, message: str) -> None:
    """Raises Broken with `message` unless `condition` holds."""
    if not condition:
        raise Broken(message)


class Outcome(NamedTuple):
    """What a fault was seen to do.

    Attributes:
        seen: one sentence.
        runs: how often the fault was made.
        losses: records of steps that were compared bit for bit with the undisturbed run.
        seconds_lost: for each fault that a run went on from, what it cost by its own ledger, or
            the seconds until the process had ended; None where there is nothing to lose.
    """

    seen: str
    runs: int
    losses: int = 0
    seconds_lost: float | None = None


class Done(NamedTuple):
    """A process that has ended."""

    code: int
    out: str
    err: str
    seconds: float


class Process:
    """A training that runs; what it says is in files."""

    def __init__(self, words: list[str], environment: Mapping[str, str], log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._out, self._err = log.with_suffix(".out"), log.with_suffix(".err")
        self.begun = time.monotonic()
        with open(self._out, "w") as out, open(self._err, "w") as err:
            self.popen = subprocess.Popen(
                words, env=environment, stdout=out, stderr=err, cwd=ROOT, stdin=subprocess.DEVNULL
            )

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    @property
    def runs(self) -> bool:
        return self.popen.poll() is None

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Waits for a condition, looking often: what is to be hit may be short."""
        while not condition():
            ended = f"ended with {self.popen.returncode} before {what}"
            expect(self.runs, f"{ended}: {self.last()}")
            expect(time.monotonic() - self.begun < LIMIT, f"hangs before {what}: {self.last()}")
            time.sleep(0.005)

    def last(self) -> str:
        """Its last words."""
        return " / ".join(self.err.strip().splitlines()[-3:])[-400:]

    def wait(self, limit: float = LIMIT) -> Done:
        """Waits until it has ended; one that does not is killed and a fault of its own."""
        begun = time.monotonic()
        try:
            code = self.popen.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Broken(f"it hangs, killed after {limit:g} s: {self.last()}") from None
        return Done(code, self.out, self.err, time.monotonic() - begun)

    def kill(self) -> None:
        if self.runs:
            self.popen.kill()
        self.popen.wait()


class Bench:
    """Where trainings run.

    Args:
        folder: of everything that is written.
        seed: of all that is random.
    """

    def __init__(self, folder: Path, seed: int):
        self.root, self.seed = folder.resolve(), seed
        self._lock = threading.Lock()
        self._trained: dict[str, Path] = {}
        self.data = self.root / "data"
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))

    def folder(self, name: str) -> Path:
        """Returns a path below the bench at which there is nothing yet."""
        path = self.root / name
        if path.is_dir():
            shutil.rmtree(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def prepare(self) -> None:
        """Writes the text that all train on, and prepares it."""
        texts = self.folder("texts")
        texts.mkdir()
        words = WORDS.split()
        for i in range(40):
            line = " ".join(words[(i * k * k + k) % len(words)] for k in range(400))
            (texts / f"{i:02}.txt").write_text(f"document {i}: {line}\n")
        done = self.moejax("prepare", str(texts), "--output", str(self.folder("data")))
        expect(done.code == 0, f"the data cannot be prepared: {done.err}")

    # Commands

    def train_words(self, workdir: Path, *changes: str, devices: int = 1) -> list[str]:
        """Returns the words of a command line after `moejax`; `key=value` words replace others."""
        keys = {**TINY, "data.path": self.data}
        words = {name: f"{name}={value}" for name, value in keys.items()}
        words |= {word.split("=")[0]: word for word in changes}
        on = ["--workdir", str(workdir), "--cpu_devices", str(devices)]
        return ["train", str(ROOT / "configs" / "quickstart.py"), *on, *words.values()]

    def start(
        self,
        workdir: Path,
        *changes: str,
        code: str = CLI,
        devices: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Starts a training. `code` is run in its place, and may change what it wants first."""
        words = [sys.executable, "-c", code, *self.train_words(workdir, *changes, devices=devices)]
        log = workdir.parent / f"{workdir.name}-{time.monotonic_ns()}"
        return Process(words, {**self._environment, **(environment or {})}, log)

    def train(self, workdir: Path, *changes: str, **more: Any) -> Done:
        """Trains to the end."""
        return self.start(workdir, *changes, **more).wait()

    def run(self, *words: str, log: str = "command") -> Process:
        """Starts any program."""
        path = self.root / "logs" / f"{log}-{time.monotonic_ns()}"
        return Process(list(words), self._environment, path)

    def moejax(self, *words: str) -> Done:
        """Runs a verb to its end."""
        return self.run(sys.executable, "-m", "moejax", *words).wait()

    @contextlib.contextmanager
    def running(self, *processes: Process) -> Iterator[None]:
        """Kills processes at the end that still run."""
        try:
            yield
        finally:
            for process in processes:
                process.kill()

    # The undisturbed run

    def trained(self, name: str, *changes: str) -> Path:
        """Returns the workdir of a run that is made once, for all rows that read it."""
        with self._lock:
            if name not in self._trained:
                workdir = self.folder(name)
                done = self.train(workdir, *changes)
                expect(done.code == 0, f"the run {name} ended with {done.code}: {done.err[-400:]}")
                self._trained[name] = workdir
            return self._trained[name]

    def undisturbed(self, steps: int = STEPS) -> Path:
        """Returns the workdir of a run that nothing disturbed."""
        return self.trained(f"undisturbed-{steps}", f"train.steps={steps}")

    def same(self, workdir: Path, steps: int = STEPS, *, whole: bool = True) -> int:
        """Compares the records of a run with the undisturbed one's, bit for bit; counts them.

        Args:
            whole: whether all have to be there, or those up to any step.
        """
        expected, found = records(self.undisturbed(steps)), records(workdir)
        if whole:
            missing = sorted(expected.keys() - found.keys())
            expect(not missing, f"steps {missing[:5]} are missing")
        for key, record in found.items():
            expect(key in expected, f"step {key} is not one of the undisturbed run")
            differing = [name for name in record if record[name] != expected[key].get(name)]
            expect(not differing, f"SILENT WRONG RESUME: step {key} differs in {differing}")
        return len(found)

    def resumes(self, workdir: Path, after: int, *changes: str, steps: int = STEPS) -> int:
        """Trains on to the end; it must go on after a step and be the undisturbed run."""
        done = self.train(workdir, f"train.steps={steps}", *changes)
        expect(done.code == 0, f"resuming ended with {done.code}: {done.err[-400:]}")
        found = resumed_after(done.out)
        expect(found == after, f"it resumed after step {found}, not after {after}")
        return self.same(workdir, steps)


def records(workdir: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """Returns what is recorded of each step but for the clock's.

    Raises:
        Broken: a step is there twice.
    """
    found = read_metrics(workdir)
    by_step = {
        (record["step"], record["split"]): {k: v for k, v in record.items() if k not in CLOCK}
        for record in found
    }
    expect(len(by_step) == len(found), "a step is in metrics.jsonl twice")
    return by_step


def resumed_after(out: str) -> int:
    """Returns the step after which a training said that it resumes; 0 if it began anew."""
    _, found, rest = out.partition("resuming after step ")
    return int(rest.split()[0].rstrip(".,:;").replace(",", "")) if found else 0


def steps_done(workdir: Path) -> int:
    """Returns the last step in metrics.jsonl, 0 without."""
    found = read_metrics(workdir)
    return found[-1]["step"] if found else 0


def newest(workdir: Path) -> int:
    """Returns the step of the newest committed checkpoint, 0 without."""
    return max(checkpoint_steps(workdir), default=0)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
