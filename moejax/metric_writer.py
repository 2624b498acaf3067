"""Where the records of a training go: `metrics.jsonl`, TensorBoard and other boards.

The file survives a crash, a resume and a full disk, and no failure of it ends a training.
"""

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from moejax.errors import file_error
from moejax.foreign import no_links
from moejax.metrics import decode_line, encode_record
from moejax.tensorboard import TensorBoard
from moejax.workdir import METRICS, TENSORBOARD

_log = logging.getLogger("moejax")


class Board(Protocol):
    """Shows records somewhere else, and raises nothing."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def restart(self) -> None: ...  # the run went back: steps come again


class MetricWriter:
    """Writes records to `workdir/metrics.jsonl` and to TensorBoard events in `workdir/tensorboard`.

    Opening it for a run that starts at `start_step` (0, or the step of the checkpoint that it
    resumes from) drops the lines of later steps and a torn last line, in one atomic replacement, so
    that each step appears once.

    A run is worth more than its log. If a write fails later (disk full, file server away), that is
    logged once; lines are kept in memory and written when the file takes them again. TensorBoard is
    switched off by its first failure.

    Args:
        workdir: folder of the run, made if missing.
        start_step: last step that is already done.
        enabled: False on every process but the first: nothing is opened or written.
        image_every: TensorBoard gets an image of the expert load at each evaluation and at each
            n-th train record.
        boards: that get every record too; they are neither opened nor closed here.

    Raises:
        ConfigError: the workdir cannot be written.
    """

    def __init__(
        self,
        workdir: str | Path,
        start_step: int,
        enabled: bool = True,
        *,
        image_every: int = 10,
        boards: Sequence[Board] = (),
    ):
        self._workdir, self._enabled = Path(workdir), enabled
        self._image_every, self._boards = image_every, boards
        self._lines: _LineFile | None = None
        self._board: TensorBoard | None = None
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        if not self._enabled:
            return
        path = self._workdir / METRICS
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(path, start_step)
            self._lines = _LineFile(path)
        except OSError as error:
            raise file_error(
                f"{path} cannot be written: {error.strerror or error}; make room, or give another "
                "--workdir",
                error,
            ) from error
        self._board = TensorBoard(self._workdir / TENSORBOARD, start_step, self._image_every)

    def go_back(self, step: int) -> None:
        """Goes on after an earlier step, as if opened for it. Raises as opening does."""
        self.close()
        self._open(step)
        for board in self._boards:
            board.restart()

    @property
    def files(self) -> list[Path]:
        """What this writer writes: the metrics file, and the folder of TensorBoard events."""
        folders = [] if self._board is None else [self._board.folder]
        return ([] if self._lines is None else [self._lines.path]) + folders

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a record; it is in the file when this returns. Raises as `encode_record` does."""
        line = encode_record(record)
        if self._lines is not None:
            self._lines.append(line)
        if self._board is not None:
            self._board.write(json.loads(line))
        for board in self._boards:
            board.write(record)

    def write_text(self, name: str, text: str) -> None:
        """Shows a text, such as the resolved config, under TensorBoard's Text tab."""
        if self._board is not None:
            self._board.write_text(name, text)

    def close(self) -> None:
        """Writes what is left and closes the files. Closing twice is harmless."""
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _drop_lines_after(path: Path, step: int) -> None:
    """Keeps the lines up to `step`, none when it is 0, and drops what is not a record."""
    if not path.exists():
        return
    before = path.read_bytes()
    kept, unreadable = [], 0
    for line in before.splitlines(keepends=True):
        record = decode_line(line)
        if record is None:
            unreadable += 1
        elif step > 0 and record["step"] <= step:
            kept.append(line)
    if unreadable:
        _log.warning("%s: dropped %d torn or unreadable lines", path, unreadable)
    after = b"".join(kept)
    if after != before:
        _replace_atomically(path, after)


def _replace_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb", opener=no_links) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class _LineFile:
    """Appends lines to a file, whole or not at all, and holds back what the file does not take."""

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, closed by close()
        self._size = self._file.seek(0, os.SEEK_END)
        self._waiting: list[bytes] = []
        self._warned = False

    def append(self, line: str) -> None:
        self._waiting.append(line.encode() + b"\n")
        self._write_waiting()

    def close(self) -> None:
        if self._file.closed:
            return
        self._write_waiting()
        if self._waiting:
            _log.warning("%s: %d records could not be written", self.path, len(self._waiting))
        self._file.close()

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        block = b"".join(self._waiting)
        try:
            written = self._file.write(block)
            if written != len(block):
                raise OSError(f"only {written} of {len(block)} bytes were taken")
        except OSError as error:
            self._undo(error)
            return
        self._size += len(block)
        self._waiting.clear()

    def _undo(self, error: OSError) -> None:
        """Takes back half a line, so that the file stays readable."""
        if not self._warned:
            self._warned = True
            _log.warning(
                "cannot write %s (%s); training goes on, lines are kept in memory", self.path, error
            )
        with contextlib.suppress(OSError):  # if this fails too, the next resume drops the torn line
            self._file.truncate(self._size)
