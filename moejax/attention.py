"""Attention: grouped-query with RoPE over packed documents, its cache, and what layers share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import Config, ModelConfig
from moejax.mesh import AnyMesh
from moejax.sharding import constrain_tokens


class Cache(NamedTuple):
    """Past keys and values, for generation: [L, B, T, N, K], or one layer's [B, T, N, K]."""

    key: jax.Array
    value: jax.Array


class Tokens(NamedTuple):
    """What every layer needs to know of the tokens besides their vectors.

    Attributes:
        position_bt: int32 [B, T], or [1, T] where all rows have the same: for RoPE and, with a
            cache, the row of the cache that a token is written to.
        attend_bqt: bool [B, T, T or cache length]; which keys each query may see.
        mask_bt: bool; False for padding.
        key_b: uint32 [B, 2]; random key data of each sequence, for routers that draw; None where
            nothing is random, as in evaluation.
    """

    position_bt: jax.Array
    attend_bqt: jax.Array
    mask_bt: jax.Array
    key_b: jax.Array | None = None


def packed_tokens(segment_bt: jax.Array, key_b: jax.Array | None = None) -> Tokens:
    """Returns `Tokens` of packed sequences: causal inside each document; segment 0 is padding."""
    length = segment_bt.shape[1]
    position_t = jnp.arange(length, dtype=jnp.int32)
    causal_qt = position_t[:, None] >= position_t[None, :]
    same_bqt = segment_bt[:, :, None] == segment_bt[:, None, :]
    return Tokens(position_t[None], same_bqt & causal_qt[None], segment_bt > 0, key_b)


def empty_cache(config: Config, batch: int, length: int) -> Cache:
    """Returns a cache of zeros for `length` tokens of `batch` sequences."""
    model = config.model
    shape = (model.num_layers, batch, length, model.num_kv_heads, model.head_dim)
    return Cache(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: str, scale: float = 1.0):
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * (scale / fan_in**0.5))


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
    """Grouped-query attention (Ainslie et al. 2023), RoPE, and optional RMS norm of q and k."""

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

    def __call__(
        self, x_btd: jax.Array, tokens: Tokens, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Returns [B, T, D] and the cache with this call's keys and values written to it."""

        def project(w):
            heads = jnp.einsum("btd,dhk->bthk", x_btd, w[...].astype(x_btd.dtype))
            return constrain_tokens(heads, self.mesh, heads=True)

        q, k, v = project(self.query), project(self.key), project(self.value)
        if self.config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        q = rope(q, tokens.position_bt, self.config.rope_theta)
        k = rope(k, tokens.position_bt, self.config.rope_theta)
        if cache is not None:
            row_b1 = jnp.arange(k.shape[0])[:, None]
            k = cache.key.at[row_b1, tokens.position_bt].set(k, mode="drop")
            v = cache.value.at[row_b1, tokens.position_bt].set(v, mode="drop")
            cache = Cache(k, v)
        mixed = _attend(q, k, v, tokens.attend_bqt)
        out = jnp.einsum("bthk,hkd->btd", mixed, self.output[...].astype(x_btd.dtype))
        return constrain_tokens(out, self.mesh), cache


@jax.checkpoint
def _attend(q, k, v, attend_bqt):
    """Softmax attention; the backward pass recomputes the B * H * T * T scores, none is kept."""
    return jax.nn.dot_product_attention(q, k, v, mask=attend_bqt[:, None])
