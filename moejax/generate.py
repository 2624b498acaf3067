"""Generation: one jitted loop over a key/value cache, several prompts at once, dropless.

Prompts are padded on the right. A generated token takes the cache row of its own position, over the
padding that prefill left there, and a query sees rows up to its own position only: padding is never
seen.
"""

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moejax.attention import Cache, Tokens, empty_cache
from moejax.config import Config, ConfigError
from moejax.errors import require
from moejax.evaluate import dropless, restore_for_use, with_moe
from moejax.mesh import memory_bytes, mesh_config
from moejax.model import Decoder
from moejax.sharding import replicated
from moejax.state import model_graph
from moejax.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger("moejax")

PROMPT_MULTIPLE = 32  # prompts are padded to a multiple of it, so that few lengths are compiled


def cached_forward(
    model: Decoder,
    token_bt: jax.Array,
    position_bt: jax.Array,
    mask_bt: jax.Array,
    router_state: dict[str, jax.Array],
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """Runs tokens [B, T] at their positions on the cache; returns hidden states and new cache."""
    tokens = Tokens(position_bt, None, mask_bt)
    out = model(token_bt, tokens, router_state, cache)
    assert out.cache is not None
    return out.hidden_btd, out.cache


def sample(key: jax.Array, logit_bv: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """Draws a token of each row, int32 [B], by nucleus sampling (Holtzman et al. 2020).

    It draws, after the temperature, from the fewest tokens whose probabilities reach `top_p`.
    Temperature 0 takes the best.
    """
    if temperature == 0:
        return jnp.argmax(logit_bv, axis=-1).astype(jnp.int32)
    # the best is 0, so that no temperature makes an infinity of two
    logit_bv = (logit_bv - logit_bv.max(axis=-1, keepdims=True)) / temperature
    if top_p < 1:  # else none is left out, and nothing has to be sorted
        order_bv = jnp.argsort(logit_bv, axis=-1, descending=True)
        rank_bv = jnp.argsort(order_bv, axis=-1)  # of equals the first counts as better
        probability_bv = jax.nn.softmax(jnp.take_along_axis(logit_bv, order_bv, axis=-1), axis=-1)
        before_bv = jnp.cumsum(probability_bv, axis=-1) - probability_bv
        last_b1 = jnp.sum(before_bv < top_p, axis=-1, keepdims=True) - 1
        logit_bv = jnp.where(rank_bv <= jnp.maximum(last_b1, 0), logit_bv, -jnp.inf)
    return jax.random.categorical(key, logit_bv, axis=-1).astype(jnp.int32)


def make_generate(
    config: Config,
    mesh: Mesh,
    max_tokens: int,
    temperature: float,
    top_p: float,
    tokenizer: Tokenizer,
):
    """Makes the jitted `(params, router_state, prompt_bt, length_b, key) -> int32 [B, max_tokens]`.

    Rows of length 0 are padding. After the end of a document a row is filled with that id. An id
    that the tokenizer does not have, where the vocabulary was rounded up, is never drawn.
    """
    end, known = tokenizer.end_of_document, tokenizer.vocab_size
    # Each prompt is a group by itself: no other one has a part in its experts.
    config = with_moe(config, dataclasses.replace(dropless(config.moe), group_sequences=1))
    graph = model_graph(config, mesh)

    @partial(jax.jit, out_shardings=replicated(mesh))
    def generate(params, router_state, prompt_bt, length_b, key):
        model = nnx.merge(graph, params)
        batch, width = prompt_bt.shape
        position_bt = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), prompt_bt.shape)
        real_b = length_b > 0
        forward = partial(cached_forward, router_state=router_state)
        hidden_btd, cache = forward(
            model,
            prompt_bt,
            position_bt,
            position_bt < length_b[:, None],
            cache=empty_cache(config, batch, width + max_tokens),
        )
        last_b11 = jnp.maximum(length_b - 1, 0)[:, None, None]
        last_b1d = jnp.take_along_axis(hidden_btd, last_b11, axis=1)

        def step(carry, index):
            hidden_b1d, cache, done_b = carry
            logit_bv = model.unembed(hidden_b1d)[:, 0, :known]
            token_b = sample(jax.random.fold_in(key, index), logit_bv, temperature, top_p)
            token_b = jnp.where(done_b, end, token_b)
            done_b = done_b | (token_b == end)
            hidden_b1d, cache = forward(
                model, token_b[:, None], (length_b + index)[:, None], real_b[:, None], cache=cache
            )
            return (hidden_b1d, cache, done_b), token_b

        start = (last_b1d, cache, ~real_b)
        _, token_nb = jax.lax.scan(step, start, jnp.arange(max_tokens, dtype=jnp.int32))
        return token_nb.T

    return generate


def generate(
    config: Config,
    mesh: Mesh,
    params: Any,
    router_state: dict[str, jax.Array],
    prompts: Sequence[str],
    max_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> list[str]:
    """Returns the continuation of each prompt, without the prompt.

    Raises:
        ConfigError: no prompt, or one without a token.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    ids = encode_prompts(tokenizer, prompts)
    longest = max(map(len, ids))
    width = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    shards = mesh_config(mesh).token_shards
    rows = -(-len(ids) // shards) * shards
    _check_room(config, rows, width + max_tokens)
    prompt_bt = np.zeros((rows, width), np.int32)
    length_b = np.zeros(rows, np.int32)
    for row, tokens in enumerate(ids):
        prompt_bt[row, : len(tokens)] = tokens
        length_b[row] = len(tokens)
    run = make_generate(config, mesh, max_tokens, temperature, top_p, tokenizer)
    out_bt = np.asarray(run(params, router_state, prompt_bt, length_b, jax.random.key(seed)))
    return [added_text(tokenizer, *pair) for pair in zip(ids, out_bt, strict=False)]


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of each prompt; raises as `generate` does."""
    for number, prompt in enumerate(prompts):
        if any("\ud800" <= char <= "\udfff" for char in prompt):  # bytes of the command line
            raise ConfigError(f"prompt {number} is not UTF-8: {prompt[:40]!r}; convert it")
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    for number, tokens in enumerate(ids):
        if len(tokens) == 0:
            raise ConfigError(f"prompt {number} is empty; give at least one character to continue")
    if not ids:
        raise ConfigError("there is no prompt; give --prompt TEXT or --prompts FILE")
    return ids


def _check_room(config: Config, rows: int, length: int) -> None:
    """Refuses prompts and continuations whose keys and values the devices could not hold."""
    cache = jax.eval_shape(lambda: empty_cache(config, rows, 1))
    needed = length * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    there = memory_bytes()
    require(
        needed <= there,
        f"keys and values of {rows} prompts of up to {length} tokens, including those to generate, "
        f"take {needed / 2**30:,.1f} GiB, but the devices have {there / 2**30:,.1f}; give fewer or "
        "shorter prompts, or a smaller --max_tokens",
    )


def added_text(tokenizer: Tokenizer, prompt_n: np.ndarray, row: np.ndarray) -> str:
    """Returns the text that a generated row adds to a prompt, up to the end of the document.

    Alone, ids can lose what they say in their place: the space before a word, in SentencePiece.
    """
    ends = np.flatnonzero(row == tokenizer.end_of_document)
    row = row[: ends[0]] if len(ends) else row
    before = tokenizer.decode(prompt_n)
    whole = tokenizer.decode(np.concatenate([prompt_n, row]))
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(row)


def generate_workdir(
    config: Config,
    workdir: Path,
    step: int | None,
    prompts: Sequence[str],
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[str]:
    """Continues prompts with a checkpoint of a run; see `generate`.

    Prompts that the model continues beyond what it saw at once in training are said.
    """
    longest = max(map(len, encode_prompts(load_tokenizer(config.data.tokenizer), prompts)))
    trained = config.data.sequence_length
    if longest + max_tokens > trained:
        log.warning(
            "a prompt of %d tokens and %d new ones are longer than data.sequence_length=%d, all "
            "that the model saw at once in training; use shorter prompts or a smaller --max_tokens",
            longest,
            max_tokens,
            trained,
        )
    restored = restore_for_use(config, workdir, step)
    return generate(
        config,
        restored.mesh,
        restored.params,
        restored.router_state,
        prompts,
        max_tokens,
        temperature,
        top_p,
        seed,
    )
