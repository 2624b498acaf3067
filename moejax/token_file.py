"""Token ids in a file, read piece by piece and checked when they are first read. No JAX.

A memory map of a file that is cut off while it is mapped kills the process (SIGBUS), and hands on
whatever a disk makes of the bytes. So the file is read with `pread`, and each chunk is held to a
checksum that was taken when it was written.
"""

import os
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moejax.errors import UNAVAILABLE, ConfigError
from moejax.foreign import open_file

CHUNK_BYTES = 1 << 20


class CorruptData(ConfigError):
    """A part of the data is not what was written; the message names the file and the place."""


class UnreadableData(CorruptData):
    """The disk or file server fails: the same may do later."""

    code = UNAVAILABLE


def chunk_checksums(data: bytes | memoryview, checksums: list[int], size: int) -> int:
    """Goes on with the CRC-32 of each chunk of a stream.

    Args:
        data: the next bytes of the stream.
        checksums: of the chunks so far, to be added to.
        size: bytes of the stream before `data`.

    Returns:
        The bytes of the stream with `data`.
    """
    view = memoryview(data)
    while len(view):
        room = CHUNK_BYTES - size % CHUNK_BYTES
        if room == CHUNK_BYTES:
            checksums.append(0)
        checksums[-1] = zlib.crc32(view[:room], checksums[-1])
        size += len(view[:room])
        view = view[room:]
    return size


class TokenFile:
    """The ids of a file as a sequence: `ids[start:stop]` is an array. May be read in threads.

    Args:
        path: little-endian ids, no header.
        dtype: of an id.
        length: how many there are.
        checksum_c: uint32 [chunks]; CRC-32 of each CHUNK_BYTES of the file.

    Raises:
        ConfigError: the file is missing, cannot be read, or has another size.
    """

    def __init__(self, path: Path, dtype: np.dtype, length: int, checksum_c: np.ndarray):
        self.path, self.dtype = path, dtype
        self._length, self._checksum_c = length, checksum_c
        self._sound = np.zeros(len(checksum_c), bool)
        try:
            with open_file(path, links=True) as file:
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise ConfigError(
                f"{path} is missing ({error.strerror}); prepare the text again"
            ) from error
        weakref.finalize(self, os.close, self._file)
        size = os.fstat(self._file).st_size
        if size != self.nbytes:
            raise ConfigError(
                f"{path} has {size} bytes and meta.json says {self.nbytes}; copy the folder again, "
                "or prepare the text again"
            )

    def __len__(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        return self._length * self.dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        """Returns the ids of a slice.

        Raises:
            CorruptData: a chunk that they lie in cannot be read, is cut off, or was changed.
        """
        start, stop, step = part.indices(self._length)
        assert step == 1, part
        if stop <= start:
            return np.zeros(0, self.dtype)
        first, last = start * self.dtype.itemsize, stop * self.dtype.itemsize
        for chunk in range(first // CHUNK_BYTES, -(-last // CHUNK_BYTES)):
            if not self._sound[chunk]:
                self.check(chunk)
        return np.frombuffer(self._read(first, last), self.dtype)

    def check(self, chunk: int) -> None:
        """Holds a chunk to its checksum; raises as `__getitem__` does."""
        start = chunk * CHUNK_BYTES
        stop = min(start + CHUNK_BYTES, self.nbytes)
        if zlib.crc32(self._read(start, stop)) != self._checksum_c[chunk]:
            raise CorruptData(
                f"{self.path} was changed after it was prepared: bytes {start} to {stop - 1} have "
                "another checksum; copy the folder again, or prepare the text again"
            )
        self._sound[chunk] = True

    def pieces(self) -> Iterator[np.ndarray]:
        """Yields all ids in order, chunk by chunk."""
        step = CHUNK_BYTES // self.dtype.itemsize
        for start in range(0, self._length, step):
            yield self[start : start + step]

    def _read(self, start: int, stop: int) -> bytes:
        parts, at = [], start
        while at < stop:
            try:
                data = os.pread(self._file, stop - at, at)
            except OSError as error:
                raise UnreadableData(
                    f"{self.path} cannot be read at byte {at} ({error.strerror}); copy the folder "
                    "to another disk"
                ) from error
            if not data:
                raise CorruptData(
                    f"{self.path} ends at byte {os.fstat(self._file).st_size} of {self.nbytes}: it "
                    "was cut off while it was read; copy the folder again, or prepare the text "
                    "again"
                )
            parts.append(data)
            at += len(data)
        return b"".join(parts)
