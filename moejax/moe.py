"""The MoE layer: route, assign, dispatch, exchange, experts, combine, inside one `shard_map`.

Inside it every array is one device's part: B is its sequences, E all experts for tokens and E/Z for
weights.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax import exchange, reference
from moejax.assign import capacities, capacity_slots, group_keys, service_order
from moejax.config import EXPERT_AXES, TOKEN_AXES
from moejax.dispatch import kept_experts, side_by_side
from moejax.errors import ConfigError, require
from moejax.experts import (
    capacity_experts,
    capacity_modules,
    dropless_experts,
    dropless_modules,
    feed_forward,
)
from moejax.free_experts import free_outputs
from moejax.mesh import AnyMesh, single_device_mesh
from moejax.moe_config import MoEConfig
from moejax.parameters import kind_of, moe_parameters
from moejax.router_state import initial_router_state
from moejax.router_stats import RouterStats, router_stats
from moejax.routing import (
    KEEP,
    Inspected,
    RouterInputs,
    Routing,
    kept_mixing,
    route,
    soft_mixing,
)
from moejax.sharding import (
    gathered,
    parameter_spec,
    split_spec,
    token_spec,
    vary_like,
    vary_tree,
    varying_axes,
)
from moejax.transport import Experts, by_assignments, by_mixing, by_slots

Weights = Mapping[str, Any]  # arrays; under "expert" the pytree of your own experts


class MoE(nnx.Module):
    """A sparse mixture of experts, to be used alone or in your own model.

        moe = MoE(MoEConfig(num_experts=8, top_k=2), d_model=64, rngs=nnx.Rngs(0))
        y_btd, stats = moe(x_btd)

    Its parameters, by name, are those of `parameters.moe_parameters`.

    Args:
        config: routing, capacity and transport.
        d_model: D.
        mesh: where the layer runs; default one device. The axes are those of
            `moejax.mesh.make_mesh`.
        param_dtype: of the experts; the router is always float32.
        output_scale: factor on the initial values of the last matrices before the residual.
        expert: makes one expert from its `nnx.Rngs`, in place of the config's network: a module of
            your own, called with rows [R, D], each by itself, that gives [R, D] of the same dtype.
            Its parameters are stacked over experts, split over the expert axes and whole over all
            others.
        rngs: `params` initialises the weights: normal of variance 1/fan-in, the router's a tenth of
            that deviation.
    """

    def __init__(
        self,
        config: MoEConfig,
        d_model: int,
        *,
        mesh: AnyMesh | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        output_scale: float = 1.0,
        expert: Callable[[nnx.Rngs], nnx.Module] | None = None,
        rngs: nnx.Rngs,
    ):
        if config.of_layer(0) is not config:
            raise ConfigError(
                f"moe.num_experts_by_layer={config.num_experts_by_layer} and "
                f"moe.expert_hidden_by_layer={config.expert_hidden_by_layer} are of a model's "
                "layers, but this is one; give it config.of_layer(0), or that of another layer"
            )
        self.config = config
        self.mesh = single_device_mesh() if mesh is None else mesh
        table = moe_parameters(config, d_model)
        if expert is not None:
            table = {name: p for name, p in table.items() if kind_of(name) != "experts"}
            self.expert = _stacked_modules(expert, config.num_experts, rngs)
        self.names = tuple(table)
        for name, parameter in table.items():
            dtype = jnp.float32 if kind_of(name) == "router" else param_dtype
            deviation = parameter.deviation * (output_scale if parameter.output else 1.0)
            value = jnp.full(parameter.shape, parameter.mean, dtype)
            if deviation:
                value += jax.random.normal(rngs.params(), parameter.shape, dtype) * deviation
            setattr(self, name, nnx.Param(value))

    def __call__(
        self,
        x_btd: jax.Array,
        mask_bt: jax.Array | None = None,
        *,
        state: Mapping[str, jax.Array] | None = None,
        inputs: RouterInputs | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """Returns y [B, T, D] in the dtype of x, and the routing's sums over the whole batch.

        Args:
            x_btd: tokens; B is a multiple of `MeshConfig.token_shards` x group_sequences.
            mask_bt: bool; False for padding, which takes no slot and counts nowhere. Default: no
                padding.
            state: this layer's router state, an entry of `initial_router_state` without its leading
                dim; default: as it starts.
            inputs: what some routers need besides x, the mask included; see `RouterInputs`.
        """
        y_btd, stats, _ = self.routed(x_btd, mask_bt, state=state, inputs=inputs)
        return y_btd, stats

    def routed(
        self,
        x_btd: jax.Array,
        mask_bt: jax.Array | None = None,
        *,
        state: Mapping[str, jax.Array] | None = None,
        inputs: RouterInputs | None = None,
    ) -> tuple[jax.Array, RouterStats, jax.Array | Inspected]:
        """Returns what `__call__` does, and the choices int32 [B, T, S], for replay.

        Where `state` has `routing.KEEP`, in place of the choices what an inspection sees of them.
        """
        if inputs is None:
            mask_bt = jnp.ones(x_btd.shape[:2], bool) if mask_bt is None else mask_bt
            inputs = RouterInputs(mask_bt, None, None, None)
        if state is None:
            state = _first_state(self.config)
        weights: dict[str, Any] = {name: getattr(self, name)[...] for name in self.names}
        apply_one = None
        if hasattr(self, "expert"):
            graph, params = nnx.split(self.expert)
            weights["expert"] = nnx.to_pure_dict(params)
            apply_one = _module_function(graph)
        return apply_moe(
            weights,
            x_btd,
            inputs,
            state,
            config=self.config,
            mesh=self.mesh,
            apply_one=apply_one,
        )


def _stacked_modules(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs):
    """Returns one module whose parameters are those of `count` modules, with a leading dim."""

    def split(key: jax.Array):
        return nnx.split(make(nnx.Rngs(params=key)))

    graph, _ = split(jax.random.key(0))
    keys = jax.random.split(rngs.params(), count)
    return nnx.merge(graph, jax.vmap(lambda key: nnx.to_pure_dict(split(key)[1]))(keys))


@functools.cache
def _module_function(graph: nnx.GraphDef) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns (one expert's parameters, rows) -> rows; the same function for the same module."""
    return lambda params, x_rd: nnx.merge(graph, params)(x_rd)


def _first_state(config: MoEConfig) -> dict[str, jax.Array]:
    if config.router == "hash":
        raise ConfigError(
            "moe.router='hash' needs its table of experts by token; give state={'table': "
            "int32 [V, top_k]}, for example from initial_router_state"
        )
    layers = initial_router_state(config, 1, 0, None)
    return {name: value[0] for name, value in layers.items()}


def apply_moe(
    weights: Weights,
    x_btd: jax.Array,
    inputs: RouterInputs,
    state: Mapping[str, jax.Array],
    *,
    config: MoEConfig,
    mesh: AnyMesh,
    apply_one: Callable[[Any, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, RouterStats, jax.Array | Inspected]:
    """The layer as a function of its weights; see `MoE.routed`. Oracle: `reference.apply_moe`.

    With `apply_one`, weights["expert"] is the parameters of your own experts, a pytree.
    """
    _check_sequences(x_btd.shape[0], config, mesh)
    check_choices(inputs, x_btd, config)
    # Padding may hold anything, and 0 times NaN is NaN: it is taken out first.
    x_btd = jnp.where(inputs.mask_bt[..., None], x_btd, 0)
    if config.transport == "reference":
        return reference.apply_moe(
            weights, x_btd, inputs, state, config=config, apply_one=apply_one
        )
    routed = {n: w for n, w in weights.items() if not n.startswith("shared_")}
    specs = {
        n: P(EXPERT_AXES) if n == "expert" else parameter_spec(f"moe/{n}", w.ndim)
        for n, w in routed.items()
    }
    specs = {name: split_spec(spec, mesh) for name, spec in specs.items()}
    tokens = token_spec(x_btd.shape, mesh)
    sequences = token_spec(x_btd.shape, mesh, whole=True)
    run = jax.shard_map(
        functools.partial(_moe_local, config=config, apply_one=apply_one),
        mesh=mesh,
        in_specs=(specs, tokens, sequences, P()),
        out_specs=(tokens, P(), tokens),
    )
    y_btd, stats, expert_bts = run(routed, x_btd, inputs, dict(state))
    if config.shared_experts:
        y_btd = y_btd + shared_output(weights, x_btd, config, mesh)
    return y_btd, stats, expert_bts


@functools.partial(jax.named_call, name="shared")
def shared_output(
    weights: Weights, x_btd: jax.Array, config: MoEConfig, mesh: AnyMesh
) -> jax.Array:
    """Returns what the shared experts give for every token (DeepSeekMoE), gated where asked."""
    whole = {
        name.removeprefix("shared_"): gathered(w, f"moe/{name}", mesh, x_btd.dtype)
        for name, w in weights.items()
        if name in ("shared_gate", "shared_up", "shared_down")
    }
    y_btd = feed_forward(x_btd, whole, config.activation)
    if config.shared_gate == "none":
        return y_btd
    logit_bt = jnp.einsum("btd,d->bt", x_btd.astype(jnp.float32), weights["shared_router"])
    return y_btd * jax.nn.sigmoid(logit_bt)[..., None].astype(y_btd.dtype)


def check_choices(inputs: RouterInputs, x_btd: jax.Array, config: MoEConfig) -> None:
    """Refuses to replay choices of another shape."""
    if inputs.choice_bts is None:
        return
    wanted = (*x_btd.shape[:2], config.slots_per_token)
    if inputs.choice_bts.shape != wanted:
        raise ConfigError(
            f"choices to replay have shape {inputs.choice_bts.shape} and this layer needs "
            f"[sequences, tokens, choices] = {wanted}; record them with the same batch, "
            "data.sequence_length and moe.top_k"
        )


def _check_sequences(batch: int, config: MoEConfig, mesh: AnyMesh) -> None:
    """Refuses a batch that does not give every device whole capacity groups."""
    # one sequence alone is not split, see `sharding.token_spec`
    shards = math.prod(mesh.shape[axis] for axis in TOKEN_AXES) if batch > 1 else 1
    group = config.group_sequences
    require(
        batch % (shards * group) == 0,
        f"a batch of {batch} sequences is not a multiple of {shards * group}: the mesh splits "
        f"sequences over {shards} devices, of which each takes whole groups of "
        f"moe.group_sequences={group}; fill the batch up with sequences whose mask is False",
    )


def _moe_local(weights, x_btd, inputs: RouterInputs, state, *, config: MoEConfig, apply_one):
    """The layer on one device: the body of `apply_moe`'s `shard_map`.

    Args:
        weights: this device's parts, as `sharding.PARAMETER_SPECS` splits them.
        x_btd: [B, T, D]; this device's tokens: whole sequences, or parts with a context axis.
        inputs: of whole sequences always.

    Returns:
        y [B, T, D]; the routing sums of all devices; choices int32 [B, T, S], or `Inspected`.
    """

    # Marked as varying: so the gradients of whole weights are summed in float32, and those of
    # split ones over `data` after their reduce-scatter over fsdp.
    def vary(like: jax.Array):
        return jax.tree.map(lambda w: vary_like(w, like)[0], weights)

    experts = _experts(vary(x_btd), x_btd.dtype, config, apply_one)
    # A router sees whole sequences, and does the same on all devices that share them.
    whole_btd = exchange.whole_sequence(x_btd)
    weights = vary(whole_btd)
    own = functools.partial(exchange.own_part, axis=1, parts=whole_btd.shape[1] // x_btd.shape[1])
    group = functools.partial(rearrange, pattern="(g n) t ... -> g (n t) ...")
    group = functools.partial(group, n=config.group_sequences)
    with jax.named_scope("route"):
        routing = route(whole_btd, weights, state, inputs, config)
    if config.router == "soft":
        with jax.named_scope("route"):
            mixing = kept_mixing(soft_mixing(x_btd, weights, inputs.mask_bt, config), state)
        kept_bts, further = routing.expert_bts, jnp.zeros((), jnp.int32)
        y_gtd = by_mixing(experts, group(x_btd), mixing)
        y_btd = y_gtd.reshape(x_btd.shape)
    else:
        y_btd, kept_bts, further = _run_experts(experts, x_btd, inputs, routing, config, group, own)
    if apply_one is None:  # else nothing is split over tensor
        y_btd = exchange.sum_tensor(y_btd)
    if config.free_experts:
        with jax.named_scope("free_experts"):
            y_btd += free_outputs(weights, x_btd, own(kept_bts), own(routing.weight_bts), config)
    stats = router_stats(routing, kept_bts, inputs.mask_bt, config)
    if axes := varying_axes(whole_btd):
        stats = jax.lax.psum(vary_tree(stats, whole_btd), axes)
    choices = own(routing.expert_bts)
    if KEEP in state:
        seen = routing._replace(expert_bts=own(kept_bts), weight_bts=own(routing.weight_bts))
        choices = _inspected(experts, weights, x_btd, seen, config, split=apply_one is None)
    return y_btd, stats._replace(overflow_rounds=further), choices


def _inspected(
    experts: Experts, weights, x_btd, routing: Routing, config: MoEConfig, *, split: bool
) -> Inspected:
    """Returns the choices and the norm of what each one adds; runs the experts once per choice.

    Args:
        split: whether the experts' outputs are partial sums over the tensor axis.
    """
    weight_bts = jnp.where(routing.expert_bts < config.choices, routing.weight_bts, 0)

    def norm(choice: tuple[jax.Array, jax.Array]) -> jax.Array:
        expert_bt1, weight_bt1 = choice
        none = config.num_experts
        expert_t1 = jnp.where(expert_bt1 < none, expert_bt1, none).reshape(-1, 1)
        x_td, weight_t1 = x_btd.reshape(-1, x_btd.shape[-1]), weight_bt1.reshape(-1, 1)
        y_td, _ = by_assignments(experts, x_td, expert_t1, weight_t1, config)
        y_btd = (exchange.sum_tensor(y_td) if split else y_td).reshape(x_btd.shape)
        if config.free_experts:
            y_btd += free_outputs(weights, x_btd, expert_bt1, weight_bt1, config)
        return jnp.linalg.norm(y_btd.astype(jnp.float32), axis=-1)

    if config.router == "soft":
        norm_bts = jnp.full_like(weight_bts, jnp.nan)
    else:
        columns = (routing.expert_bts[..., None], weight_bts[..., None])
        by_choice = jax.tree.map(lambda value: jnp.moveaxis(value, 2, 0), columns)
        norm_bts = jnp.moveaxis(jax.lax.map(norm, by_choice), 0, -1)
    return Inspected(routing.expert_bts, weight_bts, norm_bts)


def _experts(weights: Mapping[str, Any], dtype, config: MoEConfig, apply_one) -> Experts:
    """Returns what runs the expert networks: the config's, or your own."""
    if apply_one is not None:
        return Experts(
            weights["expert"],
            functools.partial(capacity_modules, apply_one=apply_one),
            functools.partial(dropless_modules, apply_one=apply_one),
        )
    activation = config.activation
    return Experts(
        _gather_experts(weights, dtype),
        functools.partial(capacity_experts, activation=activation),
        functools.partial(dropless_experts, activation=activation),
    )


@functools.partial(jax.named_call, name="weights")
def _gather_experts(weights: Weights, dtype) -> dict[str, jax.Array]:
    """Returns the expert networks' weights whole over fsdp, in the compute dtype."""
    fsdp_dim = {"gate": 1, "up": 1, "down": 2}
    experts = {
        name: exchange.gather_experts(weights[name], dim, dtype)
        for name, dim in fsdp_dim.items()
        if name in weights
    }
    whole = ("output_scale", "scale_in", "scale_out")
    return experts | {n: weights[n].astype(dtype) for n in whole if n in weights}


def _run_experts(
    experts,
    x_btd,
    inputs: RouterInputs,
    routing: Routing,
    config: MoEConfig,
    group: Callable,
    own: Callable,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns y [B, T, D], partial over tensor; the kept choices; and further rounds.

    `own` takes this device's part of whole sequences, which routing and kept choices are of.
    """
    none = config.num_experts
    expert_bts = jnp.where(routing.expert_bts < none, routing.expert_bts, none)
    kept_bts, slots = expert_bts, None
    if config.capacity_factor is not None:
        slots = _assign(expert_bts, inputs, routing, config, group)
        kept_bts = kept_experts(group(expert_bts), slots, none).reshape(expert_bts.shape)
    flat = functools.partial(rearrange, pattern="b t d -> (b t) d")
    x_td, weight_ts = flat(x_btd), flat(own(routing.weight_bts))
    # On one expert device nothing is exchanged, and what was kept needs no empty slots; nor do
    # parts of sequences, whose tokens share the slots of an expert with other devices'.
    if slots is not None and _by_equal_slots(config) and own(kept_bts) is kept_bts:
        y_td = by_slots(experts, x_td, weight_ts, side_by_side(slots, none), none)
        further = jnp.zeros((), jnp.int32)
    else:
        y_td, further = by_assignments(experts, x_td, flat(own(kept_bts)), weight_ts, config)
    y_btd = y_td.reshape(x_btd.shape)
    # A free expert has no capacity: its choices are kept. What was dropped gets the sentinel.
    kept_bts = jnp.where(kept_bts < none, kept_bts, config.choices)
    return y_btd, jnp.where(routing.expert_bts < none, kept_bts, routing.expert_bts), further


def _by_equal_slots(config: MoEConfig) -> bool:
    """Returns whether kept assignments travel in equal buffers, every slot of them."""
    degree = exchange.expert_degree()
    return config.transport_over(degree) == "all_to_all" and degree > 1


@functools.partial(jax.named_call, name="assign")
def _assign(expert_bts, inputs: RouterInputs, routing: Routing, config: MoEConfig, group: Callable):
    """Gives each group's assignments their slots; capacity follows real tokens, not padding."""
    tokens = config.group_sequences * inputs.mask_bt.shape[1]
    table_ne = capacities(tokens, config)
    capacity_ge = jnp.asarray(table_ne)[group(inputs.mask_bt).sum(1)]
    order_ga = jax.vmap(functools.partial(service_order, priority=config.priority))(
        group(routing.weight_bts), group_keys(inputs, config)
    )
    slots = functools.partial(capacity_slots, rows_per_expert=int(table_ne[-1].max()))
    return jax.vmap(slots)(group(expert_bts), capacity_ge, order_ga)
