"""Ids out of a file: checksums by chunk, and files that are cut off while they are read."""

import os
import subprocess
import sys
import zlib

import numpy as np
import pytest

from moejax.errors import ConfigError
from moejax.token_file import CHUNK_BYTES, CorruptData, TokenFile, chunk_checksums

IDS = np.random.default_rng(0).integers(0, 257, CHUNK_BYTES + 1000).astype("<u2")  # 2 chunks and on


def _checksums(data: bytes) -> np.ndarray:
    parts = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
    return np.array([zlib.crc32(part) for part in parts], np.uint32)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tokens.bin"
    IDS.tofile(path)
    return path


def _open(path) -> TokenFile:
    return TokenFile(path, IDS.dtype, len(IDS), _checksums(IDS.tobytes()))


def test_it_is_sliced_as_an_array(path):
    ids = _open(path)
    assert (len(ids), ids.nbytes) == (len(IDS), IDS.nbytes)
    border = CHUNK_BYTES // 2
    for part in (slice(0, 5), slice(border - 3, border + 3), slice(-7, None), slice(9, 9)):
        np.testing.assert_array_equal(ids[part], IDS[part])
    np.testing.assert_array_equal(np.concatenate(list(ids.pieces())), IDS)


def test_checksums_do_not_depend_on_how_the_stream_was_cut():
    data, checksums, size = IDS.tobytes(), [], 0
    for start in range(0, len(data), 700_001):
        size = chunk_checksums(data[start : start + 700_001], checksums, size)
    np.testing.assert_array_equal(checksums, _checksums(data))
    assert size == len(data)


def test_a_flipped_bit_is_found_where_it_is_and_nowhere_else(path):
    with open(path, "r+b") as file:
        file.seek(CHUNK_BYTES + 40)
        byte = file.read(1)[0]
        file.seek(CHUNK_BYTES + 40)
        file.write(bytes([byte ^ 4]))
    ids = _open(path)
    np.testing.assert_array_equal(ids[:100], IDS[:100])
    with pytest.raises(
        CorruptData,
        match=rf"tokens\.bin was changed .*bytes {CHUNK_BYTES} to {2 * CHUNK_BYTES - 1}",
    ):
        ids[CHUNK_BYTES // 2 :]


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error(path):
    ids = _open(path)
    ids[: len(IDS)]
    os.truncate(path, 100)
    with pytest.raises(CorruptData, match=rf"tokens\.bin ends at byte 100 of {IDS.nbytes}: it was"):
        ids[40:60]
    np.testing.assert_array_equal(ids[:50], IDS[:50])


def test_the_same_through_a_memory_map_kills_the_process(path):
    """What the reading by `pread` is for: SIGBUS leaves no message at all."""
    code = (
        "import sys, os, numpy as np; ids = np.memmap(sys.argv[1], '<u2', mode='r'); "
        "os.truncate(sys.argv[1], 100); print(ids[-1])"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-7, "")


@pytest.mark.parametrize("size", [IDS.nbytes - 1, IDS.nbytes + 2, 0])
def test_a_file_of_another_size(path, size):
    os.truncate(path, size)
    with pytest.raises(ConfigError, match=rf"tokens\.bin has {size} bytes and meta\.json says "):
        _open(path)


def test_a_disk_that_fails(path, monkeypatch):
    ids = _open(path)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    message = r"tokens\.bin cannot be read at byte 0 \(Input/output"
    with pytest.raises(CorruptData, match=message) as caught:
        ids[:5]
    assert caught.value.code == 69, "it may do later; what was changed stays so"
    assert CorruptData("").code == 2


def test_files_are_closed(path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        _open(path)
    assert len(os.listdir("/proc/self/fd")) == before
