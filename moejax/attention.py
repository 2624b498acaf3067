"""Attention: grouped-query with RoPE over packed documents, its cache, and what layers share.

`latent.py` has the other kind.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.attend import Sight, attend
from moejax.config import Config, ModelConfig
from moejax.mesh import AnyMesh
from moejax.sharding import constrain_tokens, gathered


class Cache(NamedTuple):
    """Past keys and values, for generation: [L, B, T, N, K], or one layer's [B, T, N, K].

    Of latent attention: the RoPE part of the key, which all heads share, and the latent that the
    rest of the keys and the values are made of, each with N = 1.
    """

    key: jax.Array
    value: jax.Array


class Tokens(NamedTuple):
    """What every layer needs to know of the tokens besides their vectors.

    Attributes:
        position_bt: int32 [B, T], or [1, T] where all rows have the same: for RoPE and, with a
            cache, the row of the cache that a token is written to.
        segment_bt: int32; the document of each token, which attends to no other one. None with a
            cache, whose rows hold one document each.
        mask_bt: bool; False for padding.
        key_b: uint32 [B, 2]; random key data of each sequence, for routers that draw; None where
            nothing is random, as in evaluation.
        layer: number of the layer that reads them, which decides whether it has a window.
        causal: False for an encoder, whose tokens attend to later ones too.
    """

    position_bt: jax.Array
    segment_bt: jax.Array | None
    mask_bt: jax.Array
    key_b: jax.Array | None = None
    layer: jax.Array | int = 0
    causal: bool = True


def packed_tokens(segment_bt: jax.Array, key_b: jax.Array | None = None) -> Tokens:
    """Returns `Tokens` of packed sequences: causal inside each document; segment 0 is padding."""
    position_t = jnp.arange(segment_bt.shape[1], dtype=jnp.int32)
    return Tokens(position_t[None], segment_bt, segment_bt > 0, key_b)


def empty_cache(config: Config, batch: int, length: int) -> Cache:
    """Returns a cache of zeros for `length` tokens of `batch` sequences."""
    model = config.model
    grouped = (model.num_kv_heads, model.head_dim)
    key, value = grouped, grouped
    if model.attention == "latent":
        key, value = (1, model.qk_rope_head_dim), (1, model.kv_lora_rank)
    rows = (model.num_layers, batch, length)
    return Cache(jnp.zeros((*rows, *key), model.dtype), jnp.zeros((*rows, *value), model.dtype))


def write_cache(cache: Cache, key: jax.Array, value: jax.Array, tokens: Tokens) -> Cache:
    """Returns one layer's cache with keys and values [B, T, N, K] at the tokens' positions."""
    row_b1 = jnp.arange(key.shape[0])[:, None]
    key = cache.key.at[row_b1, tokens.position_bt].set(key, mode="drop")
    value = cache.value.at[row_b1, tokens.position_bt].set(value, mode="drop")
    return Cache(key, value)


def sight(model: ModelConfig, tokens: Tokens) -> Sight:
    """Returns which keys the queries of this layer see."""
    every = model.full_attention_every
    whole = None if every is None else (tokens.layer + 1) % every == 0
    return Sight(
        tokens.position_bt, tokens.segment_bt, model.attention_window, whole, tokens.causal
    )


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: str, scale: float = 1.0):
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * (scale / fan_in**0.5))


def zeros(shape: tuple[int, ...], dtype: str):
    return nnx.Param(jnp.zeros(shape, dtype))


def output_scale(model: ModelConfig) -> float:
    return (2 * model.num_layers) ** -0.5


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, dtype: str):
        self.scale = nnx.Param(jnp.ones(width, dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + 1e-6)
        scale = self.scale[...].astype(jnp.float32)
        return (x32 * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


def rope(x_bthk: jax.Array, position_bt: jax.Array, theta: float) -> jax.Array:
    """Rotates pairs (i, i + K/2) by position * theta^(-2i/K), in float32 (Su et al. 2021)."""
    half = x_bthk.shape[-1] // 2
    frequency_k = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_btk = position_bt[..., None].astype(jnp.float32) * frequency_k[None, None]
    sin, cos = jnp.sin(angle_btk)[:, :, None], jnp.cos(angle_btk)[:, :, None]
    left, right = jnp.split(x_bthk.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x_bthk.dtype)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023), RoPE, and optional RMS norm of q and k.

    Biases and sinks start at 0. A sink is a logit beside those of the keys: a head can attend to
    nothing (gpt-oss, arXiv:2508.10925).
    """

    def __init__(self, config: Config, mesh: AnyMesh, *, rngs: nnx.Rngs):
        model = config.model
        self.config, self.mesh = model, mesh
        d, h, n, k = model.d_model, model.num_heads, model.num_kv_heads, model.head_dim
        self.query = normal(rngs, (d, h, k), d, model.param_dtype)
        self.key = normal(rngs, (d, n, k), d, model.param_dtype)
        self.value = normal(rngs, (d, n, k), d, model.param_dtype)
        self.output = normal(rngs, (h, k, d), h * k, model.param_dtype, output_scale(model))
        if model.qk_norm:
            self.query_norm = RMSNorm(k, model.param_dtype)
            self.key_norm = RMSNorm(k, model.param_dtype)
        if model.attention_bias:
            self.query_bias = zeros((h, k), model.param_dtype)
            self.key_bias = zeros((n, k), model.param_dtype)
            self.value_bias = zeros((n, k), model.param_dtype)
            self.output_bias = zeros((d,), model.param_dtype)
        if model.attention_sinks:
            self.sinks = zeros((h,), model.param_dtype)

    def __call__(
        self, x_btd: jax.Array, tokens: Tokens, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Returns [B, T, D] and the cache with this call's keys and values written to it."""

        model, dtype = self.config, x_btd.dtype

        def weight(name: str) -> jax.Array:
            return gathered(getattr(self, name)[...], f"attention/{name}", self.mesh, dtype)

        def project(name: str) -> jax.Array:
            heads = jnp.einsum("btd,dhk->bthk", x_btd, weight(name))
            if model.attention_bias:
                heads += getattr(self, f"{name}_bias")[...].astype(dtype)[None, None]
            return constrain_tokens(heads, self.mesh, heads=True)

        q, k, v = project("query"), project("key"), project("value")
        if model.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q = rope(q, tokens.position_bt, model.rope_theta)
        k = rope(k, tokens.position_bt, model.rope_theta)
        if cache is not None:
            k, v = cache = write_cache(cache, k, v, tokens)
        sink_h = self.sinks[...] if model.attention_sinks else None
        mixed = attend(q, k, v, sight(model, tokens), sink_h, self.mesh)
        out = jnp.einsum("bthk,hkd->btd", mixed, weight("output"))
        if model.attention_bias:
            out += self.output_bias[...].astype(dtype)[None, None]
        return constrain_tokens(out, self.mesh), cache
