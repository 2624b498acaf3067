"""events.jsonl: what happened to a run besides its steps, one JSON object a line. No JAX."""

import contextlib
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moejax.errors import ConfigError
from moejax.foreign import MIB, read_file

EVENTS = "events.jsonl"  # in a workdir

# What each kind says; docs/metrics.md shows the fields.
KINDS: dict[str, str] = {
    "checkpoint_saved": "a checkpoint was finished: `folder`, `bytes`, `seconds`",
    "checkpoint_failed": "a save failed and left nothing: `folder`, `error`, `free_bytes`",
    "checkpoint_skipped": "a save was due while the one before was still being written",
    "checkpoint_corrupt": "a checkpoint was unsound: `reason`, and `folder`, its new name",
    "checkpoint_ignored": "a folder of another run is among the checkpoints, untouched: `folder`",
    "leftover_removed": "a save or a deletion of a crashed process was cleared away: `folder`",
    "config_restored": "`config.json` was missing; it is written again",
    "lock_taken_over": "the process that had the workdir died without letting go: `owner`",
    "nonfinite": "a loss or gradient was not finite: `policy`, `batch`, `quantities`",
    "spike": "the loss or the gradient's norm was far above that of the last steps: "
    "`policy`, `batch`, `quantity`, `value`, `limit`",
    "skips": "too many steps in a row were left without effect: `policy`, `batch`, `in_a_row`",
    "collapse": "a router was over a limit for many steps in a row: "
    "`policy`, `batch`, `quantity`, `value`, `limit`, `steps`",
    "mismatch": "copies on devices, or a step run twice, were not equal bit for bit: "
    "`policy`, `comparison`, `arrays`",
    "rollback": "the run went back to a checkpoint, and leaves out the batches since: "
    "`to`, `first`, `last`",
    "skip_batches": "batches of the list were left out: `first`, `last`",
    "epoch": "all data was read, and is read again in another order: `epoch`, `batch`",
    "corrupt_data": "damaged parts of the data were replaced by padding: `batch`, `sequences`",
    "restart": "a supervisor starts the run again: `code` that it ended with, `failures` without a "
    "newer checkpoint, `wait_seconds`",
    "crash_loop": "a supervisor gives up, no try got to a newer checkpoint: `codes`, `steps` that "
    "the tries had done",
    "stuck": "a process made no progress within its limit, and ended: `process`, `doing`, "
    "`seconds`, `behind`",
    "environment": "the run was resumed on other devices, layout or software, so bits may differ: "
    "`differing`",
}


class Events:
    """Appends to the events of a run. Trouble with the file is said once and stops nothing.

    Args:
        workdir: of the run; it has to exist.
        enabled: True on the one process that writes.
    """

    def __init__(self, workdir: Path, *, enabled: bool = True):
        self._file = workdir / EVENTS
        self._enabled = enabled
        self._complained = False

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Appends an event.

        Args:
            kind: one of KINDS.
            step: after which it happened; 0 before the first.
            fields: JSON.
        """
        assert kind in KINDS, kind
        if not self._enabled:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "step": step, "kind": kind, **fields})
        try:
            append_line(self._file, line)
        except OSError as error:
            if not self._complained:
                print(f"moejax: {self._file} cannot be written: {error}", file=sys.stderr)
            self._complained = True


def append_line(file: Path, line: str) -> None:
    """Appends a line to a file, on a line of its own also where a crash cut the last one off."""
    with open(file, "ab+") as stream:
        cut = b""
        if stream.tell() > 0:
            stream.seek(-1, os.SEEK_END)
            cut = b"" if stream.read(1) == b"\n" else b"\n"
        stream.write(cut + line.encode() + b"\n")


def read_events(workdir: Path) -> list[dict[str, Any]]:
    """Returns the events of a run, oldest first; lines that a crash cut off are left out.

    Raises:
        ConfigError: there is a file, and it cannot be read.
    """
    try:
        text = read_file(workdir / EVENTS, 1024 * MIB).decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(
            f"{workdir / EVENTS} cannot be read: {error.strerror}; make it readable, or move it "
            "away: the run then knows nothing of rollbacks that its last checkpoint does not have"
        ) from None
    events = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict):
                events.append(event)
    return events


def rollbacks_to(events: list[dict[str, Any]], step: int) -> list[tuple[int, int]]:
    """Returns the batches, first to last, of each rollback to the checkpoint of `step`.

    It knows nothing of them itself: it was saved before. Those to one that had the step before it
    do not count.

    Raises:
        ConfigError: one does not say which.
    """
    found: list[tuple[int, int]] = []
    for event in events:
        if event.get("kind") == "checkpoint_saved" and event.get("step") == step:
            found = []
        elif event.get("kind") == "rollback" and event.get("to") == step:
            first, last = event.get("first"), event.get("last")
            most = 10**10  # as `SkipList.parse` has it
            if not (isinstance(first, int) and isinstance(last, int) and 0 <= first <= last < most):
                raise ConfigError(
                    f"{EVENTS} has a rollback without the batches that it left out: "
                    f"{json.dumps(event)[:200]}; mend the line, with `first` and `last` as whole "
                    "numbers"
                )
            found.append((first, last))
    return found
