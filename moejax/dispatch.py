"""assign, dispatch, combine: each assignment's row in an expert's buffer, the way there and back.

A *slot* is a row of a buffer in which the rows of one expert are consecutive. There are two
layouts: `assign.capacity_slots` gives every expert the same number of rows and drops what does not
fit; `grouped_slots` gives each expert the rows that it needs. Both sort assignments by expert; no
array of tokens x experts x capacity exists. `dispatch` and `combine` are gathers in both directions
of differentiation, never scatters of rows.
"""

import functools
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MAX_KEY = 2**32  # of a uint32


class Slots(NamedTuple):
    """Where the assignments of one scope go. An assignment is (token, choice), number t * S + s.

    Attributes:
        slot_ts: int32 [T, S]; the row of each assignment, R (one past the last row) if it has none.
        assignment_r: int32 [R]; the assignment in each row, T * S for an empty row.
        group_size_e: int32 [E]; rows given to each expert, the empty ones at their end included.
    """

    slot_ts: jax.Array
    assignment_r: jax.Array
    group_size_e: jax.Array


def expert_capacity(
    tokens: int, num_experts: int, top_k: int, capacity_factor: float | Fraction
) -> int:
    """Returns ceil(capacity_factor * top_k * tokens / num_experts), at least 1, at most `tokens`.

    Computed in exact arithmetic on the decimal that the user wrote: in float32 7680 * 4.05 / 8 is
    one more. A token selects an expert at most once, so more slots than tokens would stay empty.

    Args:
        tokens: real tokens in the group, padding not counted.
    """
    exact = Fraction(str(capacity_factor)) * top_k * tokens / num_experts
    capacity = max(1, -(-exact.numerator // exact.denominator))
    return min(capacity, max(1, tokens))


def capacity_table(
    tokens: int, num_experts: int, top_k: int, capacity_factor: float | Fraction
) -> np.ndarray:
    """Returns int32 [tokens + 1]: the capacity of a group by its number of real tokens."""
    return np.array(
        [expert_capacity(n, num_experts, top_k, capacity_factor) for n in range(tokens + 1)],
        np.int32,
    )


class Groups(NamedTuple):
    """The assignments of one scope, those of an expert together. A is T * S.

    Attributes:
        assignment_a: int32 [A]; by expert, in the given order within one; at the end those that
            have no expert.
        start_e: int32 [E]; where in `assignment_a` each expert's begin.
        count_e: int32 [E]; how many each expert has.
    """

    assignment_a: jax.Array
    start_e: jax.Array
    count_e: jax.Array


def sort_by_expert(expert_ts: jax.Array, num_experts: int) -> Groups:
    """Sorts assignments by expert.

    Args:
        expert_ts: int32 [T, S]; num_experts marks no assignment.
    """
    expert_a = expert_ts.reshape(-1).astype(jnp.uint32)
    index_a = jnp.arange(expert_a.size, dtype=jnp.uint32)
    bound_e = jnp.arange(num_experts + 1, dtype=jnp.uint32)
    if expert_a.size * (num_experts + 1) < MAX_KEY:
        # One key that holds both sorts 4 times faster on a CPU than a key and a payload.
        key_a = jnp.sort(expert_a * np.uint32(expert_a.size) + index_a)
        index_a = key_a % np.uint32(expert_a.size)
        end_e = jnp.searchsorted(key_a, bound_e * np.uint32(expert_a.size))
    else:
        expert_a, index_a = jax.lax.sort((expert_a, index_a), is_stable=True, num_keys=1)
        end_e = jnp.searchsorted(expert_a, bound_e)
    end_e = end_e.astype(jnp.int32)
    return Groups(index_a.astype(jnp.int32), end_e[:-1], jnp.diff(end_e))


def rank_in_expert(expert_ts: jax.Array, num_experts: int) -> tuple[jax.Array, Groups]:
    """Returns each assignment's place among its expert's, in the order given; undefined if none."""
    groups = sort_by_expert(expert_ts, num_experts)
    start_ts = groups.start_e.at[expert_ts].get(mode="clip")
    place_a = jnp.zeros(expert_ts.size, jnp.int32)
    place_a = place_a.at[groups.assignment_a].set(
        jnp.arange(expert_ts.size, dtype=jnp.int32), unique_indices=True
    )
    return place_a.reshape(expert_ts.shape) - start_ts, groups


def rows_of_slots(slot_ts: jax.Array, rows: int, group_size_e: jax.Array | None = None) -> Slots:
    """Returns the `Slots` of a buffer of `rows` rows; `slot_ts` is the row of each assignment."""
    assignment_a = jnp.arange(slot_ts.size, dtype=jnp.int32)
    empty_r = jnp.full(rows, slot_ts.size, jnp.int32)
    assignment_r = empty_r.at[slot_ts.reshape(-1)].set(
        assignment_a, mode="drop", unique_indices=True
    )
    return Slots(
        slot_ts, assignment_r, jnp.zeros(0, jnp.int32) if group_size_e is None else group_size_e
    )


def grouped_slots(expert_ts: jax.Array, *, num_experts: int, rows: int) -> Slots:
    """Gives each expert the rows that its assignments need.

    Args:
        expert_ts: int32 [T, S]; num_experts marks no assignment.
        rows: rows of the buffer, at least the number of assignments.
    """
    rank_ts, groups = rank_in_expert(expert_ts, num_experts)
    start_ts = groups.start_e.at[expert_ts].get(mode="clip")
    slot_ts = jnp.where(expert_ts < num_experts, start_ts + rank_ts, rows)
    return rows_of_slots(slot_ts, rows, groups.count_e)


def side_by_side(slots: Slots, num_experts: int) -> Slots:
    """Returns the slots of one buffer for G groups, each expert's C rows of all groups together.

    So no buffer is transposed on its way to the experts. Rows are [E, G, C].

    Args:
        slots: of each group, with a leading G; rows of each [E, C].
    """
    groups, _, top_k = slots.slot_ts.shape
    rows, assignments = slots.assignment_r.shape[1], slots.slot_ts[0].size
    part = rows // num_experts
    group_g = jnp.arange(groups, dtype=jnp.int32)
    slot_gts, group_g11 = slots.slot_ts, group_g[:, None, None]
    place_gts = (slot_gts // part * groups + group_g11) * part + slot_gts % part
    slot_gts = jnp.where(slot_gts < rows, place_gts, groups * rows)
    number_gr = slots.assignment_r + group_g[:, None] * assignments
    number_gr = jnp.where(slots.assignment_r < assignments, number_gr, groups * assignments)
    number_gec = number_gr.reshape(groups, num_experts, part)
    return Slots(
        slot_gts.reshape(-1, top_k),
        number_gec.swapaxes(0, 1).reshape(-1),
        slots.group_size_e.sum(0),
    )


@jax.custom_vjp
def dispatch(x_td: jax.Array, slots: Slots) -> jax.Array:
    """Copies each token to the rows of its assignments: [T, D] -> [R, D], empty rows 0."""
    top_k = slots.slot_ts.shape[-1]
    return x_td.at[slots.assignment_r // top_k].get(mode="fill", fill_value=0)


def _dispatch_forward(x_td, slots):
    return dispatch(x_td, slots), slots


def _dispatch_backward(slots, grad_rd):
    return combine(grad_rd, slots), _no_gradient(slots)


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(out_rd: jax.Array, slots: Slots) -> jax.Array:
    """Sums each token's rows: y_t = sum_s out[slot_ts]. [R, D] -> [T, D]; `dispatch` transposed.

    The sum is float32; the result has the dtype of `out_rd`. A dropped assignment adds nothing.
    Combine weights are in the rows already, see `row_weights`.
    """
    # Choice by choice: one gather of [T, S, D] would be written to memory and read again.
    y_td = jnp.zeros((slots.slot_ts.shape[0], out_rd.shape[1]), jnp.float32)
    for s in range(slots.slot_ts.shape[1]):
        y_td += out_rd.at[slots.slot_ts[:, s]].get(mode="fill", fill_value=0).astype(jnp.float32)
    return y_td.astype(out_rd.dtype)


def _combine_forward(out_rd, slots):
    return combine(out_rd, slots), slots


def _combine_backward(slots, grad_td):
    return dispatch(grad_td, slots), _no_gradient(slots)


combine.defvjp(_combine_forward, _combine_backward)


@jax.custom_vjp
def row_weights(weight_ts: jax.Array, slots: Slots) -> jax.Array:
    """Copies each assignment's combine weight to its row: [T, S] -> [R], empty rows 0.

    Experts weight their own rows: the gradient of a weight then needs what the expert computes
    anyway, not the rows that it sent home.
    """
    return weight_ts.reshape(-1).at[slots.assignment_r].get(mode="fill", fill_value=0)


def _row_weights_forward(weight_ts, slots):
    return row_weights(weight_ts, slots), slots


def _row_weights_backward(slots, grad_r):
    grad_ts = grad_r.at[slots.slot_ts].get(mode="fill", fill_value=0)
    return grad_ts, _no_gradient(slots)


row_weights.defvjp(_row_weights_forward, _row_weights_backward)


def _no_gradient(slots: Slots) -> Slots:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), slots)


@functools.partial(jax.named_call, name="assign")
def kept_experts(expert_ts: jax.Array, slots: Slots, num_experts: int) -> jax.Array:
    """Returns `expert_ts` with `num_experts` in place of every assignment that got no slot."""
    return jnp.where(slots.slot_ts < slots.assignment_r.shape[-1], expert_ts, num_experts)
