"""One run, one owner: a lock on the workdir. JAX is not imported.

The kernel holds the lock (`flock`) and drops it with the process, however that ends. The file says
in JSON who holds it, for the message of whoever comes second.
"""

import fcntl
import json
import os
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moejax.errors import ConfigError, file_error
from moejax.events import Events
from moejax.foreign import printable

LOCK = "lock.json"  # in a workdir
LEASE_SECONDS = 120.0  # NFS 4 keeps the locks of a host that it does not hear of for 90 s
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
            raise file_error(
                f"{self._file} cannot be written: {error.strerror}; give another --workdir", error
            ) from None
        try:
            self._lock(descriptor)
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
                raise file_error(
                    f"{self._file} cannot be locked: {error.strerror}; mount its file system with "
                    "locks (NFS 3 needs lockd), or give a --workdir on another one",
                    error,
                ) from None
            print(
                f"moejax train: {self._workdir} is on a file system without locks: a second run "
                "in it would not be noticed",
                file=sys.stderr,
            )
        self._descriptor = descriptor
        self._tell_of_the_dead(_read(descriptor))
        start = datetime.now(UTC).isoformat(timespec="seconds")
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "start": start}
        try:
            self._write(json.dumps(owner))
        except OSError as error:
            raise file_error(
                f"{self._file} cannot be written: {error.strerror}; make room, or give another "
                "--workdir",
                error,
            ) from None

    def _lock(self, descriptor: int) -> None:
        """Takes the kernel's lock; waits for one of another host, which may be dead.

        Raises:
            BlockingIOError: somebody has it.
        """
        deadline, said = time.monotonic() + LEASE_SECONDS, False
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                host = _read(descriptor).get("host")
                if host in (None, socket.gethostname()) or time.monotonic() > deadline:
                    raise
            if not said:
                text = (
                    f"moejax train: {self._workdir} is in use on {host}; waits {LEASE_SECONDS:g} "
                    "s, in which a file server takes the lock from a host that is gone"
                )
                print(printable(text), file=sys.stderr, flush=True)
            said = True
            time.sleep(min(1.0, LEASE_SECONDS / 10))

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
