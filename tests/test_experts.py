"""The expert networks and the grouped matmul, against loops over experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.experts import (
    block_rows,
    capacity_experts,
    grouped_experts,
    grouped_matmul,
    swiglu,
)

D, F, BLOCK = 6, 10, 8


def _random(seed, *shapes):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def _value_and_gradients(matmul, x_rd, w_edf, group_size_e, grad_rf):
    out_rf, transpose = jax.vjp(lambda x, w: matmul(x, w, group_size_e), x_rd, w_edf)
    return out_rf, *transpose(grad_rf)


_grouped = jax.jit(
    functools.partial(_value_and_gradients, functools.partial(grouped_matmul, block=BLOCK))
)
_ragged = jax.jit(functools.partial(_value_and_gradients, jax.lax.ragged_dot))


def _loop(x_rd, w_edf, group_size_e, grad_rf):
    """The product and its two gradients, group by group in float64; 0 after the last group."""
    x_rd, w_edf, grad_rf = (np.asarray(a, np.float64) for a in (x_rd, w_edf, grad_rf))
    out_rf, by_x, by_w = np.zeros_like(grad_rf), np.zeros_like(x_rd), np.zeros_like(w_edf)
    start = 0
    for e, size in enumerate(group_size_e):
        rows = slice(start, start + size)
        out_rf[rows] = x_rd[rows] @ w_edf[e]
        by_x[rows] = grad_rf[rows] @ w_edf[e].T
        by_w[e] = x_rd[rows].T @ grad_rf[rows]
        start += size
    return out_rf, by_x, by_w


GROUPS = {
    "two empty groups": [8, 0, 16, 0],
    "first group empty": [0, 8, 8, 8],
    "one group has all": [0, 0, 40, 0],
    "nothing at all": [0, 0, 0, 0],
    "every row is used": [16, 8, 8, 8],
    "one expert": [24],
    "64 experts, most empty": [8 if e in (3, 11, 12, 63) else 0 for e in range(64)],
}


@pytest.mark.parametrize("group_size_e", GROUPS.values(), ids=GROUPS)
def test_grouped_matmul_is_a_loop_over_groups(group_size_e):
    """Value and both gradients; rows after the last group hold NaN, in x and in the gradient."""
    rows, used = 40, sum(group_size_e)
    x_rd, grad_rf, w_edf = _random(0, (rows, D), (rows, F), (len(group_size_e), D, F))
    x_rd[used:] = grad_rf[used:] = np.nan
    expected = _loop(x_rd, w_edf, group_size_e, grad_rf)
    out_rf, by_x, by_w = _grouped(x_rd, w_edf, np.array(group_size_e, np.int32), grad_rf)
    np.testing.assert_allclose(out_rf[:used], expected[0][:used], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_x[:used], expected[1][:used], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_w, expected[2], rtol=1e-4, atol=1e-5)
    for e, size in enumerate(group_size_e):
        assert np.any(np.asarray(by_w[e])) == (size > 0)


def test_grouped_matmul_is_ragged_dot():
    """On a CPU the two differ: a loop over blocks here, a dense product of all experts there."""
    x_rd, grad_rf, w_edf = _random(1, (40, D), (40, F), (4, D, F))
    group_size_e = np.array([8, 0, 16, 8], np.int32)
    x_rd[32:] = grad_rf[32:] = 0
    ours = _grouped(x_rd, w_edf, group_size_e, grad_rf)
    theirs = _ragged(x_rd, w_edf, group_size_e, grad_rf)
    for actual, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    lowered = _grouped.lower(x_rd, w_edf, group_size_e, grad_rf).as_text()
    assert "stablehlo.while" in lowered


def test_grouped_matmul_in_bfloat16():
    """A weight's gradient over many blocks is summed in float32 before it is rounded.

    The last expert's 2048 rows of ones: a sum in bfloat16 would stop growing at 256.
    """
    rows = 2056
    x_rd, grad_rf, w_edf = _random(2, (rows, D), (rows, F), (2, D, F))
    x_rd[8:], grad_rf[8:] = 1, 1
    arguments = [jnp.asarray(a, jnp.bfloat16) for a in (x_rd, w_edf, grad_rf)]
    x_rd, w_edf, grad_rf = (np.asarray(a.astype(jnp.float32)) for a in arguments)
    group_size_e = [8, 2048]
    actual = _grouped(arguments[0], arguments[1], np.array(group_size_e, np.int32), arguments[2])
    for ours, expected in zip(actual, _loop(x_rd, w_edf, group_size_e, grad_rf), strict=True):
        assert ours.dtype == jnp.bfloat16
        scale = np.abs(expected).max()
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, atol=0.01 * scale)
    np.testing.assert_array_equal(actual[2][1].astype(jnp.float32), np.full((D, F), 2048.0))


def test_capacity_experts_run_each_network_on_its_rows():
    buf_ecd, gate_edf, up_edf, down_efd = _random(3, (3, 5, D), (3, D, F), (3, D, F), (3, F, D))
    out_ecd = jax.jit(capacity_experts)(buf_ecd, gate_edf, up_edf, down_efd)
    for e in range(3):
        hidden = buf_ecd[e] @ gate_edf[e]
        hidden = hidden / (1 + np.exp(-hidden)) * (buf_ecd[e] @ up_edf[e])
        np.testing.assert_allclose(out_ecd[e], hidden @ down_efd[e], rtol=1e-4, atol=1e-4)


def test_grouped_experts_run_each_network_on_its_group():
    x_rd, gate_edf, up_edf, down_efd = _random(4, (24, D), (3, D, F), (3, D, F), (3, F, D))
    run = jax.jit(functools.partial(grouped_experts, block=BLOCK))
    out_rd = run(x_rd, gate_edf, up_edf, down_efd, np.array([16, 0, 8], np.int32))
    first = swiglu(x_rd[:16], gate_edf[0], up_edf[0], down_efd[0])
    last = swiglu(x_rd[16:], gate_edf[2], up_edf[2], down_efd[2])
    np.testing.assert_allclose(out_rd, np.concatenate([first, last]), rtol=1e-4, atol=1e-4)


def test_block_rows_follow_the_average_group():
    assert block_rows(assignments=64, num_experts=64) == 8  # the smallest
    assert block_rows(assignments=8 * 40, num_experts=8) == 32
    assert block_rows(assignments=8 * 64, num_experts=8) == 64
    assert block_rows(assignments=10**6, num_experts=8) == 128  # the largest
