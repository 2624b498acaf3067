"""The decoder: RMSNorm, grouped-query attention with RoPE, SwiGLU or MoE, in scanned layers.

Layers live in two stacks: `prefix` holds the first dense layers, `runs` the rest, each run being
`moe.every - 1` dense layers and one MoE layer. A stack is one block whose parameters have a leading
layer dim, and one scan, so compile time does not grow with depth.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import Config, ModelConfig
from moejax.experts import swiglu
from moejax.mesh import AnyMesh
from moejax.moe import MoE
from moejax.router_stats import RouterStats
from moejax.routing import RouterInputs
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


class Outputs(NamedTuple):
    """What the decoder gives.

    Attributes:
        hidden_btd: after the last norm.
        stats: routing sums with a leading dim of MoE layers; None for a dense model.
        cache: keys and values, if a cache was given.
        choice_lbts: int32; the experts that tokens chose in each MoE layer, for replay.
    """

    hidden_btd: jax.Array
    stats: RouterStats | None
    cache: Cache | None
    choice_lbts: jax.Array | None


def packed_tokens(segment_bt: jax.Array, key_b: jax.Array | None = None) -> Tokens:
    """Returns `Tokens` of packed sequences: causal inside each document; segment 0 is padding."""
    length = segment_bt.shape[1]
    position_t = jnp.arange(length, dtype=jnp.int32)
    causal_qt = position_t[:, None] >= position_t[None, :]
    same_bqt = segment_bt[:, :, None] == segment_bt[:, None, :]
    return Tokens(position_t[None], same_bqt & causal_qt[None], segment_bt > 0, key_b)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: str, scale: float = 1.0):
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * (scale / fan_in**0.5))


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
        self.query = _normal(rngs, (d, h, k), d, model.param_dtype)
        self.key = _normal(rngs, (d, n, k), d, model.param_dtype)
        self.value = _normal(rngs, (d, n, k), d, model.param_dtype)
        self.output = _normal(rngs, (h, k, d), h * k, model.param_dtype, _output_scale(model))
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


def _output_scale(model: ModelConfig) -> float:
    return (2 * model.num_layers) ** -0.5


class FeedForward(nnx.Module):
    """The dense SwiGLU layer."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        model = config.model
        d, f = model.d_model, model.dense_hidden
        self.gate = _normal(rngs, (d, f), d, model.param_dtype)
        self.up = _normal(rngs, (d, f), d, model.param_dtype)
        self.down = _normal(rngs, (f, d), f, model.param_dtype, _output_scale(model))

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        weights = (w[...].astype(x_btd.dtype) for w in (self.gate, self.up, self.down))
        return swiglu(x_btd, *weights)


class Block(nnx.Module):
    """Attention, then a dense or an MoE layer, each behind a norm and beside a residual."""

    def __init__(self, config: Config, mesh: AnyMesh, *, sparse: bool, rngs: nnx.Rngs):
        model = config.model
        self.mesh = mesh
        self.attention_norm = RMSNorm(model.d_model, model.param_dtype)
        self.attention = Attention(config, mesh, rngs=rngs)
        self.ffn_norm = RMSNorm(model.d_model, model.param_dtype)
        if sparse:
            self.moe = MoE(
                config.moe,
                model.d_model,
                mesh=mesh,
                param_dtype=model.param_dtype,
                output_scale=_output_scale(model),
                rngs=rngs,
            )
        else:
            self.ffn = FeedForward(config, rngs=rngs)
        self.sparse = sparse

    def __call__(
        self, x_btd: jax.Array, tokens: Tokens, routing: "LayerRouting | None", cache: Cache | None
    ) -> tuple[jax.Array, tuple[RouterStats, jax.Array] | None, Cache | None]:
        """Returns x, the stats and choices of an MoE layer or None, and the cache."""
        with jax.named_scope("attention"):
            mixed, cache = self.attention(self.attention_norm(x_btd), tokens, cache)
            x_btd = x_btd + mixed
        routed = None
        with jax.named_scope("moe" if self.sparse else "ffn"):
            normed = self.ffn_norm(x_btd)
            if self.sparse:
                assert routing is not None
                inputs = layer_inputs(tokens, routing)
                y_btd, stats, choice_bts = self.moe.routed(
                    normed, state=routing.state, inputs=inputs
                )
                routed = (stats, choice_bts)
            else:
                y_btd = self.ffn(normed)
        return constrain_tokens(x_btd + y_btd, self.mesh), routed, cache


class LayerRouting(NamedTuple):
    """What the router of one MoE layer reads besides x; with a leading layer dim, of all.

    Attributes:
        state: router state of the layer.
        layer: int32; its number among the MoE layers.
        token_bt: int32 ids.
        choice_bts: int32; choices to replay, or None.
    """

    state: dict[str, jax.Array]
    layer: jax.Array
    token_bt: jax.Array
    choice_bts: jax.Array | None


def layer_inputs(tokens: Tokens, routing: LayerRouting) -> RouterInputs:
    """Returns the router's inputs, with random keys of this layer's own."""
    key_b = tokens.key_b
    if key_b is not None:
        keys = jax.random.wrap_key_data(key_b)
        folded = jax.vmap(lambda key: jax.random.fold_in(key, routing.layer))(keys)
        key_b = jax.random.key_data(folded)
    return RouterInputs(tokens.mask_bt, routing.token_bt, key_b, routing.choice_bts)


class Run(nnx.Module):
    """The layers that one step of a scan applies: `kinds` says for each whether it is sparse."""

    def __init__(self, config: Config, mesh: AnyMesh, kinds: tuple[bool, ...], *, rngs: nnx.Rngs):
        self.names = tuple(f"layer_{i}" for i in range(len(kinds)))
        for name, sparse in zip(self.names, kinds, strict=True):
            setattr(self, name, Block(config, mesh, sparse=sparse, rngs=rngs))

    def __call__(self, x_btd, tokens, routing: LayerRouting | None, cache_l: Cache | None):
        """Returns x, stats and choices of the MoE layer or None, and the cache [layers, ...]."""
        routed, caches = None, []
        for i, name in enumerate(self.names):
            cache = None if cache_l is None else Cache(cache_l.key[i], cache_l.value[i])
            x_btd, layer_routed, cache = getattr(self, name)(x_btd, tokens, routing, cache)
            routed = routed if layer_routed is None else layer_routed
            caches.append(cache)
        if cache_l is None:
            return x_btd, routed, None
        return x_btd, routed, jax.tree.map(lambda *c: jnp.stack(c), *caches)


def _stack(config: Config, mesh: AnyMesh, kinds: tuple[bool, ...], count: int, rngs: nnx.Rngs):
    """Returns a `Run` whose parameters have a leading dim of `count` independent runs, or None."""
    if count == 0:
        return None

    def make(key):
        return nnx.split(Run(config, mesh, kinds, rngs=nnx.Rngs(params=key)))

    graphdef, _ = make(jax.random.key(0))
    params = jax.vmap(lambda key: nnx.to_pure_dict(make(key)[1]))(
        jax.random.split(rngs.params(), count)
    )
    return nnx.merge(graphdef, params)


REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Decoder(nnx.Module):
    """The language model. `__call__` gives hidden states; `unembed` makes logits of them."""

    def __init__(self, config: Config, mesh: AnyMesh, *, rngs: nnx.Rngs):
        model, every = config.model, config.moe.every
        self.config, self.mesh = config, mesh
        d, v = model.d_model, model.vocab_size
        self.embedding = _normal(rngs, (v, d), d, model.param_dtype)
        prefix = config.moe.first_dense if every else model.num_layers
        kinds = (False,) * ((every or 1) - 1) + (True,)
        self.prefix = _stack(config, mesh, (False,), prefix, rngs)
        self.runs = _stack(config, mesh, kinds, config.num_moe_layers, rngs)
        self.final_norm = RMSNorm(d, model.param_dtype)
        if not model.tie_embeddings:
            self.unembedding = _normal(rngs, (d, v), d, model.param_dtype)

    def __call__(
        self,
        token_bt: jax.Array,
        tokens: Tokens,
        router_state: dict[str, jax.Array],
        cache: Cache | None = None,
        *,
        choice_lbts: jax.Array | None = None,
    ) -> Outputs:
        """Returns hidden states, routing sums and the cache; see `Outputs`.

        Args:
            token_bt: int32 ids; one outside the vocabulary gives NaN.
            router_state: of `initial_router_state`, with a leading dim of MoE layers.
            cache: keys and values so far [L, B, cache length, N, K].
            choice_lbts: int32 [MoE layers, B, T, S]; experts to use instead of choosing (replay).
        """
        dtype = self.config.model.dtype
        x_btd = self.embedding[...].astype(dtype).at[token_bt].get(mode="fill", fill_value=jnp.nan)
        x_btd = constrain_tokens(x_btd, self.mesh)
        moe_layers = jnp.arange(self.config.num_moe_layers, dtype=jnp.int32)
        routing = (router_state, moe_layers, choice_lbts)
        routed, caches, start = None, [], 0
        for stack, inputs in ((self.prefix, None), (self.runs, routing)):
            if stack is None:
                continue
            x_btd, layer_routed, stack_cache = self._scan(
                stack, x_btd, token_bt, tokens, inputs, cache, start
            )
            routed = routed if layer_routed is None else layer_routed
            start += 0 if stack_cache is None else stack_cache.key.shape[0]
            caches.append(stack_cache)
        if cache is not None:
            cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)
        stats, choice_lbts = routed or (None, None)
        return Outputs(self.final_norm(x_btd), stats, cache, choice_lbts)

    def _scan(self, stack, x_btd, token_bt, tokens, routing, cache, start):
        """Scans x through the runs of `stack`, whose first layer is number `start`."""
        graphdef, params = nnx.split(stack)
        params = nnx.to_pure_dict(params)
        count = jax.tree.leaves(params)[0].shape[0]
        width = len(stack.names)
        if cache is not None:
            cache = jax.tree.map(
                lambda c: c[start : start + count * width].reshape(count, width, *c.shape[1:]),
                cache,
            )

        def body(x_btd, inputs):
            run_params, layer, cache_l = inputs
            if layer is not None:
                state, number, choice_bts = layer
                layer = LayerRouting(state, number, token_bt, choice_bts)
            run = nnx.merge(graphdef, run_params)
            x_btd, routed, cache_l = run(x_btd, tokens, layer, cache_l)
            return x_btd, (routed, cache_l)

        if self.config.model.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.config.model.remat])
        x_btd, (routed, cache) = jax.lax.scan(body, x_btd, (params, routing, cache))
        if cache is not None:
            cache = jax.tree.map(lambda c: c.reshape(count * width, *c.shape[2:]), cache)
        return x_btd, routed, cache

    def unembed(self, x_btd: jax.Array) -> jax.Array:
        """Returns float32 logits [B, T, V]."""
        tied = self.config.model.tie_embeddings
        w_dv = self.embedding[...].T if tied else self.unembedding[...]
        return _unembed(x_btd, w_dv.astype(x_btd.dtype))


@jax.custom_vjp
def _unembed(x_btd: jax.Array, w_dv: jax.Array) -> jax.Array:
    return jnp.einsum("btd,dv->btv", x_btd, w_dv, preferred_element_type=jnp.float32)


def _unembed_forward(x_btd, w_dv):
    return _unembed(x_btd, w_dv), (x_btd, w_dv)


def _unembed_backward(saved, grad_btv):
    """As JAX derives it, but for the weight's gradient x is transposed, not the larger logits.

    XLA:CPU multiplies a transposed left side by a slower kernel.
    """
    x_btd, w_dv = saved
    x_dbt = jax.lax.optimization_barrier(x_btd.transpose(2, 0, 1))
    grad_btd = jax.lax.dot_general(
        grad_btv, w_dv, (((2,), (1,)), ((), ())), preferred_element_type=x_btd.dtype
    )
    grad_dv = jax.lax.dot_general(
        x_dbt, grad_btv, (((1, 2), (0, 1)), ((), ())), preferred_element_type=w_dv.dtype
    )
    return grad_btd, grad_dv


_unembed.defvjp(_unembed_forward, _unembed_backward)


def empty_cache(config: Config, batch: int, length: int) -> Cache:
    """Returns a cache of zeros for `length` tokens of `batch` sequences."""
    model = config.model
    shape = (model.num_layers, batch, length, model.num_kv_heads, model.head_dim)
    return Cache(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype))
