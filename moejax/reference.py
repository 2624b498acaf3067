"""The dense oracle: the MoE layer, same signature, written the slow, obvious way on one device.

Every expert runs on every token; what was not selected, or was dropped, gets weight 0. Slots are
counted with a running sum, assignment by assignment. It shares `route` and `router_stats` with the
fast layer (they have tests of their own) and nothing of dispatch, exchange or experts.
"""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import MoEConfig
from moejax.experts import MoEWeights
from moejax.mesh import AnyMesh
from moejax.routing import RouterStats, route, router_stats


def apply_moe(
    weights: MoEWeights,
    x_btd: jax.Array,
    mask_bt: jax.Array,
    bias_e: jax.Array | None,
    *,
    config: MoEConfig,
    mesh: AnyMesh | None = None,
) -> tuple[jax.Array, RouterStats]:
    """Same as `moe.apply_moe`; `mesh` is ignored."""
    del mesh
    dtype, num_experts = x_btd.dtype, config.num_experts
    logit_bte = jnp.einsum(
        "btd,de->bte", x_btd, weights.router.astype(dtype), preferred_element_type=jnp.float32
    )
    routing = route(logit_bte, mask_bt, bias_e, config)
    kept_bts = routing.expert_ts
    if config.capacity_factor is not None:
        kept_bts = _drop(kept_bts, mask_bt, config)
    chosen_btse = jax.nn.one_hot(kept_bts, num_experts, dtype=jnp.float32)
    gate_bte = jnp.einsum("bts,btse->bte", routing.weight_ts, chosen_btse)
    hidden_btef = jax.nn.silu(jnp.einsum("btd,edf->btef", x_btd, weights.gate.astype(dtype)))
    hidden_btef *= jnp.einsum("btd,edf->btef", x_btd, weights.up.astype(dtype))
    out_bted = jnp.einsum("btef,efd->bted", hidden_btef, weights.down.astype(dtype))
    y_btd = jnp.einsum("bted,bte->btd", out_bted, gate_bte, preferred_element_type=jnp.float32)
    return y_btd.astype(dtype), router_stats(routing, kept_bts, mask_bt)


def _drop(expert_bts: jax.Array, mask_bt: jax.Array, config: MoEConfig) -> jax.Array:
    """Replaces by E each assignment that comes after its expert's slots are taken."""
    batch, _, top_k = expert_bts.shape
    groups = batch // config.group_sequences
    expert_gts = expert_bts.reshape(groups, -1, top_k)
    real_g = mask_bt.reshape(groups, -1).sum(1)
    if config.priority == "rank":
        ordered_ga = expert_gts.swapaxes(1, 2).reshape(groups, -1)
    else:
        ordered_ga = expert_gts.reshape(groups, -1)
    used_gae = jnp.cumsum(jax.nn.one_hot(ordered_ga, config.num_experts, dtype=jnp.int32), axis=1)
    place_ga = jnp.take_along_axis(
        jnp.pad(used_gae, ((0, 0), (0, 0), (0, 1))), ordered_ga[..., None], axis=2
    )[..., 0]
    capacity_n = np.array([_capacity(n, config) for n in range(expert_gts.shape[1] + 1)])
    kept_ga = jnp.where(
        place_ga <= jnp.asarray(capacity_n)[real_g][:, None], ordered_ga, config.num_experts
    )
    if config.priority == "rank":
        kept_gts = kept_ga.reshape(groups, top_k, -1).swapaxes(1, 2)
    else:
        kept_gts = kept_ga.reshape(expert_gts.shape)
    return kept_gts.reshape(expert_bts.shape)


def _capacity(tokens: int, config: MoEConfig) -> int:
    factor = Fraction(str(config.capacity_factor))  # the decimal that the user wrote
    return max(1, math.ceil(factor * config.top_k * tokens / config.num_experts))
