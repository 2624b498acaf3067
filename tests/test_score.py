"""Log-likelihoods of requests in padded rows, held to a forward pass of each request alone."""

import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from moejax.attention import packed_tokens
from moejax.config import Config, ConfigError, DataConfig, ModelConfig, MoEConfig, TrainConfig
from moejax.evaluate import Restored, dropless, with_moe
from moejax.score import Request, Sampling, Scorer, _Rows, _widths, _windows
from moejax.sharding import place_batch
from moejax.state import model_graph

T = 128
CONFIG = Config(
    model=ModelConfig(
        num_layers=2,
        d_model=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        dense_hidden=24,
        vocab_size=264,
    ),
    moe=MoEConfig(num_experts=8, expert_hidden=12, first_dense=1, capacity_factor=0.5),
    data=DataConfig(sequence_length=T),
    train=TrainConfig(batch_size=2),
)
UNIFORM = -math.log(257)  # of a byte or the end of a document that nothing predicts


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=length).astype(np.int32)


@pytest.fixture(scope="module")
def params(mesh, params_of):
    return params_of(CONFIG, mesh)


@pytest.fixture(scope="module")
def scorer(mesh, params):
    return Scorer(CONFIG, Restored(mesh, 0, params, {}, {}))


@functools.cache
def _forward(mesh):
    graph = model_graph(with_moe(CONFIG, dropless(CONFIG.moe)), mesh)

    @jax.jit
    def run(params, token_bt):
        model = nnx.merge(graph, params)
        out = model(token_bt, packed_tokens(np.ones(token_bt.shape, np.int32)), {})
        return model.unembed(out.hidden_btd)

    return run


def direct(mesh, params, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns log-probabilities of ids[1:] and whether each is the best of 257, without padding."""
    logit_tv = np.asarray(_forward(mesh)(params, ids[None, :-1])[0], np.float64)
    log_sum_t = np.log(np.exp(logit_tv).sum(1))
    picked_t = np.take_along_axis(logit_tv, ids[1:, None], 1)[:, 0]
    return picked_t - log_sum_t, logit_tv[:, :257].argmax(1) == ids[1:]


# lengths of context and continuation; rows of 18, 32 and 128 ids on widths 32 and 128
SHAPES = [(9, 10), (18, 1), (1, 32), (29, 4), (100, 29), (0, 19), (0, 33), (0, 1), (19, 0)]


def test_padded_rows_score_as_each_request_alone(mesh, params, scorer):
    requests = [Request(text(a, a), text(b, 100 + b)) for a, b in SHAPES]
    scores = scorer.score(requests)
    for (a, b), request, score in zip(SHAPES, requests, scores, strict=True):
        ids = np.concatenate(request)
        expected = UNIFORM if a == 0 else 0.0
        if len(ids) > 1:
            expected += direct(mesh, params, ids)[0][max(a - 1, 0) :][:b].sum()
        assert score.log_likelihood == pytest.approx(expected, rel=1e-5), (a, b)
        assert not score.greedy or b == 0
    assert scorer.cut_contexts == 0
    assert scores[0].log_likelihood != scores[1].log_likelihood


def test_requests_in_the_same_batch_change_nothing(scorer):
    """At capacity 0.5 in training the rows would compete; alone is as in company."""
    requests = [Request(text(a, a), text(b, 100 + b)) for a, b in SHAPES]
    together = scorer.score(requests)
    alone = [scorer.score([request])[0] for request in requests[:4]]
    for one, other in zip(alone, together, strict=False):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-6)


def test_the_same_on_eight_devices(mesh_of, params, scorer):
    wide = Scorer(CONFIG, Restored(mesh_of(1, 2, 2, 2), 0, params, {}, {}))
    requests = [Request(text(3, 1), text(3, 2)), Request(text(0), text(20, 3))]
    for one, other in zip(scorer.score(requests), wide.score(requests), strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-5)
        assert one.greedy == other.greedy


def _score_rows(scorer, tokens, segments, scored):
    rows = _Rows(tokens[:, :-1], tokens[:, 1:], segments, scored[:, 1:])
    batch = place_batch(scorer._restored.mesh, lambda a, b: _Rows(*(x[a:b] for x in rows)), 8, 1)
    nats, _ = scorer._score(scorer._restored.params, {}, batch)
    return np.asarray(nats)


def test_what_stands_in_padding_or_in_another_document_changes_nothing(scorer):
    """20 ids alone; before padding of other ids; and as the second document of a row."""
    ids, size = text(21), scorer._rows(32)
    assert size == 8
    tokens, scored = np.zeros((size, 33), np.int32), np.zeros((size, 33), bool)
    segments = np.zeros((size, 32), np.int32)
    tokens[:3, :21], segments[:3, :20], scored[:3, 1:21] = ids, 1, True
    tokens[1, 21:] = text(12, 7)
    tokens[2], segments[2], scored[2] = 0, 0, False
    tokens[2, 12:33], segments[2, 12:32], scored[2, 13:33] = ids, 2, True
    tokens[2, :12], segments[2, :12] = text(12, 8), 1
    nats = _score_rows(scorer, tokens, segments, scored)
    assert nats[0] > 50
    assert nats[1] == nats[0]
    assert nats[2] == pytest.approx(nats[0], rel=1e-6)
    segments[2, :12] = 2  # one document: now it does matter
    joined = _score_rows(scorer, tokens, segments, scored)
    assert abs(joined[2] - nats[0]) > 1e-3


def test_greedy_is_said_of_what_greedy_decoding_gives(mesh, params, scorer):
    ids = list(text(6, 5))
    for _ in range(4):  # the forward pass of 18 ids: later ones are not seen
        row = np.array(ids + [0] * (18 - len(ids)), np.int32)
        logit_v = np.asarray(_forward(mesh)(params, row[None])[0, len(ids) - 1])
        ids.append(int(logit_v[:257].argmax()))
    context, best = np.array(ids[:6]), np.array(ids[6:])
    worse = best.copy()
    worse[-1] = (worse[-1] + 1) % 256
    said = [s.greedy for s in scorer.score([Request(context, best), Request(context, worse)])]
    assert said == [True, False]
    (found,) = scorer.generate([context], Sampling(4))
    assert found == scorer.tokenizer.decode([b for b in best if b < 256])


def test_ids_that_the_tokenizer_lacks_are_never_the_best(mesh, params, scorer):
    """The vocabulary of 264 has 7 ids behind those of the tokenizer."""
    found, ids = False, text(129, 9)
    logit_tv = np.asarray(_forward(mesh)(params, ids[None, :-1])[0])
    for position in np.flatnonzero(logit_tv.argmax(1) >= 257):
        best = logit_tv[position, :257].argmax(keepdims=True).astype(np.int32)
        (score,) = scorer.score([Request(ids[: position + 1], best)])
        assert score.greedy
        found = True
    assert found


def test_whole_texts_count_each_id_once_in_full_windows(mesh, params, scorer):
    """200 ids: the first 129 in one window, the last 71 at the end of a full one."""
    short, long = text(129, 1), text(200, 2)
    totals = scorer.score_text([short, long, short[:0], short[:1]])
    expected = UNIFORM + direct(mesh, params, short)[0].sum()
    assert totals[0] == pytest.approx(expected, rel=1e-5)
    first, last = direct(mesh, params, long[:129])[0], direct(mesh, params, long[71:])[0]
    assert totals[1] == pytest.approx(UNIFORM + first.sum() + last[-71:].sum(), rel=1e-5)
    assert totals[2:] == [0.0, pytest.approx(UNIFORM)]


@pytest.mark.parametrize("length", [0, 1, 2, 8, 9, 10, 16, 17, 18, 40])
def test_windows_cover_a_text_once(length):
    windows = _windows(length, 8)
    assert [i for start, stop in windows for i in range(start, stop)] == list(range(length))
    assert all(stop - start <= 9 - (start > 0) for start, stop in windows)


def test_few_widths():
    assert _widths(4096, 1) == (64, 256, 1024, 4096)
    assert _widths(130, 8) == (40, 130)
    assert _widths(16, 1) == (16,)


def test_a_context_that_does_not_fit_loses_its_beginning_and_is_counted(mesh, params):
    scorer = Scorer(CONFIG, Restored(mesh, 0, params, {}, {}))
    long, rest = text(150, 3), text(29, 4)
    cut, fits = scorer.score([Request(long, rest), Request(long[-100:], rest)])
    assert cut == fits
    assert scorer.cut_contexts == 1
    with pytest.raises(ConfigError, match=r"129 tokens is longer than data.sequence_length=128"):
        scorer.score([Request(text(2), text(129))])
    with pytest.raises(ConfigError, match="128 new tokens leave no room for a prompt"):
        scorer.generate([text(2)], Sampling(128))
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        scorer.generate([text(2), text(0)], Sampling(4))


def test_what_is_compiled_does_not_depend_on_the_requests(scorer):
    assert scorer._score._cache_size() == len(scorer.widths) == 2
    assert scorer._by_width([0, 32, 33, *[5] * 8]) == [
        (32, [0, 1, *range(3, 9)]),
        (32, [9, 10]),
        (128, [2]),
    ]
