"""The dense oracle: the MoE layer, same signature, written the slow, obvious way on one device.

Every expert runs on every token; what was not selected, or was dropped, gets weight 0. Slots are
counted with a running sum, assignment by assignment. It shares `route`, the free experts and
`router_stats` with the fast layer (they have tests of their own) and nothing of assign, dispatch,
exchange or experts.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.free_experts import free_outputs
from moejax.mesh import AnyMesh
from moejax.moe_config import MoEConfig
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

ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jax.nn.relu(x) ** 2,
}


def apply_moe(
    weights: Mapping[str, Any],
    x_btd: jax.Array,
    inputs: RouterInputs,
    state: Mapping[str, jax.Array],
    *,
    config: MoEConfig,
    mesh: AnyMesh | None = None,
    apply_one: Callable[[Any, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, RouterStats, jax.Array | Inspected]:
    """Same as `moe.apply_moe`; `mesh` is ignored."""
    del mesh
    x_btd = jnp.where(inputs.mask_bt[..., None], x_btd, 0)
    routing = route(x_btd, weights, state, inputs, config)
    kept_bts = routing.expert_bts
    if config.router == "soft":
        y_btd = _soft(weights, x_btd, inputs, state, config, apply_one)
    else:
        if config.capacity_factor is not None:
            kept_bts = _drop(routing, inputs, config)
        y_btd = _weighted_experts(weights, x_btd, kept_bts, routing, config, apply_one)
    if config.free_experts:
        y_btd += free_outputs(weights, x_btd, kept_bts, routing.weight_bts, config)
    if config.shared_experts:
        y_btd += _shared(weights, x_btd, config)
    choices = routing.expert_bts
    if KEEP in state:
        seen = routing._replace(expert_bts=kept_bts)
        choices = _inspected(weights, x_btd, seen, config, apply_one)
    return y_btd, router_stats(routing, kept_bts, inputs.mask_bt, config), choices


def _inspected(weights, x_btd, routing: Routing, config: MoEConfig, apply_one) -> Inspected:
    """Returns the choices with |weight * output| of each: one choice at a time, by the oracle."""
    kept_bts = routing.expert_bts
    weight_bts = jnp.where(kept_bts < config.choices, routing.weight_bts, 0)
    if config.router == "soft":
        return Inspected(kept_bts, weight_bts, jnp.full_like(weight_bts, jnp.nan))
    norms = []
    for s in range(kept_bts.shape[-1]):
        one = routing._replace(weight_bts=weight_bts[..., s:][..., :1])
        expert_bt1 = kept_bts[..., s:][..., :1]
        y_btd = _weighted_experts(weights, x_btd, expert_bt1, one, config, apply_one)
        if config.free_experts:
            y_btd += free_outputs(weights, x_btd, expert_bt1, one.weight_bts, config)
        norms.append(jnp.sqrt(jnp.sum(y_btd.astype(jnp.float32) ** 2, axis=-1)))
    return Inspected(kept_bts, weight_bts, jnp.stack(norms, axis=-1))


def _network(x, gate, up, down, activation: str):
    """Returns one network's output: x [..., D], gate (or None) and up [D, F], down [F, D]."""
    act = ACTIVATIONS[activation]
    up, down = up.astype(x.dtype), down.astype(x.dtype)
    hidden = act(x @ up) if gate is None else act(x @ gate.astype(x.dtype)) * (x @ up)
    return hidden @ down


def _all_experts(weights: Mapping[str, Any], x, config: MoEConfig, apply_one=None) -> jax.Array:
    """Returns every expert's output for every row: [..., D] -> [..., E, D]."""
    outputs = []
    for e in range(config.num_experts):
        if apply_one is not None:
            one = jax.tree.map(lambda leaf, e=e: leaf[e], weights["expert"])
            outputs.append(apply_one(one, x.reshape(-1, x.shape[-1])).reshape(x.shape))
            continue
        gate = weights["gate"][e] if "gate" in weights else None
        out = _network(x, gate, weights["up"][e], weights["down"][e], config.activation)
        if "output_scale" in weights:
            scale_d = weights["output_scale"][e].astype(x.dtype)
            out *= scale_d.reshape((1,) * (out.ndim - 1) + scale_d.shape)
        if "scale_out" in weights:
            scale_in, scale_out = weights["scale_in"], weights["scale_out"][e]
            out *= jax.nn.sigmoid((x @ scale_in.astype(x.dtype)) @ scale_out.astype(x.dtype))
        outputs.append(out)
    return jnp.stack(outputs, axis=-2)


def _weighted_experts(weights, x_btd, kept_bts, routing: Routing, config: MoEConfig, apply_one):
    chosen_btse = jax.nn.one_hot(kept_bts, config.choices, dtype=jnp.float32)
    gate_bte = jnp.einsum("bts,btse->bte", routing.weight_bts, chosen_btse)
    out_bted = _all_experts(weights, x_btd, config, apply_one)
    y_btd = jnp.einsum(
        "bted,bte->btd",
        out_bted,
        gate_bte[..., : config.num_experts],
        preferred_element_type=jnp.float32,
    )
    return y_btd.astype(x_btd.dtype)


def _shared(weights, x_btd, config: MoEConfig):
    y_btd = _network(
        x_btd,
        weights.get("shared_gate"),
        weights["shared_up"],
        weights["shared_down"],
        config.activation,
    )
    if config.shared_gate == "none":
        return y_btd
    logit_bt = jnp.einsum("btd,d->bt", x_btd.astype(jnp.float32), weights["shared_router"])
    return y_btd * jax.nn.sigmoid(logit_bt)[..., None].astype(x_btd.dtype)


def _soft(weights, x_btd, inputs: RouterInputs, state, config: MoEConfig, apply_one):
    """Soft MoE by its definition: slots are means of tokens, tokens are means of slots."""
    mixing = kept_mixing(soft_mixing(x_btd, weights, inputs.mask_bt, config), state)
    dispatch_gtep, combine_gtep, _ = mixing
    x_gtd = x_btd.reshape(dispatch_gtep.shape[0], -1, x_btd.shape[-1])
    dtype = x_btd.dtype
    slots_gepd = jnp.einsum("gtd,gtep->gepd", x_gtd, dispatch_gtep.astype(dtype))
    out_gepfd = _all_experts(weights, slots_gepd, config, apply_one)
    out_gepd = jnp.einsum("geped->gepd", out_gepfd)  # each expert on its own slots
    y_gtd = jnp.einsum("gepd,gtep->gtd", out_gepd, combine_gtep.astype(dtype))
    return y_gtd.reshape(x_btd.shape)


def _drop(routing: Routing, inputs: RouterInputs, config: MoEConfig) -> jax.Array:
    """Replaces by the sentinel each assignment that comes after its expert's slots are taken."""
    expert_bts = routing.expert_bts
    batch, _, slots = expert_bts.shape
    groups, choices = batch // config.group_sequences, config.choices
    expert_gts = expert_bts.reshape(groups, -1, slots)
    place_gts = _place_served(routing, inputs, config)
    order_ga = jnp.argsort(place_gts.reshape(groups, -1), axis=1)
    ordered_ga = jnp.take_along_axis(expert_gts.reshape(groups, -1), order_ga, axis=1)
    used_gae = jnp.cumsum(jax.nn.one_hot(ordered_ga, choices, dtype=jnp.int32), axis=1)
    count_ga = jnp.take_along_axis(
        jnp.pad(used_gae, ((0, 0), (0, 0), (0, 1))), ordered_ga[..., None], axis=2
    )[..., 0]
    real_g = inputs.mask_bt.reshape(groups, -1).sum(1)
    capacity_ge = jnp.asarray(_capacities(expert_gts.shape[1], config))[real_g]
    limit_ga = jnp.take_along_axis(capacity_ge, ordered_ga, axis=1)
    kept_ga = jnp.where(count_ga <= limit_ga, ordered_ga, choices)
    back_ga = jnp.argsort(order_ga, axis=1)
    return jnp.take_along_axis(kept_ga, back_ga, axis=1).reshape(expert_bts.shape)


def _place_served(routing: Routing, inputs: RouterInputs, config: MoEConfig) -> jax.Array:
    """Returns int32 [G, T, S]: the place of every assignment in the order of service."""
    batch, _, slots = routing.expert_bts.shape
    groups = batch // config.group_sequences
    weight_gts = routing.weight_bts.reshape(groups, -1, slots)
    tokens = weight_gts.shape[1]
    token_ts, choice_ts = jnp.indices((tokens, slots))
    if config.priority == "token":
        return jnp.broadcast_to(token_ts * slots + choice_ts, weight_gts.shape)
    if config.priority == "rank":
        return jnp.broadcast_to(choice_ts * tokens + token_ts, weight_gts.shape)
    if config.priority == "best_weight":
        place_gt = jnp.argsort(jnp.argsort(-weight_gts.max(2), axis=1), axis=1)
        return choice_ts[None] * tokens + place_gt[..., None]
    if config.priority == "weight":
        value_ga = -weight_gts.reshape(groups, -1)
    else:
        value_ga = _drawn(inputs, groups, tokens * slots)
    return jnp.argsort(jnp.argsort(value_ga, axis=1), axis=1).reshape(weight_gts.shape)


def _drawn(inputs: RouterInputs, groups: int, assignments: int) -> jax.Array:
    keys = [jax.random.key(0)] * groups
    if inputs.key_b is not None:
        first_gk = inputs.key_b.reshape(groups, -1, inputs.key_b.shape[-1])[:, 0]
        keys = [jax.random.fold_in(jax.random.wrap_key_data(k), 1) for k in first_gk]
    return jnp.stack([jax.random.uniform(key, (assignments,)) for key in keys])


def _capacities(tokens: int, config: MoEConfig) -> np.ndarray:
    """Returns [tokens + 1, choices + 1]: capacities by real tokens; free experts have no limit."""
    factor = Fraction(str(config.capacity_factor))  # the decimal that the user wrote
    table = np.full((tokens + 1, config.choices + 1), 2**30, np.int32)
    for e in range(config.num_experts):
        own = Fraction(str((config.capacity_by_expert or {e: 1})[e]))
        for n in range(tokens + 1):
            share = factor * own * config.mean_selected * n / config.num_experts
            table[n, e] = max(1, math.ceil(share))
    return table
