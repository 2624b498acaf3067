"""Packing by hand-written tables, order, slices of a batch, and the checks on ids."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import data
from moejax.config import ConfigError
from moejax.corpus import Corpus, make_corpus
from moejax.data import (
    Batch,
    Prefetch,
    Sequences,
    TrainBatches,
    ValidationBatches,
    check_vocabulary,
)
from moejax.errors import UnavailableError
from moejax.tokenizer import load_tokenizer

END = 256


def _corpus(*documents: tuple[int, list[int]]) -> Corpus:
    """A corpus of (domain, ids) documents."""
    packed = [(domain, np.asarray(ids, np.int32)) for domain, ids in documents]
    return make_corpus(packed, ("a", "b"), load_tokenizer("bytes"))


@pytest.fixture
def corpus() -> Corpus:
    """80 documents of 1 to 12 tokens in two domains."""
    rng = np.random.default_rng(0)
    return _corpus(*((i % 2, list(rng.integers(0, 256, rng.integers(0, 12)))) for i in range(80)))


def _assert_rows(batch: Batch, **expected) -> None:
    for name, value in expected.items():
        np.testing.assert_array_equal(getattr(batch, name), value, err_msg=name)


def test_packing_by_hand():
    """Three documents of 4, 2 and 3 tokens in windows of 5.

    stream    1 2 3 E | 4 E | 5 6 E
    window 0  1 2 3 E   4 E              5 inputs, 5 targets
    window 1              E   5 6 E      shares E with window 0; 3 targets, then padding
    """
    sequences = Sequences(_corpus((0, [1, 2, 3]), (1, [4]), (0, [5, 6])), 5)
    assert len(sequences) == 2
    _assert_rows(
        sequences[0],
        tokens=[1, 2, 3, END, 4],
        targets=[2, 3, END, 4, END],
        segments=[1, 1, 1, 1, 2],
        loss_mask=[True, True, True, False, True],  # 4 starts its document: no target
        domains=[0, 0, 0, 1, 1],
    )
    _assert_rows(
        sequences[1],
        tokens=[END, 5, 6, END, END],
        targets=[5, 6, END, END, END],
        segments=[1, 2, 2, 2, 0],
        loss_mask=[False, True, True, False, False],  # the last E has padding for a target
        domains=[0, 0, 0, 0, 0],
    )


def test_a_window_inside_a_long_document():
    """One document of 10 tokens in windows of 3 fits without padding: 3 windows of 3 targets."""
    sequences = Sequences(_corpus((1, [1, 2, 3, 4, 5, 6, 7, 8, 9])), 3)
    assert len(sequences) == 3
    _assert_rows(
        sequences[1],
        tokens=[4, 5, 6],
        targets=[5, 6, 7],
        segments=[1, 1, 1],
        loss_mask=[True] * 3,
        domains=[1, 1, 1],
    )
    _assert_rows(sequences[2], tokens=[7, 8, 9], targets=[8, 9, END], segments=[1, 1, 1])


def test_documents_of_nothing_but_their_end():
    sequences = Sequences(_corpus((0, []), (1, []), (0, [7])), 4)
    _assert_rows(
        sequences[0],
        tokens=[END, END, 7, END],
        targets=[END, 7, END, END],
        segments=[1, 2, 3, 3],
        loss_mask=[False, False, True, False],
        domains=[1, 0, 0, 0],
    )


@pytest.mark.parametrize("length", [2, 3, 7, 64, 1000])
def test_every_token_is_a_target_exactly_once(corpus, length):
    """All but the first of each document; what the windows mask out is exactly these firsts."""
    sequences = Sequences(corpus, length)
    rows = [sequences[k] for k in range(len(sequences))]
    targets = np.concatenate([row.targets[row.loss_mask] for row in rows])
    domains = np.concatenate([row.domains[row.loss_mask] for row in rows])
    keep = np.ones(corpus.num_tokens, bool)
    keep[corpus.start_d[:-1]] = False
    np.testing.assert_array_equal(targets, corpus.token_n[keep])
    owner = np.repeat(corpus.domain_d, np.diff(corpus.start_d))
    np.testing.assert_array_equal(domains, owner[keep])
    inputs = np.concatenate([row.tokens[row.segments > 0] for row in rows])
    assert len(inputs) - corpus.num_tokens in (-1, 0)  # the last token may be nobody's input
    np.testing.assert_array_equal(inputs, corpus.token_n[: len(inputs)])
    for row in rows:
        assert row.tokens.shape == (length,)
        assert row.tokens.dtype == row.targets.dtype == row.segments.dtype == np.int32
        assert row.domains.dtype == np.int32
        assert row.loss_mask.dtype == bool


def test_sequences_end(corpus):
    sequences = Sequences(corpus, 8)
    with pytest.raises(IndexError, match=f"sequence {len(sequences)} of {len(sequences)}"):
        sequences[len(sequences)]


# Order


def _equal(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_slices_of_a_batch_are_that_batch(corpus, processes):
    """Each process makes its own source and asks for its rows only; steps come in any order."""
    whole = TrainBatches(corpus, 8, 8, seed=3)
    share = 8 // processes
    parts = [TrainBatches(corpus, 8, 8, seed=3) for _ in range(processes)]
    for step in (100, 0, 7):
        rows = [part.rows(step, i * share, (i + 1) * share) for i, part in enumerate(parts)]
        together = Batch(*(np.concatenate(arrays) for arrays in zip(*rows, strict=True)))
        assert together.tokens.shape == (8, 8)
        assert _equal(together, whole.rows(step))


def test_seed_and_step_decide(corpus):
    batches = TrainBatches(corpus, 8, 4, seed=0)
    assert not _equal(batches.rows(0), batches.rows(1))
    assert not _equal(batches.rows(0), TrainBatches(corpus, 8, 4, seed=1).rows(0))


def _order(batches: TrainBatches, epoch: int) -> list[bytes]:
    """The sequences of an epoch; the batch size is 1."""
    first = epoch * batches.num_sequences
    steps = range(first, first + batches.num_sequences)
    return [batches.rows(step).tokens.tobytes() for step in steps]


def test_each_epoch_is_all_of_the_split_in_another_order(corpus):
    batches = TrainBatches(corpus, 8, 1, seed=0)
    first, second = _order(batches, 0), _order(batches, 1)
    assert len(set(first)) == batches.num_sequences
    assert sorted(first) == sorted(second)
    assert first != second
    # Seed 1 must not be seed 0 one epoch late.
    assert _order(TrainBatches(corpus, 8, 1, seed=1), 0) != second


def test_fingerprint_of_an_order(corpus):
    def fingerprint(*arguments) -> str:
        return TrainBatches(*arguments).fingerprint

    same = fingerprint(corpus, 8, 4, 0)
    assert same == fingerprint(corpus, 8, 4, 0)
    other = _corpus(*[(0, [1] * 100)])
    changed = [(other, 8, 4, 0), (corpus, 9, 4, 0), (corpus, 8, 5, 0), (corpus, 8, 4, 1)]
    assert len({same, *(fingerprint(*arguments) for arguments in changed)}) == 5


def test_epochs_are_counted_by_the_last_sequence_of_a_batch():
    """10 sequences in batches of 4: the third batch takes two of the next round."""
    batches = TrainBatches(_corpus((0, [1] * 30)), 3, 4, seed=0)
    assert batches.num_sequences == 10
    assert [batches.epoch(step) for step in range(6)] == [0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("documents", [(), ((0, []),)])
def test_no_text_at_all(documents):
    with pytest.raises(ConfigError, match=r"has [01] tokens, 0 sequences .*fewer than"):
        TrainBatches(_corpus(*documents), 3, 4, seed=0)


def test_too_few_sequences_for_a_batch():
    with pytest.raises(
        ConfigError, match=r"10 tokens, 3 sequences .*=3, fewer than train\.batch_size=4;"
    ):
        TrainBatches(_corpus((0, [1] * 9)), 3, 4, seed=0)


# Prefetch


def test_prefetch_gives_the_batches_from_its_step_on(corpus):
    batches = TrainBatches(corpus, 8, 4, seed=0)
    with Prefetch(lambda step: batches.rows(step, 1, 3), 5) as ahead:
        for step in (5, 6, 7, 8, 9):
            assert _equal(next(ahead), batches.rows(step, 1, 3))
    assert not _data_threads()
    with pytest.raises(StopIteration):
        next(ahead)


def _data_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "moejax-data"]


def test_prefetch_stays_within_its_depth():
    made = []
    ahead = Prefetch(lambda index: made.append(index) or index, first=0, depth=2)  # type: ignore
    assert next(ahead) == 0
    ahead.close()
    ahead.close()
    assert len(made) <= 5  # one taken, two queued, one in hand, one race at closing
    assert not _data_threads()


def test_an_error_in_the_thread_comes_out_in_the_caller():
    def make(index: int):
        if index == 2:
            raise ConfigError("token 999")
        return index

    ahead = Prefetch(make, first=0)  # type: ignore
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(ConfigError, match="token 999"):
        next(ahead)
    assert not _data_threads()
    with pytest.raises(StopIteration):
        next(ahead)


def test_a_thread_that_hangs_is_an_error_that_says_where(monkeypatch):
    monkeypatch.setattr(data, "CLOSE_SECONDS", 0.1)
    forever = threading.Event()

    def stuck_disk(index: int):
        if index == 6:
            forever.wait()
        return index

    ahead = Prefetch(stuck_disk, 5, timeout=0.2)  # type: ignore
    assert next(ahead) == 5
    with pytest.raises(
        UnavailableError,
        match=r"batch 6 did not arrive in data\.timeout_seconds=0\.2: the thread that reads data "
        r"hangs, in .*test_data\.py:\d+ stuck_disk > threading\.py",
    ):
        next(ahead)
    ahead.close()  # does not wait for it
    assert _data_threads()
    forever.set()
    ahead._thread.join()


def test_a_thread_that_is_gone_is_an_error_at_once():
    ahead = Prefetch(lambda index: index, first=0)  # type: ignore
    ahead._closed.set()
    ahead._thread.join()
    ahead._closed.clear()
    while not ahead._queue.empty():
        next(ahead)
    with pytest.raises(UnavailableError, match=r"the thread that reads data died without an error"):
        next(ahead)
    ahead.close()


# Validation


def test_the_whole_validation_split_once_then_padding(corpus):
    sequences = Sequences(corpus, 8)
    batches = ValidationBatches(corpus, 8, 4, batches=None)
    assert len(sequences) % 4 != 0
    assert len(batches) == -(-len(sequences) // 4)
    rows = [batches.rows(i, j, j + 1) for i in range(len(batches)) for j in range(4)]
    for k, row in enumerate(rows):
        assert row.tokens.shape == (1, 8)
        if k < len(sequences):
            assert _equal(row, Batch(*(array[None] for array in sequences[k])))
        else:
            _assert_rows(row, tokens=[[END] * 8], segments=[[0] * 8], loss_mask=[[False] * 8])
    assert _equal(batches.rows(0), Batch(*map(np.concatenate, zip(*rows[:4], strict=True))))


def test_a_part_of_the_validation_split_is_spread_over_it():
    """20 sequences, 2 batches of 2: the middles of the 4 quarters of 5."""
    corpus = _corpus((0, list(range(100, 120))))
    batches = ValidationBatches(corpus, 1, 2, batches=2)
    assert len(batches) == 2
    np.testing.assert_array_equal(batches.rows(0).tokens, [[102], [107]])
    np.testing.assert_array_equal(batches.rows(1).tokens, [[112], [117]])
    assert len(ValidationBatches(corpus, 1, 2, batches=100)) == 10  # no more than there is


def test_a_validation_split_without_a_target():
    with pytest.raises(
        ConfigError, match=r"the text to evaluate has 1 tokens and no token to predict"
    ):
        ValidationBatches(_corpus((0, [])), 8, 4, batches=None)


# Checks of ids


def test_an_id_beyond_the_vocabulary(corpus):
    """Where it is: the window of 8 from token 24 on; a device would clamp it in silence."""
    ids = corpus.token_n.copy()
    ids[29] = 300
    sequences = Sequences(dataclasses.replace(corpus, token_n=ids), 8)
    sequences[2]
    document = int(np.searchsorted(corpus.start_d, 29, side="right")) - 1
    inside = 29 - corpus.start_d[document]
    with pytest.raises(
        ConfigError,
        match=rf"token id 300 is not below the vocabulary of 257: the embedded text, document "
        rf"{document} of domain '[ab]', token {inside} of it, 29 of all; prepare",
    ):
        sequences[3]


def test_a_device_takes_another_embedding_for_an_id_that_has_none():
    """The harm: no error, the last row."""
    table_vd = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(jax.jit(lambda ids: table_vd[ids])(jnp.array([300])), [[4, 5]])


def test_a_damaged_sequence_is_padding_if_so_asked(corpus, caplog):
    ids = corpus.token_n.copy()
    ids[29] = 300
    sequences = Sequences(dataclasses.replace(corpus, token_n=ids, skip_corrupt=True), 8)
    assert _equal(sequences[3], sequences.padding())
    assert _equal(sequences[2], Sequences(corpus, 8)[2])
    assert "sequence 3 is padding instead: token id 300" in caplog.text


def test_a_tokenizer_larger_than_the_model(corpus):
    check_vocabulary(corpus, 257)
    with pytest.raises(
        ConfigError, match=r"has 257 ids, but model\.vocab_size=256;.*vocab_size=264"
    ):
        check_vocabulary(corpus, 256)
