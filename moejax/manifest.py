"""What makes a folder a checkpoint that can be trusted: MANIFEST.json. JAX is not imported.

It is written last, when every file of the checkpoint is on the disk, and holds the size and SHA-256
of each, what arrays are inside, and whose they are. Orbax notices neither a flipped bit nor a file
of another run; a folder that fits its manifest has neither.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from moejax.errors import SERVER_FAILS, StorageError
from moejax.foreign import write_atomically

MANIFEST = "MANIFEST.json"  # in a step's folder, written when all else in it is on the disk
RUN_ID = re.compile(r"[0-9a-f]{16}")
FORMAT = 1
MAX_BYTES = 256 << 20  # of a manifest: 200 bytes a file, and a million files
_BLOCK = 1 << 18
_THREADS = min(16, 2 * (os.cpu_count() or 1))  # some read while others hash

Table = dict[str, tuple[tuple[int, ...], str]]  # name of a leaf -> shape, dtype


class Unsound(Exception):
    """A checkpoint that must not be used; the message says why."""


class Newer(Unsound):
    """A checkpoint of a later format: nothing is wrong with it, but this moejax cannot read it."""


class Manifest(NamedTuple):
    """Of one checkpoint.

    Attributes:
        run: random id of the run that wrote it.
        step: finished steps.
        tables: by item, what arrays it holds.
        files: by path in the folder, size in bytes and SHA-256.
        metrics: of this step, as the retention reads them; `loss` is that of validation.
        about: fingerprints of config and data, versions, counters.
    """

    run: str
    step: int
    tables: dict[str, Table]
    files: dict[str, tuple[int, str]]
    metrics: dict[str, float]
    about: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    @property
    def digest(self) -> str:
        """What tells it from all others, also from those of its step: SHA-256 of its content."""
        return fingerprint(_body(self))


def fingerprint(value: Any) -> str:
    """Returns the SHA-256 of JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_manifest(
    folder: Path,
    run: str,
    step: int,
    tables: Mapping[str, Table],
    metrics: Mapping[str, float],
    about: Mapping[str, Any],
) -> Manifest:
    """Hashes and syncs all files of a checkpoint, then writes its manifest.

    Raises:
        OSError: of the file system.
        Unsound: the folder holds what no checkpoint does.
    """
    files = _hashed(folder, list_files(folder), sync=True)
    losses = {name: float(value) for name, value in metrics.items()}
    manifest = Manifest(run, step, {**tables}, files, losses, {**about})
    for directory, _, _ in os.walk(folder):
        sync_folder(Path(directory))
    write_atomically(folder / MANIFEST, _encode(manifest))
    sync_folder(folder)
    sync_folder(folder.parent)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Returns the manifest of a folder.

    Raises:
        Newer: it is of a later format.
        Unsound: there is none, or one that is not as it was written.
        StorageError: a file server does not answer.
    """
    file = folder / MANIFEST
    try:
        if file.is_symlink() or not file.is_file():
            raise Unsound(f"it has no {MANIFEST}")
        if file.stat().st_size > MAX_BYTES:
            raise Unsound(f"{MANIFEST} is larger than {MAX_BYTES >> 20} MiB")
        text = file.read_bytes()
        manifest = _decode(json.loads(text))
        # the digest in it too: no bit is free to flip
        damaged = _encode(manifest).encode() != text
    except OSError as error:
        raise _unread(file, MANIFEST, error) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        raise Unsound(f"{MANIFEST} is damaged") from None
    if damaged:
        raise Unsound(f"{MANIFEST} is damaged")
    return manifest


def check_files(
    folder: Path, manifest: Manifest, progress: Callable[[int], None] | None = None
) -> None:
    """Reads all of a checkpoint and compares it with its manifest.

    Args:
        progress: called with numbers of bytes as they are read, from several threads.

    Raises:
        Unsound: a file is missing, too many, or not as it was written; the first one is named.
        StorageError: a file server does not answer.
    """
    there = list_files(folder)
    for name in sorted({*manifest.files} ^ {*there}):
        raise Unsound(f"{name} is missing" if name in manifest.files else f"{name} is not its own")
    for name, (size, _) in manifest.files.items():
        found = there[name]
        if found != size:
            raise Unsound(f"{name} has {found} bytes, not {size}")
    try:
        hashed = _hashed(folder, there, progress=progress)
    except OSError as error:
        raise _unread(folder, str(error.filename), error) from None
    for name, (_, digest) in manifest.files.items():
        if hashed[name][1] != digest:
            raise Unsound(f"{name} has another SHA-256 than when it was written")


def _unread(path: Path, name: str, error: OSError) -> Exception:
    """What a file that cannot be read says of its checkpoint: nothing, where the server fails."""
    reason = error.strerror or str(error)
    if error.errno in SERVER_FAILS:
        return StorageError(f"{path} cannot be read: {reason}; see whether the file server answers")
    return Unsound(f"{name} cannot be read: {reason}")


def list_files(folder: Path) -> dict[str, int]:
    """Returns the files of a checkpoint by their path in it, with their sizes; not the manifest.

    Raises:
        Unsound: it holds a link or a special file, or cannot be listed.
    """
    return dict(_walk(folder, ""))


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path), name + "/")
            elif not entry.is_file(follow_symlinks=False):
                raise Unsound(f"{name} is neither a file nor a folder")
            elif name != MANIFEST:
                yield name, entry.stat(follow_symlinks=False).st_size
    except OSError as error:
        raise _unread(folder, str(folder), error) from None
    except RecursionError:
        raise Unsound("its folders are nested without end") from None


def _hashed(
    folder: Path,
    files: Mapping[str, int],
    *,
    sync: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, tuple[int, str]]:
    """Hashes files, several at once: hashlib lets go of the interpreter meanwhile."""
    blocks = threading.local()

    def hash_file(name: str) -> tuple[int, str]:
        if not hasattr(blocks, "view"):
            blocks.view = memoryview(bytearray(_BLOCK))
        digest, size = hashlib.sha256(), 0
        with open(folder / name, "rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while read := stream.readinto(blocks.view):
                digest.update(blocks.view[:read])
                size += read
                if progress is not None:
                    progress(read)
            if sync:
                os.fsync(stream.fileno())
        return size, digest.hexdigest()

    largest_first = sorted(files, key=lambda name: -files[name])
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(largest_first, pool.map(hash_file, largest_first), strict=True))


def sync_folder(folder: Path) -> None:
    """Has the entries of a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(file: Path) -> None:
    """Has what was written to a file so far survive a loss of power, if there is one."""
    with contextlib.suppress(OSError):
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _body(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "run": manifest.run,
        "step": manifest.step,
        "metrics": manifest.metrics,
        "about": manifest.about,
        "tables": manifest.tables,
        "files": manifest.files,
    }


def _encode(manifest: Manifest) -> str:
    whole = {**_body(manifest), "digest": manifest.digest}
    return json.dumps(whole, sort_keys=True, indent=0) + "\n"


def _decode(given: Any) -> Manifest:
    if given["format"] > FORMAT:
        raise Newer(
            f"{MANIFEST} has format {given['format']}, of a newer moejax; this one reads {FORMAT}"
        )
    tables = {
        item: {name: (tuple(map(int, shape)), str(dtype)) for name, (shape, dtype) in table.items()}
        for item, table in given["tables"].items()
    }
    files = {name: (int(size), str(digest)) for name, (size, digest) in given["files"].items()}
    if not RUN_ID.fullmatch(given["run"]) or not isinstance(given["step"], int):
        raise ValueError(given["run"])
    metrics = {name: float(value) for name, value in given["metrics"].items()}
    return Manifest(given["run"], given["step"], tables, files, metrics, dict(given["about"]))
