"""experts: the stacked SwiGLU networks, over equal buffers or over groups of rows of any size."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moejax.sharding import vary_like

BLOCK_ROWS = 128  # of the CPU's grouped matmul; groups smaller than that use a smaller block


class MoEWeights(NamedTuple):
    """The weights of one layer: router [D, E], gate and up [E, D, F], down [E, F, D]."""

    router: jax.Array
    gate: jax.Array
    up: jax.Array
    down: jax.Array


def swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """Returns down(silu(gate(x)) * up(x)) (Shazeer 2020).

    Shapes: [..., D], [D, F], [D, F], [F, D] -> [..., D].
    """
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def capacity_experts(
    buf_ecd: jax.Array, gate_edf: jax.Array, up_edf: jax.Array, down_efd: jax.Array
) -> jax.Array:
    """Runs each expert on its own rows of a buffer with equal groups: [E, C, D] -> [E, C, D]."""
    gate_ecf = jnp.einsum("ecd,edf->ecf", buf_ecd, gate_edf)
    up_ecf = jnp.einsum("ecd,edf->ecf", buf_ecd, up_edf)
    return jnp.einsum("ecf,efd->ecd", jax.nn.silu(gate_ecf) * up_ecf, down_efd)


def grouped_experts(
    x_rd: jax.Array,
    gate_edf: jax.Array,
    up_edf: jax.Array,
    down_efd: jax.Array,
    group_size_e: jax.Array,
    block: int,
) -> jax.Array:
    """Runs each expert on its own consecutive rows: [R, D] -> [R, D]; see `grouped_matmul`."""
    matmul = functools.partial(grouped_matmul, group_size_e=group_size_e, block=block)
    hidden_rf = jax.nn.silu(matmul(x_rd, gate_edf)) * matmul(x_rd, up_edf)
    return matmul(hidden_rf, down_efd)


def block_rows(assignments: int, num_experts: int) -> int:
    """Returns the block (a power of two, 8 to BLOCK_ROWS) that wastes little on average groups."""
    average = max(1, assignments // num_experts)
    return max(8, min(BLOCK_ROWS, 1 << (average.bit_length() - 1)))


def grouped_matmul(
    x_rd: jax.Array, w_edf: jax.Array, group_size_e: jax.Array, block: int
) -> jax.Array:
    """Multiplies each group of rows with its expert's matrix: [R, D], [E, D, F] -> [R, F].

    The rows of a group are consecutive. Rows after the last group hold no data: their output and
    gradient are undefined on some platforms, so nothing may read them. On a CPU the work is
    proportional to the rows in groups, since `lax.ragged_dot` lowers there to one product over all
    rows for every expert; elsewhere it is `lax.ragged_dot`.

    Args:
        group_size_e: int32 [E]; multiples of `block` whose sum is at most R. R is a multiple of
            `block` too.
    """
    assert x_rd.shape[0] % block == 0, (x_rd.shape, block)
    return _grouped_matmul(*vary_like(x_rd, w_edf, group_size_e), block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x_rd, w_edf, group_size_e, block):
    return lax.platform_dependent(
        x_rd,
        w_edf,
        group_size_e,
        cpu=functools.partial(_blocked_matmul, block=block),
        default=lax.ragged_dot,
    )


def _grouped_forward(x_rd, w_edf, group_size_e, block):
    return _grouped_matmul(x_rd, w_edf, group_size_e, block), (x_rd, w_edf, group_size_e)


def _grouped_backward(block, saved, grad_rf):
    x_rd, w_edf, group_size_e = saved
    grad_rd, grad_edf = lax.platform_dependent(
        x_rd,
        w_edf,
        group_size_e,
        grad_rf,
        cpu=functools.partial(_blocked_gradients, block=block),
        default=_ragged_gradients,
    )
    return grad_rd, grad_edf, None


_grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


def _ragged_gradients(x_rd, w_edf, group_size_e, grad_rf):
    _, transpose = jax.vjp(lambda x, w: lax.ragged_dot(x, w, group_size_e), x_rd, w_edf)
    return transpose(grad_rf)


def _block_experts(group_size_e, rows, block):
    """Returns the expert of every block of `block` rows, and how many blocks hold data."""
    end_e = jnp.cumsum(group_size_e)
    first_row_n = jnp.arange(0, rows, block, dtype=end_e.dtype)
    expert_n = jnp.searchsorted(end_e, first_row_n, side="right").astype(jnp.int32)
    return expert_n, (end_e[-1] // block).astype(jnp.int32)


def _blocked_matmul(x_rd, w_edf, group_size_e, *, block):
    expert_n, blocks = _block_experts(group_size_e, x_rd.shape[0], block)

    def body(n, out_rf):
        x_bd = lax.dynamic_slice_in_dim(x_rd, n * block, block)
        w_df = lax.dynamic_index_in_dim(w_edf, expert_n[n], keepdims=False)
        return lax.dynamic_update_slice_in_dim(out_rf, x_bd @ w_df, n * block, 0)

    out_rf = jnp.zeros((x_rd.shape[0], w_edf.shape[-1]), x_rd.dtype)
    return lax.fori_loop(0, blocks, body, vary_like(out_rf, x_rd)[0])


def _blocked_gradients(x_rd, w_edf, group_size_e, grad_rf, *, block):
    expert_n, blocks = _block_experts(group_size_e, x_rd.shape[0], block)

    def body(n, carry):
        grad_rd, grad_edf = carry
        grad_bf = lax.dynamic_slice_in_dim(grad_rf, n * block, block)
        x_bd = lax.dynamic_slice_in_dim(x_rd, n * block, block)
        w_df = lax.dynamic_index_in_dim(w_edf, expert_n[n], keepdims=False)
        grad_rd = lax.dynamic_update_slice_in_dim(grad_rd, grad_bf @ w_df.T, n * block, 0)
        grad_df = jnp.matmul(x_bd.T, grad_bf, preferred_element_type=jnp.float32)
        grad_df += lax.dynamic_index_in_dim(grad_edf, expert_n[n], keepdims=False)
        return grad_rd, lax.dynamic_update_index_in_dim(grad_edf, grad_df, expert_n[n], 0)

    start = vary_like(jnp.zeros_like(x_rd), jnp.zeros(w_edf.shape, jnp.float32), x_rd)[:2]
    grad_rd, grad_edf = lax.fori_loop(0, blocks, body, start)
    return grad_rd, grad_edf.astype(w_edf.dtype)
