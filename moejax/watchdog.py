"""A limit on how long a training may stand still, also inside C++; who is behind; who is slow."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from moejax.cluster import Beats
from moejax.config import WatchdogConfig
from moejax.errors import STUCK
from moejax.events import Events

POLL_SECONDS = 0.25
ASK_SECONDS = 1.0  # for the others' last words; the coordinator may be the one that is stuck
BACKSTOP_SECONDS = 10.0  # after the limit: for a thread that holds Python's lock
STDERR = 2  # faulthandler writes to a file descriptor


class Watchdog:
    """Ends this process with STUCK when it makes no progress within the limit of what it does.

    A thread looks at the time; the main thread may be stuck in a collective, which lets Python go
    on. It prints who is behind and all stacks, and leaves an event. faulthandler's own timer is the
    backstop where even the thread does not come to run; it prints stacks and exits with 1.

    Args:
        config: the limits.
        events: of the run.
        beats: what the processes say of themselves.
        leave: ends the process.
    """

    def __init__(
        self,
        config: WatchdogConfig,
        events: Events,
        beats: Beats,
        leave: Callable[[int], Any] = os._exit,
    ):
        self._config, self._events, self._beats, self._leave = config, events, beats, leave
        self._step, self._doing = 0, "start"
        self._host: deque[float] = deque(maxlen=16)
        self._limit: float | None = None
        self._deadline = float("inf")
        self._closed = threading.Event()

    def step(self, step: int, host_seconds: float | None = None, compiles: bool = False) -> None:
        """Notes that a step begins.

        Args:
            step: its number.
            host_seconds: the host's part of the last one.
            compiles: whether some process may compile in it.
        """
        self._step = step
        if host_seconds is not None:
            self._host.append(host_seconds)
        self._beats.say(step=step, host_seconds=median(self._host) if self._host else None)
        limits = self._config
        self._arm(
            "compile" if compiles else "step",
            limits.slow_seconds if compiles else limits.step_seconds,
        )

    @contextlib.contextmanager
    def slow(self, doing: str) -> Iterator[None]:
        """Allows what is done inside the limit of slow things: compile, restore, evaluate, save."""
        before, limit = self._doing, self._limit
        self._arm(doing, self._config.slow_seconds)
        try:
            yield
        finally:
            self._arm(before, limit)

    def ends(self) -> None:
        """Allows what is left of the process the limit of slow things."""
        self._arm("end", self._config.slow_seconds)

    def host_seconds(self) -> dict[int, float]:
        """Returns the host's part of a step, for each process of several that said so.

        It is the median of the last 16, since single ones vary.
        """
        said = {process: beat.get("host_seconds") for process, beat in self._beats.heard().items()}
        return {process: seconds for process, seconds in said.items() if seconds is not None}

    def _arm(self, doing: str, limit: float | None) -> None:
        self._doing, self._limit = doing, limit
        self._deadline = float("inf") if limit is None else time.monotonic() + limit
        if limit is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(limit + BACKSTOP_SECONDS, exit=True, file=STDERR)

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            if time.monotonic() > self._deadline:
                self._end()
                return

    def _end(self) -> None:
        step, doing, limit = self._step, self._doing, self._limit
        key = "step_seconds" if doing == "step" else "slow_seconds"
        answered = _within(ASK_SECONDS, self._beats.ask)
        where = f"process {self._beats.process} of {self._beats.num_processes}"
        behind = behind_of(self._beats.heard()) if answered else "process 0, which does not answer"
        others = f"; behind is {behind}" if behind else ""
        print(
            f"\nmoejax train: {where} made no progress for {limit:g} s in step {step} ({doing}; "
            f"watchdog.{key}={limit:g}){others}; ends with exit code {STUCK}, its stacks:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=STDERR)
        fields = {"process": self._beats.process, "doing": doing, "seconds": limit}
        # the workdir's file system may be what is stuck
        _within(ASK_SECONDS / 2, lambda: self._events.write("stuck", step, **fields, behind=behind))
        self._leave(STUCK)

    def __enter__(self) -> "Watchdog":
        self._beats.say(step=0)
        self._arm("start", self._config.slow_seconds)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        self._beats.close()


def behind_of(heard: dict[int, dict[str, Any]]) -> str | None:
    """Returns which processes are in an earlier step than the others; None if all are in one."""
    steps = {process: beat["step"] for process, beat in heard.items() if "step" in beat}
    if len(set(steps.values())) < 2:
        return None
    first, last = min(steps.values()), max(steps.values())
    names = [str(process) for process, step in sorted(steps.items()) if step == first]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    word = "process" if len(names) == 1 else "processes"
    return f"{word} {', '.join(names[:8])}{more} (step {first}, others at {last})"


def _within(seconds: float, function: Callable[[], object]) -> bool:
    """Calls a function that may never return; says after some seconds at the latest if it did."""

    def call() -> None:
        with contextlib.suppress(Exception):  # whatever it is, the process is about to end
            function()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
