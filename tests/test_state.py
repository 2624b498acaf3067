"""The state before the first step: its router state, and that it depends on the seed alone."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax import loop
from moejax.config import Config, ConfigError, DataConfig, ModelConfig, MoEConfig
from moejax.corpus import load_corpus
from moejax.optim import make_optimizer
from moejax.router_state import hash_table, initial_router_state
from moejax.state import abstract_state, initial_state, require_room

V = 24
CONFIG = Config(
    model=ModelConfig(
        num_layers=2, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=V
    ),
    moe=MoEConfig(num_experts=4, expert_hidden=8, router="hash", top_k=1, capacity_factor=None),
)
# The first ids are frequent, as in text; one of them has half of all tokens.
COUNTS = np.array([500, 200, 100, 50, 30, 20, *[5] * 15, 0, 0, 0])


@pytest.fixture(scope="module")
def states(mesh):
    """With and without the corpus's counts; the model's weights take long to compile."""
    optimizer = make_optimizer(CONFIG.optim, CONFIG.train.steps)
    return [initial_state(CONFIG, mesh, optimizer, counts) for counts in (COUNTS, None)]


def _loads(table_lvs: jax.Array) -> np.ndarray:
    """Returns [L, E]: the share of the corpus's tokens that each expert gets."""
    loads = [np.bincount(np.asarray(t)[:, 0], weights=COUNTS, minlength=4) for t in table_lvs]
    return np.array(loads) / COUNTS.sum()


def test_the_hash_table_of_a_training_balances_the_tokens_of_its_corpus(states):
    """The most frequent token is half of all, the next a fifth: the other two share the rest."""
    counted, plain = (state.router_state["table"] for state in states)
    assert counted.shape == plain.shape == (2, V, 1)
    weights = tuple(int(count) + 1 for count in COUNTS)
    for layer in range(2):
        np.testing.assert_array_equal(counted[layer], hash_table(weights, CONFIG.moe, layer))
    assert (_loads(counted).min(-1) > 0.13).all()
    assert (_loads(plain).min(-1) < 0.1).all()


@pytest.mark.parametrize("router", ["hash", "softmax"])
def test_a_training_counts_the_tokens_of_its_text_for_the_router_that_needs_them(
    router, mesh, monkeypatch
):
    monkeypatch.setattr(loop, "initial_state", lambda config, mesh, optimizer, counts: counts)
    config = Config(moe=MoEConfig(num_experts=8, top_k=2, expert_hidden=8, router=router))
    corpus = load_corpus(config.data, "train")
    counts = loop.first_state(config, mesh, corpus)
    if router == "softmax":
        assert counts is None
    else:
        np.testing.assert_array_equal(counts, corpus.token_counts(config.model.vocab_size))


def test_counts_of_the_corpus_are_of_every_id():
    corpus = load_corpus(DataConfig(), "train")
    counts = corpus.token_counts(300)
    assert counts.shape == (300,)
    assert counts.sum() == len(corpus.token_n)
    np.testing.assert_array_equal(counts[257:], 0)
    space = ord(" ")
    assert counts[space] == (corpus.token_n == space).sum() > 0


@pytest.mark.parametrize("router", ["sigmoid_bias", "quantile", "threshold", "relu", "softmax"])
def test_shapes_of_the_router_state_are_those_of_the_state(mesh, router):
    """The state's, as a checkpoint is restored into it, is that of `initial_router_state`."""
    config = dataclasses.replace(
        CONFIG, moe=dataclasses.replace(CONFIG.moe, router=router, normalize_weights=True, top_k=2)
    )
    optimizer = make_optimizer(config.optim, config.train.steps)
    expected = initial_router_state(config.moe, config.num_moe_layers, V)
    found = abstract_state(config, mesh, optimizer).router_state
    assert {n: (s.shape, s.dtype) for n, s in found.items()} == {
        n: (s.shape, s.dtype) for n, s in expected.items()
    }
    assert bool(found) == (router != "softmax")


def test_a_model_that_no_memory_holds_is_refused():
    """JAX would abort, or the system would end a process of its choice."""
    require_room(Config())
    huge = Config(model=ModelConfig(vocab_size=2**31 - 8, d_model=2**20))
    with pytest.raises(ConfigError, match=r"parameters take [\d,]+ GiB, but all devices together"):
        require_room(huge)
