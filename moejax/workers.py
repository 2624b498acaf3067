"""The worker processes of `moejax prepare`: one that dies or hangs is an error in time. No JAX."""

import collections
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

from moejax.errors import ConfigError, UnavailableError

_LOOKS = 20  # at a worker, within the time that it may do nothing


class Piece(Protocol):
    """A part of a file, which is read by one worker."""

    @property
    def path(self) -> str: ...


def in_order(
    work: Callable[[Iterable[Any]], Any],
    groups: Iterable[Sequence[Piece]],
    workers: int,
    timeout_seconds: float,
    start: Callable[..., None],
    *arguments: Any,
) -> Iterator[Any]:
    """Yields `work(pieces)` of each group in order, with at most 2 groups per worker under way.

    A worker may take as long as it likes, for a document is up to 1 GiB, but it has to use the
    processor: one that waits for a disk or was stopped uses none. All of them are killed when this
    generator ends before its groups do.

    Args:
        work: importable; takes its pieces from an iterator.
        timeout_seconds: without a result, another piece or time of the processor.
        start: called in each worker first, with `arguments`.

    Raises:
        ConfigError: a worker died, or what `work` raised.
        UnavailableError: a worker hangs; its file is named.
    """
    context = multiprocessing.get_context("spawn")
    slots = 2 * workers
    signs = context.RawArray("q", 2 * slots)  # of each slot: process, and which piece it is at
    others = {*multiprocessing.active_children()}
    waiting, under_way = enumerate(groups), collections.deque()
    executor = ProcessPoolExecutor(workers, context, _start, (signs, start, arguments))

    def submit(count: int) -> None:
        for number, group in itertools.islice(waiting, count):
            slot = 2 * (number % slots)
            signs[slot] = 0
            under_way.append((executor.submit(_run, work, slot, group), slot, group))

    def children() -> list[Any]:
        return [child for child in multiprocessing.active_children() if child not in others]

    try:
        submit(slots)
        while under_way:
            future, slot, group = under_way.popleft()
            _await(future, lambda slot=slot: _signs_of_life(signs, slot, children), timeout_seconds)
            if not future.done():
                raise _hangs(signs, slot, group, timeout_seconds)
            yield future.result()
            submit(1)
    except BaseException as error:
        for child in children():  # who hangs would be waited for
            child.kill()
        if isinstance(error, BrokenProcessPool):
            raise ConfigError(
                f"one of {workers} worker processes died (out of memory?); use --workers 1"
            ) from error
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _await(future: Future, life: Callable[[], Any], timeout_seconds: float) -> None:
    """Waits until a future is done, or its signs of life have not changed for so long.

    Looks are counted, not seconds: this process may have been stopped too.
    """
    silent, last = 0, None
    while silent < _LOOKS and not wait([future], timeout_seconds / _LOOKS).done:
        last, before = life(), last
        silent = silent + 1 if last == before else 0


def _signs_of_life(signs: Any, slot: int, children: Callable[[], list[Any]]) -> list[int]:
    process, piece = signs[slot : slot + 2]
    processes = [process] if process else [child.pid for child in children()]  # they still start
    return [process, piece, *map(_processor_time, processes)]


def _processor_time(process: int) -> int:
    """Returns the time of the processor that a process used, in ticks; 0 for one that is gone.

    Where no /proc tells, as on macOS, every process counts as at work: none is killed by mistake.
    """
    if not Path("/proc/self/stat").exists():
        return time.monotonic_ns()
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])  # utime, stime: proc(5)


def _hangs(signs: Any, slot: int, group: Sequence[Piece], seconds: float) -> UnavailableError:
    process, piece = signs[slot : slot + 2]
    who = f"worker process {process} has done" if process else "the worker processes have done"
    return UnavailableError(
        f"{who} nothing for --timeout_seconds={seconds:g} and should read "
        f"{group[piece].path}; check that the disk or file server answers and that nobody stopped "
        "the process, and raise --timeout_seconds if it is only slow"
    )


# In a worker

_own_signs: Any


def _start(signs: Any, start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    global _own_signs
    _own_signs = signs
    start(*arguments)


def _run(work: Callable[[Iterable[Any]], Any], slot: int, group: Sequence[Piece]) -> Any:
    def signed() -> Iterator[Piece]:
        for index, piece in enumerate(group):
            _own_signs[slot : slot + 2] = [os.getpid(), index]
            yield piece

    return work(signed())
