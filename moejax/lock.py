"""One run, one owner: a lock on the workdir. JAX is not imported.

The kernel holds the lock (`flock`) and drops it with the process, however that ends. The file says
in JSON who holds it, for the message of whoever comes second.
"""

import fcntl
import json
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moejax.errors import ConfigError
from moejax.events import Events
from moejax.foreign import printable

LOCK = "lock.json"  # in a workdir
_UNSUPPORTED = (38, 95)  # ENOSYS, EOPNOTSUPP: of file systems without locks


class RunLock:
    """The lock of a workdir. A context manager: leaving it lets go of what `take` took."""

    def __init__(self, workdir: Path):
        self._workdir, self._file = workdir, workdir / LOCK
        self._descriptor: int | None = None

    def take(self) -> None:
        """Takes the lock, also that of an owner who died.

        Raises:
            ConfigError: another process has it, or it cannot be written.
        """
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{self._file} cannot be written: {error.strerror}; give another --workdir"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read(descriptor)
            os.close(descriptor)
            raise ConfigError(
                f"workdir {self._workdir} is in use by process {owner.get('pid', 'unknown')} on "
                f"{owner.get('host', 'an unknown host')} since {owner.get('start', 'unknown')}; "
                "end that one first, or give another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise ConfigError(f"{self._file} cannot be locked: {error.strerror}") from None
            print(
                f"moejax train: {self._workdir} is on a file system without locks: a second run "
                "in it would not be noticed",
                file=sys.stderr,
            )
        self._descriptor = descriptor
        self._tell_of_the_dead(_read(descriptor))
        start = datetime.now(UTC).isoformat(timespec="seconds")
        self._write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": start}))

    def _tell_of_the_dead(self, owner: dict[str, Any]) -> None:
        if not owner:  # it let go
            return
        known = {name: owner.get(name) for name in ("host", "pid", "start")}
        said = (
            f"moejax train: process {known['pid']} on {known['host']}, which had "
            f"{self._workdir} since {known['start']}, died without releasing it; taken over"
        )
        print(printable(said), file=sys.stderr)
        Events(self._workdir).write("lock_taken_over", 0, owner=known)

    def _write(self, text: str) -> None:
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        if self._descriptor is not None:
            self._write("")  # the file stays: removing it would let two have a lock
            os.close(self._descriptor)
            self._descriptor = None


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
