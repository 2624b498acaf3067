"""Generation: the cached forward is the full one, greedy is the argmax, samples obey top-p."""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.attention import empty_cache, packed_tokens
from moejax.config import Config, ConfigError, ModelConfig, MoEConfig
from moejax.evaluate import dropless, with_moe
from moejax.generate import (
    added_text,
    cached_forward,
    generate,
    generate_workdir,
    make_generate,
    sample,
)
from moejax.state import model_graph
from moejax.tokenizer import load_tokenizer

V = 264
CONFIG = Config(
    model=ModelConfig(
        num_layers=2,
        d_model=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        dense_hidden=24,
        vocab_size=V,
    ),
    moe=MoEConfig(num_experts=8, expert_hidden=12, first_dense=1, capacity_factor=0.5),
)
DROPLESS = with_moe(CONFIG, dropless(CONFIG.moe))
B, WIDTH, MAX_TOKENS = 8, 8, 5
# Prompts of 7 and 3 tokens, 6 rows more; the last two rows are there to fill the mesh.
LENGTH_B = np.array([7, 3, 8, 1, 5, 2, 0, 0], np.int32)
PROMPT_BT = np.random.default_rng(0).integers(200, size=(B, WIDTH)).astype(np.int32)
PROMPT_BT[np.arange(WIDTH) >= LENGTH_B[:, None]] = 0
NO_END = V + 1  # an id that no model gives


@pytest.fixture(scope="module")
def params(mesh, params_of):
    return params_of(CONFIG, mesh)


@functools.cache
def _full_logits(mesh):
    """Returns the compiled forward without a cache: (params, tokens, lengths) -> logits."""
    graph = model_graph(DROPLESS, mesh)

    @jax.jit
    def run(params, token_bt, length_b):
        model = nnx.merge(graph, params)
        row = jnp.arange(token_bt.shape[1], dtype=jnp.int32)[None]
        segment_bt = (row < length_b[:, None]).astype(jnp.int32)
        return model.unembed(model(token_bt, packed_tokens(segment_bt), {})[0])

    return run


@functools.cache
def _greedy(mesh, end=NO_END):
    tokenizer = SimpleNamespace(end_of_document=end, vocab_size=V)
    return make_generate(CONFIG, mesh, MAX_TOKENS, 0, 1.0, tokenizer)


@pytest.fixture(scope="module")
def greedy_bt(mesh, params):
    return np.asarray(_greedy(mesh)(params, {}, PROMPT_BT, LENGTH_B, jax.random.key(0)))


def _continued(greedy_bt):
    """Returns prompts and continuations in one array; padding rows are 0."""
    text_bt = np.zeros((B, WIDTH + MAX_TOKENS), np.int32)
    for b, length in enumerate(LENGTH_B):
        if length == 0:
            continue
        text_bt[b, :length] = PROMPT_BT[b, :length]
        text_bt[b, length : length + MAX_TOKENS] = greedy_bt[b]
    return text_bt


def test_greedy_generation_is_the_argmax_of_the_full_forward(mesh, params, greedy_bt):
    text_bt = _continued(greedy_bt)
    logit_btv = np.asarray(_full_logits(mesh)(params, text_bt, LENGTH_B + MAX_TOKENS))
    for b, length in enumerate(LENGTH_B):
        if length:
            best = logit_btv[b, length - 1 : length - 1 + MAX_TOKENS].argmax(-1)
            np.testing.assert_array_equal(greedy_bt[b], best)
    assert len(set(greedy_bt[LENGTH_B > 0].ravel().tolist())) > 4


def test_cached_logits_are_the_full_forward_s(mesh, params, greedy_bt):
    """Prefill of prompts of 1 to 8 tokens, then a token at a time, each at its own position."""
    graph = model_graph(DROPLESS, mesh)

    @jax.jit
    def step(params, token_bt, position_bt, mask_bt, cache):
        model = nnx.merge(graph, params)
        hidden, cache = cached_forward(model, token_bt, position_bt, mask_bt, {}, cache)
        return model.unembed(hidden), cache

    text_bt = _continued(greedy_bt)
    expected = np.asarray(_full_logits(mesh)(params, text_bt, LENGTH_B + MAX_TOKENS))
    scale = np.abs(expected).max()
    position_bt = np.broadcast_to(np.arange(WIDTH, dtype=np.int32), (B, WIDTH))
    mask_bt = position_bt < LENGTH_B[:, None]
    cache = empty_cache(CONFIG, B, WIDTH + MAX_TOKENS)
    actual, cache = step(params, PROMPT_BT, position_bt, mask_bt, cache)
    for b, length in enumerate(LENGTH_B):
        np.testing.assert_allclose(
            actual[b, :length], expected[b, :length], atol=1e-5 * scale, rtol=0
        )
    real = np.flatnonzero(LENGTH_B)
    for i in range(MAX_TOKENS):
        position_b1 = (LENGTH_B + i)[:, None]
        token_b1 = np.take_along_axis(text_bt, position_b1, axis=1)
        actual, cache = step(params, token_b1, position_b1, (LENGTH_B > 0)[:, None], cache)
        rows = expected[real, LENGTH_B[real] + i]
        np.testing.assert_allclose(np.asarray(actual)[real, 0], rows, atol=1e-5 * scale, rtol=0)


def test_eight_devices_generate_what_one_does(mesh_of, params, greedy_bt):
    run = _greedy(mesh_of(1, 2, 4, 1))
    other_bt = np.asarray(run(params, {}, PROMPT_BT, LENGTH_B, jax.random.key(0)))
    np.testing.assert_array_equal(other_bt, greedy_bt)


def test_other_prompts_of_the_batch_change_nothing(mesh, params, greedy_bt):
    """At capacity 0.5 in training the rows would compete; generation is dropless."""
    prompt_bt = PROMPT_BT.copy()
    prompt_bt[1:] = prompt_bt[:1]
    run = _greedy(mesh)
    alone = np.asarray(run(params, {}, prompt_bt, np.where(LENGTH_B == 7, 7, 1), jax.random.key(0)))
    np.testing.assert_array_equal(alone[0], greedy_bt[0])


def test_after_the_end_token_a_row_holds_nothing_else(mesh, params, greedy_bt):
    """The third token of row 0 is declared the end: rows stop there, padding rows at once."""
    end = int(greedy_bt[0, 2])
    ended_bt = np.asarray(_greedy(mesh, end)(params, {}, PROMPT_BT, LENGTH_B, jax.random.key(0)))
    for b, length in enumerate(LENGTH_B):
        places = np.flatnonzero(greedy_bt[b] == end)
        stop = 0 if length == 0 else (places[0] if len(places) else MAX_TOKENS)
        np.testing.assert_array_equal(ended_bt[b, :stop], greedy_bt[b, :stop])
        np.testing.assert_array_equal(ended_bt[b, stop:], end)


LOGIT_BV = np.log(np.array([[0.1, 0.5, 0.3, 0.1]], np.float32))


@functools.cache
def _draws(temperature, top_p):
    """Returns how often each of four tokens is drawn in 4000 times."""
    rows = np.repeat(LOGIT_BV, 4000, axis=0)
    draw = jax.jit(functools.partial(sample, temperature=temperature, top_p=top_p))
    return np.bincount(np.asarray(draw(jax.random.key(0), rows)), minlength=4) / 4000


def test_sampling_follows_the_probabilities():
    """Four thousand draws: a standard error below 0.008."""
    np.testing.assert_allclose(_draws(1.0, 1.0), [0.1, 0.5, 0.3, 0.1], atol=0.03)


def test_temperature_sharpens_and_0_takes_the_best():
    squared = np.array([0.01, 0.25, 0.09, 0.01]) / 0.36
    np.testing.assert_allclose(_draws(0.5, 1.0), squared, atol=0.03)
    np.testing.assert_array_equal(_draws(0, 1.0), [0, 1, 0, 0])


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    """0.5 alone reaches 0.4; 0.5 and 0.3 reach 0.7; what is kept keeps its proportions."""
    np.testing.assert_array_equal(_draws(1.0, 0.4), [0, 1, 0, 0])
    np.testing.assert_allclose(_draws(1.0, 0.7), [0, 5 / 8, 3 / 8, 0], atol=0.03)


def test_top_p_acts_after_the_temperature():
    """At temperature 1/4 the best token has 0.87 of the mass, so it alone reaches 0.7."""
    np.testing.assert_array_equal(_draws(0.25, 0.7), [0, 1, 0, 0])


def test_top_p_counts_equal_tokens_one_by_one():
    """Of four alike two reach one half, not all four because they tie."""
    rows = np.zeros((200, 4), np.float32)
    drawn = sample(jax.random.key(0), rows, 1.0, 0.5)
    assert set(np.asarray(drawn).tolist()) == {0, 1}


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_tiny_temperature_takes_the_best(top_p):
    rows = jnp.array([[30.0, 10.0, 31.0, -5.0]] * 50, jnp.float32)
    drawn = sample(jax.random.key(0), rows, 1e-38, top_p)
    np.testing.assert_array_equal(drawn, [2] * 50)


def test_a_continuation_keeps_the_space_before_its_first_word():
    class Words:
        """As SentencePiece: a space before each word, and none before a text."""

        end_of_document = 9

        def decode(self, ids):
            return "".join(f" w{i}" for i in ids)[1:]

    prompt = np.array([1, 2])
    assert added_text(Words(), prompt, np.array([3, 4, 9, 9])) == " w3 w4"
    assert added_text(Words(), prompt, np.array([9, 9])) == ""


@pytest.fixture(scope="module")
def texts(mesh_of, params):
    """The default sampling of three prompts on eight devices, which are padded to eight rows."""
    mesh = mesh_of(2, 1, 4, 1)
    run = functools.partial(generate, CONFIG, mesh, params, {}, max_tokens=4)
    return run, run(["a", "bcd", "é"], seed=1)


def test_prompts_are_padded_to_the_mesh_and_text_comes_back(texts):
    _, continuations = texts
    assert len(continuations) == 3
    assert all(isinstance(text, str) for text in continuations)


def test_equal_seeds_give_equal_text(texts):
    run, continuations = texts
    assert run(["a", "bcd", "é"], seed=1) == continuations
    assert run(["a", "bcd", "é"], seed=2) != continuations


def test_prompts_longer_than_training_saw_are_said(monkeypatch, caplog):
    monkeypatch.setattr("moejax.generate.restore_for_use", MagicMock())
    monkeypatch.setattr("moejax.generate.generate", lambda *args: ["text"])
    longest = CONFIG.data.sequence_length - 4

    def run(*prompts):
        generate_workdir(CONFIG, Path("x"), None, prompts, 4, 0.8, 0.95, 0)

    run("a" * longest)
    assert not caplog.records
    run("a" * (longest + 1), "b")
    (record,) = caplog.records
    assert f"a prompt of {longest + 1} tokens and 4 new ones" in record.getMessage()


def test_no_prompt_and_an_empty_prompt_are_refused(texts):
    run, _ = texts
    with pytest.raises(ConfigError, match="there is no prompt; give --prompt TEXT"):
        run([])
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        run(["a", ""])


def test_generation_is_dropless_whatever_the_training():
    assert DROPLESS.moe.capacity_factor is None
    oracle = dataclasses.replace(CONFIG.moe, transport="reference")
    assert dropless(oracle).transport == "reference"
    assert load_tokenizer("bytes").end_of_document < V


def test_a_prompt_is_its_own_capacity_group(mesh, monkeypatch):
    """Groups of the training would have to be filled with prompts, which then share experts."""
    moe = {"router": "expert_choice", "capacity_factor": None, "allow_noncausal": True}
    config = with_moe(CONFIG, dataclasses.replace(CONFIG.moe, group_sequences=16, **moe))
    seen = []
    monkeypatch.setattr("moejax.generate.model_graph", lambda config, _: seen.append(config.moe))
    make_generate(config, mesh, 1, 0, 1.0, load_tokenizer("bytes"))
    assert (seen[0].group_sequences, seen[0].router) == (1, "expert_choice")


def test_prompts_that_cannot_be_are_refused_before_anything_is_compiled(texts, monkeypatch):
    run, _ = texts
    with pytest.raises(ConfigError, match=r"prompt 1 is not UTF-8: 'x\\udcff'; convert it"):
        run(["a", "x\udcff"])
    monkeypatch.setattr("moejax.generate.make_generate", None)
    with pytest.raises(ConfigError, match=r"8 prompts of up to 1073741856 tokens.* take \d.*GiB"):
        run(["a"], max_tokens=2**30)
