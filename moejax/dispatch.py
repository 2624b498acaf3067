"""assign, dispatch, combine: each assignment's row in an expert's buffer, the way there and back.

A *slot* is a row of a buffer in which the rows of one expert are consecutive. There are two
layouts: `capacity_slots` gives every expert the same number of rows and drops what does not fit;
`grouped_slots` gives each expert the rows that it needs. Both sort assignments by expert; no array
of tokens x experts x capacity exists. `dispatch` and `combine` are gathers in both directions of
differentiation, never scatters of rows.
"""

import functools
from fractions import Fraction
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.sharding import vary_like


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


def expert_capacity(tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Returns ceil(capacity_factor * top_k * tokens / num_experts), at least 1, at most `tokens`.

    Computed in exact arithmetic on the decimal that the user wrote: in float32 7680 * 4.05 / 8 is
    one more. A token selects an expert at most once, so more slots than tokens would stay empty.

    Args:
        tokens: real tokens in the group, padding not counted.
    """
    exact = Fraction(str(capacity_factor)) * top_k * tokens / num_experts
    capacity = max(1, -(-exact.numerator // exact.denominator))
    return min(capacity, max(1, tokens))


def capacity_table(tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> np.ndarray:
    """Returns int32 [tokens + 1]: the capacity of a group by its number of real tokens."""
    return np.array(
        [expert_capacity(n, num_experts, top_k, capacity_factor) for n in range(tokens + 1)],
        np.int32,
    )


def _rank_in_expert(expert_a: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Returns each assignment's place among its expert's, in the order given, and counts [E]."""
    order_a = jnp.argsort(expert_a, stable=True)
    sorted_a = expert_a[order_a]
    start_e = jnp.searchsorted(sorted_a, jnp.arange(num_experts + 1, dtype=sorted_a.dtype))
    index_a = jnp.arange(expert_a.size, dtype=jnp.int32)
    rank_sorted_a = index_a - start_e.astype(jnp.int32)[sorted_a]
    rank_a = jnp.zeros_like(expert_a).at[order_a].set(rank_sorted_a, unique_indices=True)
    return rank_a, jnp.diff(start_e).astype(jnp.int32)


def _fill_rows(slot_ts: jax.Array, rows: int) -> jax.Array:
    """Returns `assignment_r` for `slot_ts`."""
    assignment_a = jnp.arange(slot_ts.size, dtype=jnp.int32)
    empty_r = jnp.full(rows, slot_ts.size, jnp.int32)
    return empty_r.at[slot_ts.reshape(-1)].set(assignment_a, mode="drop", unique_indices=True)


def capacity_slots(
    expert_ts: jax.Array,
    capacity: jax.Array | int,
    *,
    num_experts: int,
    rows_per_expert: int,
    priority: Literal["token", "rank"] = "token",
) -> Slots:
    """Gives each expert `rows_per_expert` rows, of which the first `capacity` are used.

    Priority `token` goes token by token, a token's choices in order: no earlier token depends on a
    later one. Priority `rank` (GShard, Lepikhin et al. 2020) serves all first choices before any
    second; it is not causal.

    Args:
        expert_ts: int32 [T, S] of one group; num_experts marks no assignment.
        capacity: slots an expert has, at most `rows_per_expert`; may be traced.
    """
    tokens, top_k = expert_ts.shape
    if priority == "rank":
        rank_a, _ = _rank_in_expert(expert_ts.T.reshape(-1), num_experts)
        rank_ts = rank_a.reshape(top_k, tokens).T
    else:
        rank_ts = _rank_in_expert(expert_ts.reshape(-1), num_experts)[0].reshape(tokens, top_k)
    rows = num_experts * rows_per_expert
    kept_ts = (rank_ts < capacity) & (expert_ts < num_experts)
    slot_ts = jnp.where(kept_ts, expert_ts * rows_per_expert + rank_ts, rows)
    group_size_e = jnp.full(num_experts, rows_per_expert, jnp.int32)
    return Slots(slot_ts, _fill_rows(slot_ts, rows), group_size_e)


def grouped_slots(expert_ts: jax.Array, *, num_experts: int, rows: int, align: int) -> Slots:
    """Gives each expert the rows that its assignments need, rounded up to a multiple of `align`.

    Args:
        expert_ts: int32 [T, S]; num_experts marks no assignment.
        rows: rows of the buffer, enough for every routing: see `grouped_rows`.
    """
    tokens, top_k = expert_ts.shape
    rank_a, count_e = _rank_in_expert(expert_ts.reshape(-1), num_experts)
    group_size_e = -(-count_e // align) * align
    start_e = jnp.cumsum(group_size_e) - group_size_e
    expert_a = expert_ts.reshape(-1)
    start_a = start_e.at[expert_a].get(mode="fill", fill_value=0)
    slot_a = jnp.where(expert_a < num_experts, start_a + rank_a, rows)
    slot_ts = slot_a.reshape(tokens, top_k)
    return Slots(slot_ts, _fill_rows(slot_ts, rows), group_size_e)


def grouped_rows(tokens: int, top_k: int, num_experts: int, align: int) -> int:
    """Returns the rows that `grouped_slots` needs whatever the routing: every group aligned up."""
    assignments = tokens * min(top_k, num_experts)
    rows = assignments + num_experts * (align - 1)
    return -(-rows // align) * align


@jax.custom_vjp
def dispatch(x_td: jax.Array, slots: Slots) -> jax.Array:
    """Copies each token to the rows of its assignments: [T, D] -> [R, D], empty rows 0."""
    top_k = slots.slot_ts.shape[-1]
    return x_td.at[slots.assignment_r // top_k].get(mode="fill", fill_value=0)


def _dispatch_forward(x_td, slots):
    return dispatch(x_td, slots), slots


def _dispatch_backward(slots, grad_rd):
    grad_tsd = grad_rd.at[slots.slot_ts].get(mode="fill", fill_value=0)
    return grad_tsd.sum(1), _no_gradient(slots)


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


def combine(out_rd: jax.Array, weight_ts: jax.Array, slots: Slots) -> jax.Array:
    """Sums each token's rows by weight: y_t = sum_s weight_ts * out[slot_ts]. [R, D] -> [T, D].

    Products and sum are float32; the result has the dtype of `out_rd`. A dropped assignment adds
    nothing.
    """
    return _combine(*vary_like(out_rd, weight_ts), slots)


@jax.custom_vjp
def _combine(out_rd, weight_ts, slots):
    out_tsd = out_rd.at[slots.slot_ts].get(mode="fill", fill_value=0)
    y_td = jnp.einsum("tsd,ts->td", out_tsd, weight_ts, preferred_element_type=jnp.float32)
    return y_td.astype(out_rd.dtype)


def _combine_forward(out_rd, weight_ts, slots):
    return _combine(out_rd, weight_ts, slots), (out_rd, weight_ts, slots)


def _combine_backward(saved, grad_td):
    out_rd, weight_ts, slots = saved
    top_k = weight_ts.shape[-1]
    weight_r = weight_ts.reshape(-1).at[slots.assignment_r].get(mode="fill", fill_value=0)
    grad_rd = grad_td.at[slots.assignment_r // top_k].get(mode="fill", fill_value=0)
    grad_out_rd = (grad_rd * weight_r[:, None].astype(grad_rd.dtype)).astype(out_rd.dtype)
    out_tsd = out_rd.at[slots.slot_ts].get(mode="fill", fill_value=0)
    grad_weight_ts = jnp.einsum("tsd,td->ts", out_tsd, grad_td, preferred_element_type=jnp.float32)
    return grad_out_rd, grad_weight_ts, _no_gradient(slots)


_combine.defvjp(_combine_forward, _combine_backward)


def _no_gradient(slots: Slots) -> Slots:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), slots)


@functools.partial(jax.named_call, name="assign")
def kept_experts(expert_ts: jax.Array, slots: Slots, num_experts: int) -> jax.Array:
    """Returns `expert_ts` with `num_experts` in place of every assignment that got no slot."""
    return jnp.where(slots.slot_ts < slots.assignment_r.shape[-1], expert_ts, num_experts)
