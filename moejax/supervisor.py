"""Starting a run again: which ends are worth another try, how often, when it is a loop. No JAX.

`moejax supervise` does it for one command, `launch/local.py` for all processes of a machine.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from moejax.errors import (
    CRASH_LOOP,
    FINAL,
    INTERRUPTED,
    PREEMPTED,
    SAME_SECONDS,
    UNAVAILABLE,
    ConfigError,
)
from moejax.events import Events
from moejax.ledger import last_step
from moejax.workdir import checkpoint_steps, read_config

POLL_SECONDS = 0.1
LEAVE_SECONDS = 5.0  # what processes have to end by themselves when one of them did
GRACE_SECONDS = 10.0  # and after SIGTERM


class Retries(NamedTuple):
    """How often to start again, and after how long.

    `restarts` counts those in a row without a newer checkpoint: a run that gets on is restarted for
    ever. The wait before the n-th is `first_wait * 2**(n - 1)` seconds.
    """

    restarts: int = 3
    end_when_preempted: bool = False  # PREEMPTED is for somebody else to answer, such as SLURM
    first_wait: float = 1.0
    longest_wait: float = 60.0


class Group:
    """Processes that live and end together."""

    def __init__(self, started: Sequence[subprocess.Popen]):
        self.started = started

    def wait(self) -> int:
        """Waits for all; if one fails, ends the others. Returns 0 or the exit code of the cause."""
        while True:
            codes = [process.poll() for process in self.started]
            if any(codes):
                break
            if all(code == 0 for code in codes):
                return 0
            time.sleep(POLL_SECONDS)
        deadline = time.monotonic() + LEAVE_SECONDS  # most notice by themselves, and say so
        while None in (codes := [process.poll() for process in self.started]):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        self.stop()
        return cause(code for code in codes if code)

    def stop(self) -> None:
        """Asks every process that still runs to end, and kills those that do not."""
        self.send(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self.started:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def send(self, number: signal.Signals) -> None:
        for process in self.started:
            if process.poll() is None:
                process.send_signal(number)


def cause(codes) -> int:
    """Returns which of several processes' exit codes says why they ended.

    One that another try does not mend comes first; that another process was lost says least.
    """
    seen = [code if code > 0 else 128 - code for code in codes]  # by a signal: as a shell has it
    return min(seen, key=lambda code: (code not in FINAL, code == UNAVAILABLE, code == PREEMPTED))


class Forwarding:
    """Hands SIGTERM and SIGINT of this process on to a group; the second one kills the group."""

    def __init__(self):
        self.asked: signal.Signals | None = None
        self._since = 0.0
        self._event = threading.Event()
        self._group: Group | None = None
        self._before = {}

    def watch(self, group: Group) -> None:
        """From now on signals are for this group; also one that came while it was started."""
        self._group = group
        if self.asked is not None:
            group.send(self.asked)

    def sleep(self, seconds: float) -> None:
        """Waits, but no longer than until a signal comes."""
        self._event.wait(seconds)

    def _hand_on(self, number: int, _) -> None:
        now, send = time.monotonic(), signal.SIGKILL
        if self.asked is None:
            self._since, self.asked = now, signal.Signals(number)
            send = self.asked
        elif now - self._since <= SAME_SECONDS:
            return
        if self._group is not None:
            self._group.send(send)
        self._event.set()

    def __enter__(self) -> "Forwarding":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._hand_on)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def supervise(start: Callable[[], Group], workdir: Path | None, retries: Retries) -> int:
    """Runs what `start` starts until it is done, cannot be mended, or does not get on any more.

    Args:
        start: starts all processes of the run, once more at each call.
        workdir: of the run, whose checkpoints say whether it gets on; None: it has none.
        retries: `restarts=0` runs it once and hands its exit code back.

    Returns:
        the exit code of the last try, or CRASH_LOOP.
    """
    ends: list[tuple[int, int | None]] = []  # of the tries since the newest checkpoint
    newest = newest_checkpoint(workdir)
    with Forwarding() as signals:
        while True:
            group = start()
            signals.watch(group)
            code = group.wait()
            final = code in FINAL or (code == PREEMPTED and retries.end_when_preempted)
            if signals.asked is not None or final or retries.restarts == 0:
                return code
            if (step := newest_checkpoint(workdir)) > newest:
                ends = []
            newest = step  # lower after a fallback, from where the run gets on too
            ends.append((code, None if workdir is None else last_step(workdir)))
            if len(ends) > retries.restarts:
                return _give_up(workdir, newest, ends)
            seconds = min(retries.longest_wait, retries.first_wait * 2 ** min(len(ends) - 1, 30))
            _say(
                f"ended with exit code {code}; starting it again in {seconds:g} s, after step "
                f"{newest} ({len(ends)} of {retries.restarts} without a newer checkpoint)"
            )
            _note(workdir, "restart", newest, code=code, failures=len(ends), wait_seconds=seconds)
            signals.sleep(seconds)
            if signals.asked is not None:
                return INTERRUPTED if signals.asked == signal.SIGINT else PREEMPTED


def _give_up(workdir: Path | None, newest: int, ends: list[tuple[int, int | None]]) -> int:
    codes, steps = [code for code, _ in ends], [step for _, step in ends]
    reached = "" if workdir is None else f", the last steps done {_listed(steps)}"
    _say(
        f"gives up: {len(ends)} times in a row it ended without a newer checkpoint than that of "
        f"step {newest}; exit codes {_listed(codes)}{reached}. Look at what it said and at "
        "events.jsonl; where always the same step fails, pass over its batch with "
        "watch.skip_batches, or save more often with checkpoint.every"
    )
    _note(workdir, "crash_loop", newest, codes=codes, steps=steps)
    return CRASH_LOOP


def _listed(values: Sequence) -> str:
    return ", ".join("none" if value is None else str(value) for value in values)


def newest_checkpoint(workdir: Path | None) -> int:
    """Returns the last step that has a finished checkpoint, also on the local disk; 0 without."""
    if workdir is None:
        return 0
    local = None
    with contextlib.suppress(ConfigError):  # a run that has not begun has no config
        local = read_config(workdir).checkpoint.local
    return max(checkpoint_steps(workdir, local), default=0)


def _note(workdir: Path | None, kind: str, step: int, **fields) -> None:
    if workdir is not None and workdir.is_dir():
        Events(workdir).write(kind, step, **fields)


def _say(text: str) -> None:
    print(f"moejax supervise: {text}", file=sys.stderr, flush=True)


def workdir_of(command: Sequence[str]) -> Path | None:
    """Returns the folder that `--workdir` names in the words of a command."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "--workdir" and following:
            return Path(following)
        if word.startswith("--workdir="):
            return Path(word.removeprefix("--workdir="))
    return None


def supervise_command(program: Sequence[str], retries: Retries) -> int:
    """Runs one program, which trains in the `--workdir` among its words; see `supervise`.

    Raises:
        ConfigError: there is no such program, or no workdir among its words.
    """
    workdir = workdir_of(program)
    if workdir is None:
        raise ConfigError(
            "the command has no --workdir, whose checkpoints tell whether it makes progress; for "
            "example moejax supervise -- train configs/quickstart.py --workdir runs/a"
        )

    def start() -> Group:
        try:
            return Group([subprocess.Popen(program, env=os.environ)])
        except OSError as error:
            raise ConfigError(
                f"{program[0]} cannot be started: {error.strerror}; give a verb of moejax, or a "
                "program on this machine"
            ) from None

    return supervise(start, workdir, retries)
