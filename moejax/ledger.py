"""ledger.jsonl: where the time of a run went, across its restarts. No JAX.

A *session* is one process's part of a run. It appends what it spent so far, by kind, at every
checkpoint and a few times in between; the last line of each session is what counts. Durations come
from a monotonic clock; only the gap between two sessions is a difference of wall clocks.
"""

import contextlib
import json
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moejax.events import append_line
from moejax.foreign import MIB, read_file

LEDGER = "ledger.jsonl"  # in a workdir

# What each kind holds, in seconds; they add up to the time since the run began.
KINDS = {
    "productive": "steps that the run kept, with what is recorded of them",
    "lost": "steps that were done again, because no checkpoint had them",
    "compile": "the first step of each process",
    "data": "waiting for the next batch",
    "checkpoint": "waiting for a save",
    "evaluation": "measuring on the validation split",
    "start": "making or restoring the state, once the processes have joined",
    "restart": "nothing ran: from the last line of a session to the start of the next",
    "other": "the rest, such as the sample and the plots at the end",
}
WRITE_SECONDS = (
    5.0  # between two lines, or a thousandth of the session, so that the file stays small
)


class Totals(NamedTuple):
    """Seconds of a run by kind, and its goodput: the productive part of all of them."""

    seconds: dict[str, float]
    sessions: int

    @property
    def elapsed(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float | None:
        return self.seconds["productive"] / self.elapsed if self.elapsed > 0 else None


def read_ledger(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of a ledger, oldest first, but for those that a crash or a disk spoilt."""
    try:
        text = read_file(workdir / LEDGER, 1024 * MIB).decode(errors="replace")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        wrong = (ValueError, TypeError, KeyError, OverflowError, RecursionError)
        with contextlib.suppress(*wrong):
            entry = json.loads(line)
            seconds = {kind: float(entry["seconds"][kind]) for kind in KINDS}
            numbers = {"time": float(entry["time"]), "step": int(entry["step"])}
            lines.append({**entry, **numbers, "session": str(entry["session"]), "seconds": seconds})
    return lines


def totals(workdir: Path) -> Totals:
    """Returns where the time of the run in `workdir` went, up to the last line of its ledger."""
    return _totals(read_ledger(workdir))


def last_step(workdir: Path) -> int | None:
    """Returns the last step that the newest session is known to have finished."""
    lines = read_ledger(workdir)
    return lines[-1]["step"] if lines else None


def _totals(lines: list[dict[str, Any]]) -> Totals:
    sessions: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        sessions.setdefault(line["session"], []).append(line)
    seconds = dict.fromkeys(KINDS, 0.0)
    horizon = None  # the step from which the earliest of the later sessions went on
    for session in reversed(list(sessions.values())):
        spent = session[-1]["seconds"]
        for kind in KINDS:
            seconds[kind] += spent[kind]
        if horizon is not None:
            kept = [line for line in session if line["step"] <= horizon]
            lost = spent["productive"] - (kept[-1]["seconds"]["productive"] if kept else 0.0)
            seconds["productive"] -= lost
            seconds["lost"] += lost
        start = session[0]["step"]
        horizon = start if horizon is None else min(horizon, start)
    return Totals(seconds, len(sessions))


class Ledger:
    """Counts the seconds of this session by kind, and appends them to the workdir's ledger.

    A thread of its own writes, so that SIGKILL in the middle of a long step or of compiling costs
    WRITE_SECONDS or a thousandth of the session. Trouble with the file is said once and stops
    nothing.

    Args:
        workdir: of the run.
        step: the last step that is done already.
        begun: what `clock` said when this session began.
        enabled: True on the one process that writes.
        clock: seconds, monotonic.
        wall: seconds since the epoch.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        begun: float | None = None,
        *,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        self._file, self._clock, self._wall = workdir / LEDGER, clock, wall
        self._enabled, self._complained = enabled, False
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._lines = read_ledger(workdir) if enabled else []
        now = clock()
        self._since = now if begun is None else begun  # when the kind that runs now began
        self._kind = "start"
        self._begin(step, wall() - (now - self._since))
        self._append()
        threading.Thread(target=self._write_at_times, daemon=True).start()

    def _begin(self, step: int, wall: float) -> None:
        self._session, self._step = secrets.token_hex(4), step
        self._seconds = dict.fromkeys(KINDS, 0.0)
        if self._lines and not self._lines[-1].get("done"):
            # a clock that was set back must not make time run backwards
            self._seconds["restart"] = max(0.0, wall - self._lines[-1]["time"])
        # all sessions before this one, less the steps that it does again
        self._past = _totals([*self._lines, {**self._line(), "seconds": dict.fromkeys(KINDS, 0.0)}])

    def switch(self, kind: str) -> str:
        """Counts from now on as `kind`; returns what it was before."""
        assert kind in KINDS, kind
        with self._lock:
            self._settle()
            before, self._kind = self._kind, kind
        return before

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Counts what is done inside as `kind`."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def finished(self, step: int) -> None:
        """Notes the last step that is done."""
        with self._lock:
            self._step = step

    def rolled_back(self, step: int) -> None:
        """Goes on from an earlier step: what was productive since then is lost."""
        with self._lock:
            self._append()
            self._begin(step, self._lines[-1]["time"])
            self._append()

    def totals(self) -> Totals:
        """Returns where the time of the whole run went until now."""
        with self._lock:
            self._settle()
            past = self._past.seconds
            seconds = {kind: past[kind] + self._seconds[kind] for kind in KINDS}
            return Totals(seconds, self._past.sessions)

    def write(self) -> None:
        """Appends a line; call it when a checkpoint is saved, so that what is lost is known."""
        with self._lock:
            if not self._closed.is_set():
                self._append()

    def close(self, done: bool = False) -> None:
        """Appends the last line. `done` says that the run is complete: later time is not its."""
        with self._lock:
            if not self._closed.is_set():
                self._closed.set()
                self._append(done)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._kind] += max(0.0, now - self._since)
        self._since = now

    def _line(self) -> dict[str, Any]:
        self._settle()
        return {
            "time": round(self._wall(), 3),
            "session": self._session,
            "step": self._step,
            "seconds": {kind: round(value, 3) for kind, value in self._seconds.items()},
        }

    def _append(self, done: bool = False) -> None:
        line = self._line() | ({"done": True} if done else {})
        self._lines.append(line)
        if not self._enabled:
            return
        try:
            append_line(self._file, json.dumps(line))
        except OSError as error:
            if not self._complained:
                print(f"moejax: {self._file} cannot be written: {error}", file=sys.stderr)
            self._complained = True

    def _write_at_times(self) -> None:
        begun = self._clock()
        while not self._closed.wait(max(WRITE_SECONDS, (self._clock() - begun) / 1000)):
            self.write()
