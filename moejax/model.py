"""The decoder: attention, then a dense SwiGLU or an MoE layer, in scanned layers.

Layers live in two stacks: `prefix` holds the first dense layers, `runs` the rest, each run being
`moe.every - 1` dense layers and one MoE layer. A stack is one block whose parameters have a leading
layer dim, and one scan, so compile time does not grow with depth. Where layers differ in their
experts (`moe.num_experts_by_layer`), consecutive runs that are alike make a stack: `runs`,
`runs_1`, `runs_2`, ...
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.attention import Attention, Cache, RMSNorm, Tokens, normal, output_scale
from moejax.config import Config
from moejax.cross_entropy import best_tokens, summed_loss, token_losses
from moejax.embedding import embed
from moejax.experts import feed_forward
from moejax.latent import LatentAttention
from moejax.mesh import AnyMesh
from moejax.moe import MoE
from moejax.moe_config import MoEConfig, Stack
from moejax.router_state import state_of_stack
from moejax.router_stats import RouterStats, of_stacks
from moejax.routing import KEEP, Inspected, RouterInputs
from moejax.sharding import (
    GATHERED,
    constrain_tokens,
    gathered,
    gathered_axes,
    parameter_spec,
    path_name,
)
from moejax.transport import EXCHANGED


class Outputs(NamedTuple):
    """What the decoder gives.

    Attributes:
        hidden_btd: after the last norm.
        stats: routing sums with a leading dim of MoE layers; None for a dense model.
        cache: keys and values, if a cache was given.
        choice_lbts: int32; the experts that tokens chose in each MoE layer, for replay. Where
            layers differ in S, it is the largest; what is behind a layer's own S is no choice.
        inspected: of an inspection, whose router state has `routing.KEEP`, with a leading dim of
            MoE layers; else None.
    """

    hidden_btd: jax.Array
    stats: RouterStats | None
    cache: Cache | None
    choice_lbts: jax.Array | None
    inspected: Inspected | None = None


ATTENTION = {"grouped": Attention, "latent": LatentAttention}


class FeedForward(nnx.Module):
    """The dense SwiGLU layer."""

    def __init__(self, config: Config, mesh: AnyMesh, *, rngs: nnx.Rngs):
        model = config.model
        d, f = model.d_model, model.dense_hidden
        self.mesh = mesh
        self.gate = normal(rngs, (d, f), d, model.param_dtype)
        self.up = normal(rngs, (d, f), d, model.param_dtype)
        self.down = normal(rngs, (f, d), f, model.param_dtype, output_scale(model))

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        weights = {"gate": self.gate, "up": self.up, "down": self.down}
        whole = {
            name: gathered(w[...], f"ffn/{name}", self.mesh, x_btd.dtype)
            for name, w in weights.items()
        }
        return feed_forward(x_btd, whole, "swiglu")


class Block(nnx.Module):
    """Attention, then a dense or an MoE layer, each behind a norm and beside a residual."""

    def __init__(self, config: Config, mesh: AnyMesh, *, sparse: bool, rngs: nnx.Rngs):
        model = config.model
        self.mesh = mesh
        self.attention_norm = RMSNorm(model.d_model, model.param_dtype)
        self.attention = ATTENTION[model.attention](config, mesh, rngs=rngs)
        self.ffn_norm = RMSNorm(model.d_model, model.param_dtype)
        if sparse:
            self.moe = MoE(
                config.moe,
                model.d_model,
                mesh=mesh,
                param_dtype=model.param_dtype,
                output_scale=output_scale(model),
                rngs=rngs,
            )
        else:
            self.ffn = FeedForward(config, mesh, rngs=rngs)
        self.sparse = sparse

    def __call__(
        self, x_btd: jax.Array, tokens: Tokens, routing: "LayerRouting | None", cache: Cache | None
    ) -> tuple[jax.Array, tuple[RouterStats, jax.Array | Inspected] | None, Cache | None]:
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

    @property
    def num_layers(self) -> int:
        """Layers of a whole stack, whose parameters have a leading dim of runs."""
        return len(self.names) * getattr(self, self.names[0]).ffn_norm.scale.shape[0]

    def __call__(self, x_btd, tokens, routing: LayerRouting | None, cache_l: Cache | None):
        """Returns x, stats and choices of the MoE layer or None, and the cache [layers, ...]."""
        routed, caches = None, []
        for i, name in enumerate(self.names):
            cache = None if cache_l is None else Cache(cache_l.key[i], cache_l.value[i])
            here = tokens._replace(layer=tokens.layer + i)
            x_btd, layer_routed, cache = getattr(self, name)(x_btd, here, routing, cache)
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


def stack_name(number: int) -> str:
    """Returns the name of a stack of runs; the first is the only one where layers are alike."""
    return f"runs_{number}" if number else "runs"


def _in_compute_dtype(params: Any, dtype: str) -> Any:
    """Casts the matrices of all layers, which each layer would cast for itself.

    What a loop over layers collects is then one copy of them for both passes, and their gradients
    in the compute dtype, in which they are summed over devices anyway.
    """

    def cast(path, w):
        matrix = gathered_axes(parameter_spec(path_name(path), w.ndim))
        return w.astype(dtype) if matrix else w

    return jax.tree_util.tree_map_with_path(cast, params)


def _stack_routing(stack: Stack, router_state: dict[str, jax.Array], choice_lbts: jax.Array | None):
    """Returns state, numbers and choices to replay of the layers of a stack, as wide as it is."""
    if choice_lbts is not None:
        choice_lbts = choice_lbts[stack.start : stack.stop, ..., : stack.config.slots_per_token]
    numbers = jnp.arange(stack.start, stack.stop, dtype=jnp.int32)
    return state_of_stack(router_state, stack), numbers, choice_lbts


def _join_choices(
    parts: Sequence[jax.Array], moe: MoEConfig, nothing: int | None = None
) -> jax.Array:
    """Returns the choices of all layers; E of the largest layer is no choice in any of them.

    Args:
        nothing: what stands for no choice, if not that.
    """
    nothing = moe.choices if nothing is None else nothing

    def widen(choice_lbts: jax.Array) -> jax.Array:
        behind = [(0, 0)] * 3 + [(0, moe.slots_per_token - choice_lbts.shape[-1])]
        return jnp.pad(choice_lbts, behind, constant_values=nothing)

    return jnp.concatenate([widen(part) for part in parts])


def _join_inspected(parts: Sequence[Inspected], moe: MoEConfig) -> Inspected:
    expert, weight, norm = zip(*parts, strict=True)
    return Inspected(
        _join_choices(expert, moe), _join_choices(weight, moe, 0), _join_choices(norm, moe, 0)
    )


REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "exchange": jax.checkpoint_policies.save_only_these_names(EXCHANGED, GATHERED),
    "exchange_and_dots_with_no_batch_dims": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(EXCHANGED, GATHERED),
    ),
}


class Decoder(nnx.Module):
    """The language model. `__call__` gives hidden states; `unembed` makes logits of them."""

    def __init__(self, config: Config, mesh: AnyMesh, *, rngs: nnx.Rngs):
        model, every = config.model, config.moe.every
        self.config, self.mesh = config, mesh
        d, v = model.d_model, model.vocab_size
        self.embedding = normal(rngs, (v, d), d, model.param_dtype)
        prefix = config.moe.first_dense if every else model.num_layers
        kinds = (False,) * ((every or 1) - 1) + (True,)
        self.prefix = _stack(config, mesh, (False,), prefix, rngs)
        for number, (stack, own) in enumerate(config.moe_stacks()):
            setattr(self, stack_name(number), _stack(own, mesh, kinds, stack.num_layers, rngs))
        self.final_norm = RMSNorm(d, model.param_dtype)
        if not model.tie_embeddings:
            self.unembedding = normal(rngs, (d, v), d, model.param_dtype)

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
        x_btd = embed(self.embedding[...], token_bt, self.mesh, dtype)
        x_btd = constrain_tokens(x_btd, self.mesh)
        stacks: list[tuple[Run, tuple | None]] = []
        if self.prefix is not None:
            stacks.append((self.prefix, None))
        for number, (stack, _) in enumerate(self.config.moe_stacks()):
            routing = _stack_routing(stack, router_state, choice_lbts)
            stacks.append((getattr(self, stack_name(number)), routing))
        routed, caches, start = [], [], 0
        for stack, inputs in stacks:
            x_btd, stack_routed, stack_cache = self._scan(
                stack, x_btd, token_bt, tokens, inputs, cache, start
            )
            routed += [] if stack_routed is None else [stack_routed]
            start += stack.num_layers
            caches.append(stack_cache)
        if cache is not None:
            cache = jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)
        stats = choice_lbts = inspected = None
        if routed:
            stats = of_stacks([stats for stats, _ in routed], self.config.moe.choices)
            parts = [choices for _, choices in routed]
            if KEEP in router_state:
                inspected = _join_inspected(parts, self.config.moe)
                parts = [part.expert_bts for part in parts]
            choice_lbts = _join_choices(parts, self.config.moe)
        return Outputs(self.final_norm(x_btd), stats, cache, choice_lbts, inspected)

    def _scan(self, stack, x_btd, token_bt, tokens, routing, cache, start):
        """Scans x through the runs of `stack`, whose first layer is number `start`."""
        graphdef, params = nnx.split(stack)
        params = _in_compute_dtype(nnx.to_pure_dict(params), self.config.model.dtype)
        count = jax.tree.leaves(params)[0].shape[0]
        width = len(stack.names)
        if cache is not None:
            cache = jax.tree.map(
                lambda c: c[start : start + count * width].reshape(count, width, *c.shape[1:]),
                cache,
            )

        numbers = start + width * jnp.arange(count, dtype=jnp.int32)

        def body(x_btd, inputs):
            run_params, layer, cache_l, number = inputs
            if layer is not None:
                state, moe_layer, choice_bts = layer
                layer = LayerRouting(state, moe_layer, token_bt, choice_bts)
            run = nnx.merge(graphdef, run_params)
            x_btd, routed, cache_l = run(x_btd, tokens._replace(layer=number), layer, cache_l)
            return x_btd, (routed, cache_l)

        if self.config.model.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.config.model.remat])
        x_btd, (routed, cache) = jax.lax.scan(body, x_btd, (params, routing, cache, numbers))
        if cache is not None:
            cache = jax.tree.map(lambda c: c.reshape(count * width, *c.shape[2:]), cache)
        return x_btd, routed, cache

    def unembed(self, x_btd: jax.Array) -> jax.Array:
        """Returns float32 logits [B, T, V]: for generation, and for few tokens."""
        w_dv = self._unembedding().astype(x_btd.dtype)
        return jnp.einsum("btd,dv->btv", x_btd, w_dv, preferred_element_type=jnp.float32)

    def token_losses(self, hidden_btd: jax.Array, target_bt: jax.Array) -> jax.Array:
        """Returns float32 [B, T]: the cross-entropy of each target, nats."""
        chunk = self.config.model.loss_chunk
        return token_losses(hidden_btd, self._unembedding(), target_bt, chunk, self.mesh)

    def best_tokens(self, hidden_btd: jax.Array, target_bt: jax.Array, known: int) -> jax.Array:
        """Returns bool [B, T]: whether greedy decoding with `known` ids gives the target."""
        w_dv, chunk = self._unembedding(), self.config.model.loss_chunk
        return best_tokens(hidden_btd, w_dv, target_bt, known, chunk, self.mesh)

    def summed_loss(
        self, hidden_btd: jax.Array, target_bt: jax.Array, mask_bt: jax.Array
    ) -> jax.Array:
        """Returns the sum of `token_losses` where `mask_bt` holds, with faster gradients."""
        w_dv, chunk = self._unembedding(), self.config.model.loss_chunk
        return summed_loss(hidden_btd, w_dv, target_bt, mask_bt, chunk, self.mesh)

    def _unembedding(self) -> jax.Array:
        return self.embedding[...].T if self.config.model.tie_embeddings else self.unembedding[...]
