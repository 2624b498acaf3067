"""Slots, dispatch and combine: small tables by hand, and plain loops as the oracle."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import dispatch as dispatch_module
from moejax.assign import capacity_slots, service_order
from moejax.dispatch import (
    capacity_table,
    combine,
    dispatch,
    expert_capacity,
    grouped_slots,
    kept_experts,
    row_weights,
    side_by_side,
    sort_by_expert,
)


def test_capacity_is_the_rounded_up_share_of_assignments():
    assert expert_capacity(16, num_experts=8, top_k=2, capacity_factor=1.0) == 4
    assert expert_capacity(16, num_experts=8, top_k=2, capacity_factor=1.25) == 5
    assert expert_capacity(17, num_experts=8, top_k=2, capacity_factor=1.0) == 5
    assert expert_capacity(1, num_experts=64, top_k=1, capacity_factor=0.01) == 1


def test_capacity_is_exact_where_float32_is_one_too_many():
    assert expert_capacity(7680, num_experts=8, top_k=1, capacity_factor=4.05) == 3888
    assert np.ceil(np.float32(4.05) * np.float32(7680) / np.float32(8)) == 3889


def test_capacity_is_never_more_than_the_tokens():
    assert expert_capacity(4, num_experts=2, top_k=1, capacity_factor=100.0) == 4
    assert expert_capacity(7, num_experts=2, top_k=2, capacity_factor=2.0) == 7


def test_capacity_table_goes_by_real_tokens():
    """8 experts, k=2, factor 1: one slot for up to 4 real tokens, two for up to 8, and so on."""
    table_t = capacity_table(12, num_experts=8, top_k=2, capacity_factor=1.0)
    np.testing.assert_array_equal(table_t, [1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3])


@functools.cache
def _compiled_slots(num_experts, rows_per_expert, priority):
    def assign(expert_ts, capacity):
        weight_ts = jnp.zeros(expert_ts.shape)  # neither `token` nor `rank` looks at it
        order_a = service_order(weight_ts, jax.random.key(0), priority)
        capacity_e = jnp.full(num_experts, capacity, jnp.int32)
        return capacity_slots(expert_ts, capacity_e, order_a, rows_per_expert=rows_per_expert)

    return jax.jit(assign)


@functools.cache
def _compiled_groups(num_experts, rows):
    return jax.jit(functools.partial(grouped_slots, num_experts=num_experts, rows=rows))


# Four tokens, experts A=0 and B=1, two slots each. Tokens 0 and 1 want A before B, 2 and 3 B
# before A.
CONTESTED = np.array([[0, 1], [0, 1], [1, 0], [1, 0]], np.int32)


def _capacity_slots(expert_ts, capacity, num_experts, rows_per_expert, priority="token"):
    assign = _compiled_slots(num_experts, rows_per_expert, priority)
    return assign(np.asarray(expert_ts, np.int32), capacity)


def test_token_priority_serves_all_choices_of_a_token_before_the_next_token():
    """Tokens 0 and 1 take both slots of A (rows 0, 1) and of B (rows 2, 3); 2 and 3 get none."""
    slots = _capacity_slots(CONTESTED, 2, 2, 2)
    np.testing.assert_array_equal(slots.slot_ts, [[0, 2], [1, 3], [4, 4], [4, 4]])
    np.testing.assert_array_equal(slots.assignment_r, [0, 2, 1, 3])


def test_rank_priority_serves_all_first_choices_first():
    """Every token gets its first choice: 0 and 1 fill A, 2 and 3 fill B.

    No second choice has room.
    """
    slots = _capacity_slots(CONTESTED, 2, 2, 2, "rank")
    np.testing.assert_array_equal(slots.slot_ts, [[0, 4], [1, 4], [2, 4], [3, 4]])
    np.testing.assert_array_equal(slots.assignment_r, [0, 2, 4, 6])


def test_rows_beyond_the_capacity_stay_empty():
    """Three rows an expert of which two may be used; expert 1 is asked once, expert 2 never."""
    slots = _capacity_slots([[0], [0], [1], [0]], 2, 3, 3)
    np.testing.assert_array_equal(slots.slot_ts, [[0], [1], [3], [9]])
    np.testing.assert_array_equal(slots.assignment_r, [0, 1, 4, 2, 4, 4, 4, 4, 4])


def test_padding_takes_no_slot():
    """Token 0 is padding (sentinel 2); the one slot of expert 0 goes to token 1."""
    slots = _capacity_slots([[2, 2], [0, 1], [0, 1]], 1, 2, 1)
    np.testing.assert_array_equal(slots.slot_ts, [[2, 2], [0, 1], [2, 2]])


def test_everybody_to_one_expert_keeps_the_first():
    slots = _capacity_slots([[3]] * 5, 2, 4, 2)
    np.testing.assert_array_equal(slots.slot_ts, [[6], [7], [8], [8], [8]])


def test_kept_experts_mark_what_was_dropped():
    slots = _capacity_slots(CONTESTED, 1, 2, 1)
    np.testing.assert_array_equal(
        kept_experts(jnp.asarray(CONTESTED), slots, 2), [[0, 1], [2, 2], [2, 2], [2, 2]]
    )


def test_grouped_slots_put_groups_one_after_the_other():
    """Of three experts 0 and 2 get 2 and 5 assignments: rows 0, 1 and 2 to 6."""
    expert_ts = np.array([[2], [0], [2], [2], [3], [0], [2], [2]], np.int32)
    slots = _compiled_groups(3, 9)(expert_ts)
    np.testing.assert_array_equal(slots.group_size_e, [2, 0, 5])
    np.testing.assert_array_equal(slots.slot_ts[:, 0], [2, 0, 3, 4, 9, 1, 5, 6])
    np.testing.assert_array_equal(slots.assignment_r, [1, 5, 0, 2, 3, 6, 7, 8, 8])


@pytest.mark.parametrize("max_key", [dispatch_module.MAX_KEY, 1])
def test_sort_by_expert(max_key, monkeypatch):
    """Assignments in order within an expert, padding last; by one key, or by two if it is full."""
    monkeypatch.setattr(dispatch_module, "MAX_KEY", max_key)
    expert_ts = np.array([[2, 0], [3, 3], [2, 1], [0, 2]], np.int32)
    groups = sort_by_expert(jnp.asarray(expert_ts), 3)
    np.testing.assert_array_equal(groups.assignment_a, [1, 6, 5, 0, 4, 7, 2, 3])
    np.testing.assert_array_equal(groups.start_e, [0, 2, 3])
    np.testing.assert_array_equal(groups.count_e, [2, 1, 3])


def _loop_slots(expert_ts, capacity, num_experts, rows_per_expert, priority):
    """The rule in words: each assignment, in order, takes the next free slot of its expert."""
    tokens, top_k = expert_ts.shape
    order = [(t, s) for t in range(tokens) for s in range(top_k)]
    if priority == "rank":
        order = [(t, s) for s in range(top_k) for t in range(tokens)]
    rows = num_experts * rows_per_expert
    slot_ts, used = np.full((tokens, top_k), rows), [0] * num_experts
    for t, s in order:
        e = expert_ts[t, s]
        if e < num_experts and used[e] < capacity:
            slot_ts[t, s] = e * rows_per_expert + used[e]
            used[e] += 1
    return slot_ts


SHAPES = [(1, 1, 1), (1, 3, 4), (6, 1, 3), (9, 2, 5), (12, 3, 3)]  # tokens, top_k, experts


@st.composite
def _routings(draw):
    tokens, top_k, experts = draw(st.sampled_from(SHAPES))
    choice = st.permutations(range(experts)).map(lambda p: p[:top_k])
    expert_ts = np.array(draw(st.lists(choice, min_size=tokens, max_size=tokens)), np.int32)
    mask_t = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    expert_ts[~np.array(mask_t)] = experts
    return expert_ts, experts


@hypothesis.settings(deadline=None, max_examples=80)
@hypothesis.given(_routings(), st.integers(1, 12), st.sampled_from(["token", "rank"]))
def test_capacity_slots_follow_the_rule(routing, capacity, priority):
    """Any routing, capacity and padding: the loop's slots, each given once, and their inverse."""
    expert_ts, experts = routing
    tokens, top_k = expert_ts.shape
    slots = _compiled_slots(experts, tokens, priority)(expert_ts, min(capacity, tokens))
    slot_ts = np.asarray(slots.slot_ts)
    expected = _loop_slots(expert_ts, min(capacity, tokens), experts, tokens, priority)
    np.testing.assert_array_equal(slot_ts, expected)
    rows = experts * tokens
    kept = slot_ts[slot_ts < rows]
    assert len(set(kept.tolist())) == len(kept)
    assignment_r = np.full(rows, tokens * top_k)
    assignment_r[kept] = np.flatnonzero(slot_ts.reshape(-1) < rows)
    np.testing.assert_array_equal(slots.assignment_r, assignment_r)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(_routings())
def test_grouped_slots_drop_nothing(routing):
    """Every real assignment has a row of its own inside its expert's group, in token order."""
    expert_ts, experts = routing
    rows = expert_ts.size
    slots = _compiled_groups(experts, rows)(expert_ts)
    counts = np.bincount(expert_ts.reshape(-1), minlength=experts + 1)[:experts]
    np.testing.assert_array_equal(slots.group_size_e, counts)
    expected = np.full(expert_ts.shape, rows)
    for e, start in enumerate(np.cumsum(counts) - counts):
        expected[expert_ts == e] = start + np.arange(counts[e])
    np.testing.assert_array_equal(slots.slot_ts, expected)


def _some_slots():
    """7 tokens, k=2, 4 experts with 2 slots in 3 rows: drops, a padding token and empty rows."""
    expert_ts = [[0, 1], [1, 0], [0, 2], [4, 4], [0, 1], [1, 2], [3, 0]]
    return _capacity_slots(expert_ts, 2, 4, 3)


def test_dispatch_and_combine_are_what_loops_say():
    slots = _some_slots()
    tokens, rows = 7, 12
    random = np.random.default_rng(0)
    x_td = random.normal(size=(tokens, 5)).astype(np.float32)
    out_rd = random.normal(size=(rows, 5)).astype(np.float32)
    weight_ts = random.uniform(size=(tokens, 2)).astype(np.float32)
    slot_ts = np.asarray(slots.slot_ts)
    buf_rd, y_td = np.zeros((rows, 5), np.float32), np.zeros((tokens, 5), np.float32)
    for t in range(tokens):
        for s in range(2):
            if slot_ts[t, s] < rows:
                buf_rd[slot_ts[t, s]] = x_td[t]
                y_td[t] += weight_ts[t, s] * out_rd[slot_ts[t, s]]
    assert (slot_ts == rows).sum() > 3
    assert (buf_rd == 0).all(1).sum() > 2
    np.testing.assert_array_equal(jax.jit(dispatch)(x_td, slots), buf_rd)

    @jax.jit
    def weighted(out_rd, weight_ts):
        return combine(out_rd * row_weights(weight_ts, slots)[:, None], slots)

    np.testing.assert_allclose(weighted(out_rd, weight_ts), y_td, rtol=1e-6, atol=1e-7)


def test_gradients_are_those_of_the_one_hot_version():
    slots = _some_slots()
    one_hot_tsr = jax.nn.one_hot(slots.slot_ts, 12)  # a slot past the last row is all 0

    def fast(x_td, scale_rd, weight_ts):
        out_rd = jnp.sin(dispatch(x_td, slots) * scale_rd)
        weighted_rd = out_rd * row_weights(weight_ts, slots)[:, None]
        return jnp.sum(jnp.cos(combine(weighted_rd, slots)))

    def naive(x_td, scale_rd, weight_ts):
        out_rd = jnp.sin(jnp.einsum("tsr,td->rd", one_hot_tsr, x_td) * scale_rd)
        return jnp.sum(jnp.cos(jnp.einsum("tsr,rd,ts->td", one_hot_tsr, out_rd, weight_ts)))

    arguments = (
        jax.random.normal(jax.random.key(0), (7, 5)),
        jax.random.normal(jax.random.key(1), (12, 5)),
        jax.random.uniform(jax.random.key(2), (7, 2)),
    )
    for actual, expected in zip(
        jax.jit(jax.grad(fast, argnums=(0, 1, 2)))(*arguments),
        jax.jit(jax.grad(naive, argnums=(0, 1, 2)))(*arguments),
        strict=True,
    ):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_combine_sums_bfloat16_rows_in_float32():
    """256 + 1 - 256 is 1; in bfloat16 the first sum is 256 again and the result 0.

    A CPU sums in float32 whatever the program says, so what it says is looked at too.
    """
    slots = _capacity_slots([[0, 1, 2]], 1, 3, 1)
    out_rd = jnp.array([[256.0], [1.0], [-256.0]], jnp.bfloat16)
    y_td = combine(out_rd, slots)
    assert y_td.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y_td.astype(jnp.float32), [[1.0]])
    program = str(jax.make_jaxpr(combine)(out_rd, slots))
    assert re.search(r":f32\S* = add ", program)
    assert not re.search(r":bf16\S* = (add|mul|reduce_sum|dot_general)\b", program)


def test_rows_that_no_token_owns_cannot_spoil_the_result():
    """Rows after the last group may hold anything, NaN too: no token and no gradient sees them."""
    expert_ts = np.array([[0], [2], [0]], np.int32)  # expert 2 is the sentinel
    slots = _compiled_groups(2, 8)(expert_ts)

    def loss(out_rd, weight_ts):
        return jnp.sum(combine(out_rd * row_weights(weight_ts, slots)[:, None], slots))

    out_rd = jnp.ones((8, 3)).at[2:].set(jnp.nan)
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (by_out, by_weight) = gradient(out_rd, jnp.ones((3, 1)))
    assert value == 6
    np.testing.assert_array_equal(by_weight, [[3.0], [0.0], [3.0]])
    np.testing.assert_array_equal(by_out, [[1.0] * 3] * 2 + [[0.0] * 3] * 6)


def test_groups_side_by_side_have_each_experts_rows_together():
    """Two groups of CONTESTED, 1 and 2 of 2 slots an expert: rows are [expert, group, slot].

    The first group's tokens 0 to 3 are 0 to 3 of all, the second's 4 to 7.
    """
    assign = _compiled_slots(2, 2, "token")
    groups = jax.vmap(assign)(np.stack([CONTESTED, CONTESTED]), jnp.array([1, 2]))
    slots = side_by_side(groups, 2)
    first, second = [[0, 4], [8, 8], [8, 8], [8, 8]], [[2, 6], [3, 7], [8, 8], [8, 8]]
    np.testing.assert_array_equal(slots.slot_ts, first + second)
    np.testing.assert_array_equal(slots.assignment_r, [0, 16, 8, 10, 1, 16, 9, 11])


@pytest.mark.parametrize("priority", ["token", "rank"])
def test_capacity_may_be_traced_and_differ_by_group(priority):
    assign = _compiled_slots(2, 3, priority)
    expert_gts = np.stack([CONTESTED, CONTESTED])
    both = jax.vmap(assign)(expert_gts, jnp.array([1, 3]))
    for group, capacity in enumerate((1, 3)):
        alone = assign(CONTESTED, capacity)
        np.testing.assert_array_equal(both.slot_ts[group], alone.slot_ts)
        np.testing.assert_array_equal(both.assignment_r[group], alone.assignment_r)
