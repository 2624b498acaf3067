"""exchange: the MoE layer's collectives over the expert axis, to call inside `shard_map` only.

`all_to_all` moves slots: every device sends each expert's rows to the device that holds the expert,
and gets them back. `gather` moves tokens: every device of an expert group sees all tokens of the
group, runs its own experts on those that chose them, and the partial results are summed on the way
home; its shapes are static for any routing.
"""

import jax
from einops import rearrange
from jax import lax

EXPERT_AXIS = "expert"
FSDP_AXIS = "fsdp"
TENSOR_AXIS = "tensor"


def expert_degree() -> int:
    """Returns Z, the number of devices that the experts are split over."""
    return lax.axis_size(EXPERT_AXIS)


def slots_to_experts(buf_ecd_local: jax.Array) -> jax.Array:
    """All-to-all to the experts: [E, C, D] of local tokens -> [E/Z, Z*C, D] of local experts."""
    if expert_degree() == 1:
        return buf_ecd_local
    return lax.all_to_all(buf_ecd_local, EXPERT_AXIS, split_axis=0, concat_axis=1, tiled=True)


def slots_to_tokens(buf_ecd_expert: jax.Array) -> jax.Array:
    """The way back of `slots_to_experts`: [E/Z, Z*C, D] -> [E, C, D]."""
    if expert_degree() == 1:
        return buf_ecd_expert
    return lax.all_to_all(buf_ecd_expert, EXPERT_AXIS, split_axis=1, concat_axis=0, tiled=True)


def gather_tokens(x_td_local: jax.Array) -> jax.Array:
    """All-gather over the expert axis: [T, ...] of a device -> [Z*T, ...] of the expert group."""
    if expert_degree() == 1:
        return x_td_local
    return lax.all_gather(x_td_local, EXPERT_AXIS, tiled=True)


def scatter_results(y_td_global: jax.Array) -> jax.Array:
    """Reduce-scatter over the expert axis: partial [Z*T, D] -> this device's whole [T, D]."""
    if expert_degree() == 1:
        return y_td_global
    return lax.psum_scatter(y_td_global, EXPERT_AXIS, tiled=True)


def local_experts(expert_ts: jax.Array, num_experts: int) -> jax.Array:
    """Renumbers to this device's E/Z experts; every other one becomes the sentinel E/Z."""
    local = num_experts // expert_degree()
    index_ts = expert_ts - lax.axis_index(EXPERT_AXIS) * local
    return jax.numpy.where((index_ts >= 0) & (index_ts < local), index_ts, local)


def gather_weights(w: jax.Array, axis: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Gathers a weight over fsdp, in the compute dtype.

    The transpose is a reduce-scatter, not an all-reduce.
    """
    w = w.astype(dtype)
    return (
        w if lax.axis_size(FSDP_AXIS) == 1 else lax.all_gather(w, FSDP_AXIS, axis=axis, tiled=True)
    )


def sum_tensor(y: jax.Array) -> jax.Array:
    """Sums the partial products of the experts' hidden dim over the tensor axis."""
    return lax.psum(y, TENSOR_AXIS)


def groups_to_slots(buf_gecd: jax.Array) -> jax.Array:
    """Puts the groups of a device side by side: [G, E, C, D] -> [E, G*C, D]."""
    return rearrange(buf_gecd, "g e c d -> e (g c) d")


def slots_to_groups(buf_ecd: jax.Array, groups: int) -> jax.Array:
    """The way back of `groups_to_slots`."""
    return rearrange(buf_ecd, "e (g c) d -> g e c d", g=groups)
