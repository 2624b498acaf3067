"""exchange: the MoE layer's collectives over the expert axes, to call inside `shard_map` only.

`slots_to_experts` and `peers_exchange` are padded all-to-alls of equal parts. `Ragged` sends each
device exactly the rows that it is to get. `gather_tokens` moves tokens instead of assignments:
every device of an expert group sees all tokens of the group, and partial results are summed on the
way home.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moejax.config import EXPERT_AXES, FSDP_AXES
from moejax.sharding import vary_like, varying_axes

FSDP_AXIS = "fsdp"
CONTEXT_AXIS = "context"
TENSOR_AXIS = "tensor"


def _split(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of the axes that have more than one device; the first named is outermost."""
    return tuple(axis for axis in axes if lax.axis_size(axis) > 1)


def expert_degree() -> int:
    """Returns Z, the number of devices that the experts are split over."""
    return lax.axis_size(EXPERT_AXES)


def _expert_index() -> jax.Array:
    """Returns this device's place among the Z, in the order of the experts."""
    return lax.axis_index(_split(EXPERT_AXES))


def slots_to_experts(buf_ecd_local: jax.Array) -> jax.Array:
    """All-to-all to the experts: [E, C, ...] of local tokens -> [E/Z, Z*C, ...] of its experts."""
    degree = expert_degree()
    if degree == 1:
        return buf_ecd_local
    experts, slots, *rest = buf_ecd_local.shape
    parts_zecd = peers_exchange(buf_ecd_local).reshape(degree, experts // degree, slots, *rest)
    return parts_zecd.swapaxes(0, 1).reshape(experts // degree, degree * slots, *rest)


def slots_to_tokens(buf_ecd_expert: jax.Array) -> jax.Array:
    """The way back of `slots_to_experts`: [E/Z, Z*C, D] -> [E, C, D]."""
    degree = expert_degree()
    if degree == 1:
        return buf_ecd_expert
    local, slots, *rest = buf_ecd_expert.shape
    # Along the first dim: of an exchange along the second, libtpu 0.0.42 makes slow copies.
    parts_ezcd = buf_ecd_expert.reshape(local, degree, slots // degree, *rest)
    return peers_exchange(parts_ezcd.swapaxes(0, 1).reshape(local * degree, -1, *rest))


def peers_exchange(rows: jax.Array) -> jax.Array:
    """All-to-all of Z equal parts of rows [Z*R, ...]: part i goes to device i. Its own inverse."""
    if expert_degree() == 1:
        return rows
    return lax.all_to_all(rows, _split(EXPERT_AXES), split_axis=0, concat_axis=0, tiled=True)


def gather_tokens(x_td_local: jax.Array) -> jax.Array:
    """All-gather over the expert axes: [T, ...] of a device -> [Z*T, ...] of the expert group."""
    if expert_degree() == 1:
        return x_td_local
    return lax.all_gather(x_td_local, _split(EXPERT_AXES), tiled=True)


def scatter_results(y_td_global: jax.Array) -> jax.Array:
    """Reduce-scatter over the expert axes: partial [Z*T, D] -> this device's whole [T, D]."""
    if expert_degree() == 1:
        return y_td_global
    return lax.psum_scatter(y_td_global, _split(EXPERT_AXES), tiled=True)


def local_experts(expert_ts: jax.Array, num_experts: int) -> jax.Array:
    """Renumbers to this device's E/Z experts; every other one becomes the sentinel E/Z."""
    local = num_experts // expert_degree()
    index_ts = expert_ts - _expert_index() * local
    return jnp.where((index_ts >= 0) & (index_ts < local), index_ts, local)


class Ragged(NamedTuple):
    """Which rows go where in one ragged exchange, by (sender, receiver): int32 [Z, Z] each.

    Attributes:
        start: first row in the sender's buffer.
        size: number of rows.
        place: first row in the receiver's buffer.
    """

    start: jax.Array
    size: jax.Array
    place: jax.Array

    @property
    def back(self) -> "Ragged":
        """The exchange that takes every row to where it came from."""
        return Ragged(self.place.T, self.size.T, self.start.T)


def gather_counts(count_ze: jax.Array) -> jax.Array:
    """Returns int32 [Z, Z, E/Z]: the rows that each device has for each expert of each device."""
    return lax.all_gather(count_ze, _split(EXPERT_AXES))


def ragged_window(count_zz: jax.Array, index: jax.Array | int, rows: int) -> Ragged:
    """Returns round `index` of an exchange of `count_zz` rows into buffers of `rows` rows.

    A receiver's rows stand in the order of their senders; a round covers `rows` of them. A sender's
    rows stand in the order of their receivers.
    """
    start_zz = jnp.cumsum(count_zz, axis=1) - count_zz
    position_zz = jnp.cumsum(count_zz, axis=0) - count_zz - index * rows
    first_zz = jnp.clip(-position_zz, 0, count_zz)
    end_zz = jnp.clip(rows - position_zz, 0, count_zz)
    size_zz = jnp.maximum(end_zz - first_zz, 0)
    place_zz = jnp.where(size_zz > 0, position_zz + first_zz, 0)
    return Ragged(start_zz + first_zz, size_zz, place_zz)


def received_experts(count_zze: jax.Array, index: jax.Array | int, rows: int) -> jax.Array:
    """Returns int32 [rows]: the expert of each row received in round `index`, E/Z for no row.

    Computed from the counts of `gather_counts` alone (see `ragged_window`), since a sender's rows
    are in the order of their experts. Sending a number with each row would take 512 bytes a row on
    a TPU.
    """
    local = count_zze.shape[2]
    end_n = jnp.cumsum(count_zze[:, _expert_index()].reshape(-1))
    position_r = index * rows + jnp.arange(rows, dtype=jnp.int32)
    part_r = jnp.searchsorted(end_n, position_r, side="right")
    return jnp.where(position_r < end_n[-1], part_r % local, local).astype(jnp.int32)


def sent_in(plan: Ragged, row_ts: jax.Array) -> jax.Array:
    """Says which rows of this device's buffer the exchange sends: bool [T, S]."""
    me = _expert_index()
    start_z, end_z = plan.start[me], plan.start[me] + plan.size[me]
    row_ts1 = row_ts[..., None]
    return ((row_ts1 >= start_z[None, None]) & (row_ts1 < end_z[None, None])).any(-1)


def ragged_exchange(rows: jax.Array, plan: Ragged, out_rows: int) -> jax.Array:
    """Sends rows [N, ...] to where `plan` says: [out_rows, ...].

    Rows that receive nothing are undefined; the emulation makes them NaN. With one number per row,
    [N], they are 0.

    Uses `lax.ragged_all_to_all`. CPUs lack it and use an all-gather and a masked gather instead; so
    does one number per row everywhere, for which a TPU's ragged exchange would send 512 bytes.
    """
    rows, *fields = vary_like(rows, *plan)
    return _ragged_exchange(rows, Ragged(*fields), out_rows)


@jax.custom_vjp
def _ragged(rows, plan, out):
    if rows.ndim == 1:
        return _emulated(rows, plan, out)
    return lax.platform_dependent(rows, plan, out, cpu=_emulated, default=_native)


def _ragged_exchange(rows, plan, out_rows):
    out = lax.empty((out_rows, *rows.shape[1:]), rows.dtype)
    return _ragged(rows, plan, vary_like(out, rows)[0])


def _ragged_forward(rows, plan, out):
    return _ragged(rows, plan, out), (plan, rows.shape[0])


def _ragged_backward(saved, grad):
    plan, count = saved
    return _ragged_exchange(grad, plan.back, count), None, None


_ragged.defvjp(_ragged_forward, _ragged_backward)


def _native(rows, plan: Ragged, out):
    me = _expert_index()
    return lax.ragged_all_to_all(
        rows,
        out,
        plan.start[me],
        plan.size[me],
        plan.place[me],
        plan.size[:, me],
        axis_name=_split(EXPERT_AXES),
    )


def _emulated(rows, plan: Ragged, out):
    me = _expert_index()
    all_rows = lax.all_gather(rows, _split(EXPERT_AXES))
    place_z, size_z = plan.place[:, me], plan.size[:, me]
    row_r1 = jnp.arange(out.shape[0], dtype=jnp.int32)[:, None]
    inside_rz = (row_r1 >= place_z[None]) & (row_r1 < (place_z + size_z)[None])
    sender_r = jnp.argmax(inside_rz, axis=1)
    source_r = (plan.start[:, me] - place_z)[sender_r] + row_r1[:, 0]
    source_r = jnp.where(inside_rz.any(1), source_r, rows.shape[0])
    nothing = 0 if rows.ndim == 1 else jnp.nan
    return all_rows.at[sender_r, source_r].get(mode="fill", fill_value=nothing)


def gather_sequence(x_bt: jax.Array) -> jax.Array:
    """All-gather over the context axis: this device's part of each sequence -> whole sequences.

    [B, T/C, ...] -> [B, T, ...]; the transpose is a reduce-scatter.
    """
    if lax.axis_size(CONTEXT_AXIS) == 1:
        return x_bt
    return lax.all_gather(x_bt, CONTEXT_AXIS, axis=1, tiled=True)


def whole_sequence(x_bt: jax.Array) -> jax.Array:
    """`gather_sequence` for what every device of the context group then uses in the same way.

    The gradient that comes back is the same on all of them, so each only takes its own part of it.
    """
    if CONTEXT_AXIS not in varying_axes(x_bt):
        return x_bt
    return lax.all_gather(x_bt, CONTEXT_AXIS, axis=1, tiled=True, to="invarying")


def own_part(x: jax.Array, axis: int, parts: int) -> jax.Array:
    """Returns this device's part, of `parts`, of an array that its context group holds whole."""
    if parts == 1:
        return x
    size = x.shape[axis] // parts
    return lax.dynamic_slice_in_dim(x, lax.axis_index(CONTEXT_AXIS) * size, size, axis)


def gather_weights(w: jax.Array, axis: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Gathers a matrix over fsdp and expert_fsdp, in the compute dtype.

    The transpose is a reduce-scatter, not an all-reduce.
    """
    return _gathered(w.astype(dtype), axis, _split(FSDP_AXES))


def gather_experts(w_e: jax.Array, axis: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Gathers the matrices of this device's experts over fsdp; see `gather_weights`."""
    over = _split((FSDP_AXIS,))
    if not over or axis != 1 or w_e.shape[0] > 1:
        return _gathered(w_e.astype(dtype), axis, over)
    # Of the one expert of a device, libtpu 0.0.42 sums all of the gradient of a dim that is then
    # the outermost, and slices it: twice the bytes. Not if the devices have a dim of their own.
    whole = lax.all_gather(w_e.astype(dtype), over, axis=1)
    return whole.reshape(1, -1, *w_e.shape[2:])


def _gathered(w: jax.Array, axis: int, over: tuple[str, ...]) -> jax.Array:
    return lax.all_gather(w, over, axis=axis, tiled=True) if over else w


def sum_weight_gradient(grad: jax.Array, axis: int) -> jax.Array:
    """The way back of `gather_weights`: sums a whole weight's gradient over all tokens' devices.

    By a reduce-scatter over fsdp and expert_fsdp, so that each device keeps its part.
    """
    if over := _split(FSDP_AXES):
        grad = lax.psum_scatter(grad, over, scatter_dimension=axis, tiled=True)
    axes = tuple(a for a in varying_axes(grad) if a not in (*FSDP_AXES, TENSOR_AXIS))
    return lax.psum(grad, axes) if axes else grad


def sum_tensor(y: jax.Array) -> jax.Array:
    """Sums partial products of a dim that is split over the tensor axis."""
    return y if lax.axis_size(TENSOR_AXIS) == 1 else lax.psum(y, TENSOR_AXIS)


def most_over_tensor(y: jax.Array) -> jax.Array:
    """Returns the largest of the values of the devices on the tensor axis."""
    return y if lax.axis_size(TENSOR_AXIS) == 1 else lax.pmax(y, TENSOR_AXIS)


def tensor_index() -> jax.Array | int:
    """Returns this device's place on the tensor axis."""
    return 0 if lax.axis_size(TENSOR_AXIS) == 1 else lax.axis_index(TENSOR_AXIS)


def most(count: jax.Array) -> jax.Array:
    """Returns the largest of all devices' counts."""
    axes = varying_axes(count)
    return lax.pmax(count, axes) if axes else count
