"""Batches: documents packed in windows; a batch is a function of (seed, step). No JAX here."""

import hashlib
import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from moejax.config import ConfigError
from moejax.corpus import Corpus, check_ids
from moejax.errors import UnavailableError
from moejax.token_file import CorruptData

CLOSE_SECONDS = 5.0  # to wait for a thread that is to end

_log = logging.getLogger("moejax")


class Batch(NamedTuple):
    """Sequences, and what model and loss need to know of them: arrays [B, T], or [T] of one.

    Attributes:
        tokens: int32 ids; the input.
        targets: int32 ids; the token after each input.
        segments: int32; the number of the input's document inside its row, from 1; 0 is padding.
        loss_mask: bool; True where input and target belong to one document.
        domains: int32; index of the domain of the target's document; 0 for padding.
    """

    tokens: Any
    targets: Any
    segments: Any
    loss_mask: Any
    domains: Any


class Sequences:
    """The documents of a corpus as one stream, cut in windows of T + 1 tokens that share one token.

    `sequences[k]` is a Batch of arrays [T]; every token of the stream but the first is a target
    once. Costs O(T log documents) and reads only its window. The last window is padded.

    Raises:
        CorruptData: a window is damaged, or has an id that is not in the vocabulary; with
            `corpus.skip_corrupt` it is padding instead, and said.
    """

    def __init__(self, corpus: Corpus, sequence_length: int):
        self.corpus = corpus
        self.sequence_length = sequence_length
        self._said: set[int] = set()  # which sequences are damaged

    def __len__(self) -> int:
        return -(-max(self.corpus.num_tokens - 1, 0) // self.sequence_length)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        try:
            return self._window(index)
        except CorruptData as error:
            if not self.corpus.skip_corrupt:
                raise
            if index not in self._said:
                _log.warning("sequence %d is padding instead: %s", index, error)
            self._said.add(index)
            return self.padding()

    def _window(self, index: int) -> Batch:
        corpus, length = self.corpus, self.sequence_length
        start = int(index) * length
        stop = min(start + length + 1, corpus.num_tokens)
        window = np.full(length + 1, corpus.end_of_document, np.int32)
        ids = corpus.token_n[start:stop]
        check_ids(corpus, ids, start)
        window[: stop - start] = ids
        document = np.searchsorted(corpus.start_d, np.arange(start, stop), side="right") - 1
        segments = np.zeros(length + 1, np.int32)
        segments[: stop - start] = document - document[0] + 1
        domains = np.zeros(length + 1, np.int32)
        domains[: stop - start] = corpus.domain_d[document]
        return Batch(
            tokens=window[:-1],
            targets=window[1:],
            segments=segments[:-1],
            loss_mask=(segments[:-1] == segments[1:]) & (segments[1:] > 0),
            domains=domains[1:],
        )

    def padding(self) -> Batch:
        """A sequence of nothing but padding."""
        ids = np.full(self.sequence_length, self.corpus.end_of_document, np.int32)
        zeros = np.zeros(self.sequence_length, np.int32)
        return Batch(ids, ids, zeros, zeros.astype(bool), zeros)


class TrainBatches:
    """Global batches of B sequences, shuffled anew each epoch, without end.

    Row i of step s is entry s * B + i of one order, which Grain makes from `seed`: the position in
    the data is the step, and processes that ask for parts of a batch get parts of the same batch.

    Raises:
        ConfigError: the split has fewer sequences than one batch.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, batch_size: int, seed: int):
        import grain  # imports JAX

        sequences = Sequences(corpus, sequence_length)
        if len(sequences) < batch_size:
            raise ConfigError(
                f"the training split has {corpus.num_tokens} tokens, {len(sequences)} sequences "
                f"of data.sequence_length={sequence_length}, fewer than "
                f"train.batch_size={batch_size}; use more text, a smaller batch or shorter "
                "sequences"
            )
        self.batch_size = batch_size
        self.num_sequences = len(sequences)
        self._order = grain.MapDataset.source(sequences).seed(seed).shuffle().repeat(None)
        about = f"{corpus.fingerprint}:{sequence_length}:{batch_size}:{seed}"
        self.fingerprint = hashlib.sha256(about.encode()).hexdigest()

    def epoch(self, step: int) -> int:
        """Returns the epoch of the last sequence of the batch of `step`; both count from 0."""
        return ((step + 1) * self.batch_size - 1) // self.num_sequences

    def rows(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Returns rows `start` to `stop` of the batch of `step` (from 0), [stop - start, T]."""
        first = step * self.batch_size
        stop = self.batch_size if stop is None else stop
        return _stack([cast(Batch, self._order[first + i]) for i in range(start, stop)])


class ValidationBatches:
    """Batches of the validation split, the same at every evaluation.

    With `batches` fewer than the split fills, their sequences are spread evenly over it. The last
    batch of the whole split is filled up with padding, so that shapes are static.

    Raises:
        ConfigError: the split has no sequence.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, batch_size: int, batches: int | None):
        self._sequences = Sequences(corpus, sequence_length)
        total = len(self._sequences)
        if total == 0:
            raise ConfigError(
                f"the text to evaluate has {corpus.num_tokens} tokens and no token to predict; "
                "use more text"
            )
        self.batch_size = batch_size
        chosen = total if batches is None else min(total, batches * batch_size)
        self._chosen = (2 * np.arange(chosen, dtype=np.int64) + 1) * total // (2 * chosen)
        self.whole = chosen == total  # whether every target of the split is in them

    def __len__(self) -> int:
        return -(-len(self._chosen) // self.batch_size)

    def rows(self, index: int, start: int = 0, stop: int | None = None) -> Batch:
        """Returns rows `start` to `stop` of batch `index`, arrays [stop - start, T].

        Rows past the batch are padding, for meshes that need a multiple of more.
        """
        stop = self.batch_size if stop is None else stop
        return _stack([self._row(index, i) for i in range(start, stop)])

    def first_token(self, index: int, row: int) -> int | None:
        """Returns which token of the split a row begins with; None for padding."""
        position = index * self.batch_size + row
        if row >= self.batch_size or position >= len(self._chosen):
            return None
        return int(self._chosen[position]) * self._sequences.sequence_length

    def _row(self, index: int, row: int) -> Batch:
        first = self.first_token(index, row)
        if first is None:
            return self._sequences.padding()
        return self._sequences[first // self._sequences.sequence_length]


def _stack(rows: list[Batch]) -> Batch:
    return Batch(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))


class Prefetch:
    """Calls `make(first)`, `make(first + 1)`, ... in a thread and yields the results in order.

    An error in `make` is raised where its result would have come. A context manager; or close it.

    Args:
        timeout: seconds that a result may take.

    Raises:
        UnavailableError: one took longer, or the thread is gone; the message says where it is.
    """

    def __init__(
        self, make: Callable[[int], Batch], first: int, timeout: float = 300.0, *, depth: int = 2
    ):
        self._queue: queue.Queue = queue.Queue(depth)
        self._timeout, self._next = timeout, first
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(make, first), name="moejax-data", daemon=True
        )
        self._thread.start()

    def _run(self, make: Callable[[int], Batch], index: int) -> None:
        while not self._closed.is_set():
            try:
                item = (make(index), None)
            except BaseException as error:
                item = (None, error)
            self._put(item)
            if item[1] is not None:
                return
            index += 1

    def _put(self, item) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        batch, error = self._take()
        if error is not None:
            self.close()
            raise error
        self._next += 1
        return batch

    def _take(self) -> tuple[Batch, BaseException | None]:
        deadline = time.monotonic() + self._timeout
        while True:
            alive = self._thread.is_alive()
            try:
                return self._queue.get(timeout=min(1.0, max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                if alive and time.monotonic() < deadline:
                    continue
            state = "hangs" if alive else "died without an error"
            raise UnavailableError(
                f"batch {self._next} did not arrive in data.timeout_seconds={self._timeout:g}: the "
                f"thread that reads data {state}{self._place()}; check that the disk or file "
                "server answers, and raise data.timeout_seconds if it is only slow"
            )

    def _place(self) -> str:
        """Says where the thread is, innermost call last."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        calls = traceback.extract_stack(frame)[-4:] if frame else []
        lines = [f"{Path(call.filename).name}:{call.lineno} {call.name}" for call in calls]
        return f", in {' > '.join(lines)}" if lines else ""

    def close(self) -> None:
        """Stops the thread and waits for it, but not for one that hangs. Twice is fine."""
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def check_vocabulary(corpus: Corpus, model_vocab_size: int) -> None:
    """Checks that the model has an embedding for every id that the corpus may hold.

    Raises:
        ConfigError: it does not.
    """
    if corpus.vocab_size > model_vocab_size:
        raise ConfigError(
            f"the tokenizer has {corpus.vocab_size} ids, but model.vocab_size={model_vocab_size}; "
            f"every id needs an embedding, use model.vocab_size={-(-corpus.vocab_size // 8) * 8}"
        )
