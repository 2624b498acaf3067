"""Evaluating each checkpoint of a run that trains elsewhere, once: eval.jsonl. No JAX here.

A checkpoint is known by what is in its files, not by its step: after a rollback the same step may
have another one. What was evaluated stands in eval.jsonl, so a watch that ends, in whatever way,
goes on where it was.
"""

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moejax.errors import ConfigError, StorageError, UnavailableError, file_error
from moejax.events import EVENTS, append_line
from moejax.ledger import LEDGER
from moejax.manifest import Manifest, Unsound, fingerprint
from moejax.store import Store, find_run
from moejax.workdir import CONFIG, METRICS, checkpoint_roots, checkpoint_steps, read_config

EVAL_SERIES = "eval.jsonl"  # in a workdir
_ID_LENGTH = 16  # hex digits of a SHA-256


class Watching(NamedTuple):
    """How to watch: seconds between two looks, and seconds without a sign of life to give up."""

    poll_seconds: float = 10.0
    patience: float = 3600.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def wait(self) -> None:
        self.sleep(self.poll_seconds)


def checkpoint_id(manifest: Manifest) -> str:
    """Returns what tells a checkpoint from every other one, also of the same step; hex."""
    return fingerprint([manifest.step, manifest.files])[:_ID_LENGTH]


def recipe_id(about: Any) -> str:
    """Returns what tells how checkpoints are evaluated, from JSON that says it; hex."""
    return fingerprint(about)[:_ID_LENGTH]


def find_checkpoints(workdir: Path) -> dict[int, str]:
    """Returns the ids of the run's checkpoints by step; those without a readable manifest not."""
    run = find_run(workdir)
    found: dict[int, str] = {}
    for root in checkpoint_roots(workdir, read_config(workdir).checkpoint.local, run):
        store = Store(root, run)
        for step in store.steps():
            with contextlib.suppress(Unsound, StorageError):
                found.setdefault(step, checkpoint_id(store.manifest(step)))
    return dict(sorted(found.items()))


def read_series(workdir: Path, recipe: str | None = None) -> list[dict[str, Any]]:
    """Returns the evaluations of a run by step, of each step the last one.

    Those of steps that a rollback undid, and that were not done again, are among them. A line that
    a crash cut off is left out.

    Args:
        recipe: only what was evaluated so; None: all, of each recipe and step the last one.
    """
    last = {(line["step"], line["recipe"]): line for line in _lines(workdir / EVAL_SERIES)}
    found = (line for line in last.values() if recipe in (None, line["recipe"]))
    return sorted(found, key=lambda line: line["step"])


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for row in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(row)
            kinds = (("step", int), ("checkpoint", str), ("recipe", str))
            if isinstance(line, dict) and all(isinstance(line.get(k), t) for k, t in kinds):
                lines.append(line)
    return lines


class Series:
    """Appends to eval.jsonl. A context manager: inside, nobody else does.

    Args:
        workdir: of the run.
        recipe: of `recipe_id`.

    Raises:
        ConfigError: the file cannot be written, or another watch has it.
    """

    def __init__(self, workdir: Path, recipe: str):
        self._file, self.recipe = workdir / EVAL_SERIES, recipe

    def __enter__(self) -> "Series":
        try:
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{self._file} cannot be written: {error.strerror}; make the workdir writable, or "
                "evaluate without --watch"
            ) from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ConfigError(
                f"another moejax eval --watch writes {self._file}; end that one first"
            ) from None
        except OSError as error:  # a file system without locks
            tell(f"{self._file} cannot be locked ({error.strerror}): a second watch goes unnoticed")
        lines = _lines(self._file)
        self._done = {line["checkpoint"] for line in lines if line["recipe"] == self.recipe}
        return self

    def __exit__(self, *_) -> None:
        os.close(self._descriptor)

    def __contains__(self, checkpoint: str) -> bool:
        return checkpoint in self._done

    def append(self, report: dict[str, Any]) -> None:
        """Writes the evaluation of a checkpoint; it is on the disk when this returns.

        Raises:
            ConfigError: the file takes no more.
        """
        try:
            append_line(self._file, json.dumps(report, allow_nan=False))
            os.fsync(self._descriptor)
        except OSError as error:
            raise file_error(
                f"{self._file} cannot be written: {error.strerror}; make room, and give the same "
                "command again: it goes on with what is new",
                error,
            ) from None
        self._done.add(report["checkpoint"])


def watch(
    workdir: Path,
    series: Series,
    evaluate: Callable[[int, str], dict[str, Any] | None],
    how: Watching,
) -> int:
    """Evaluates each checkpoint, the oldest first, until that of the run's last step is.

    Args:
        evaluate: (step, id) -> what to append, with `step` and `checkpoint`; None where there is
            no such sound checkpoint any more.

    Returns:
        How many it evaluated.

    Raises:
        UnavailableError: nothing in the workdir changed for too long, and the run is not done.
    """
    done, useless = 0, set()
    life, since = None, how.clock()
    while True:
        there = find_checkpoints(workdir)
        due = [(s, i) for s, i in there.items() if i not in series and i not in useless]
        if due:
            report = evaluate(*due[0])
            if report is None:
                useless.add(due[0][1])
            else:
                series.append(report)
                done += 1
            continue
        if there and max(there) >= read_config(workdir).train.steps:
            return done
        now = _signs_of_life(workdir, there)
        if now != life:
            life, since = now, how.clock()
        elif how.clock() - since >= how.patience:
            raise _nobody_trains(workdir, there, how)
        how.wait()


def wait_for_config(workdir: Path, how: Watching) -> None:
    """Waits until a training has stored its config.

    Raises:
        ConfigError: there is no such folder.
        UnavailableError: it did not come in time.
    """
    if not workdir.is_dir():
        raise ConfigError(f"workdir {workdir} does not exist; give that of a run that was started")
    since = how.clock()
    while not ((workdir / CONFIG).exists() or checkpoint_steps(workdir)):
        if how.clock() == since:
            tell(f"waiting for a training to begin in {workdir}")
        if how.clock() - since >= how.patience:
            raise _nobody_trains(workdir, {}, how)
        how.wait()


def _signs_of_life(workdir: Path, there: dict[int, str]) -> list[Any]:
    signs: list[Any] = [there]
    for name in (LEDGER, METRICS, EVENTS, CONFIG):
        with contextlib.suppress(OSError):
            status = (workdir / name).stat()
            signs.append((name, status.st_size, status.st_mtime_ns))
    return signs


def _nobody_trains(workdir: Path, there: dict[int, str], how: Watching) -> UnavailableError:
    newest = f"the newest checkpoint is of step {max(there)}" if there else "it has no checkpoint"
    return UnavailableError(
        f"{workdir} did not change for --patience {how.patience:g} s and its training is "
        f"not done ({newest}); check that it still runs, and give the same command again to "
        "evaluate what is new"
    )


def tell(text: str) -> None:
    print(f"moejax eval: {text}", file=sys.stderr, flush=True)
