"""experts: the stacked networks, over equal buffers or over whatever rows each expert was given.

The weights of E experts are a dict: up [E, D, F], down [E, F, D], gate [E, D, F] if the activation
is gated, and optionally a scale of the output: output_scale [E, D], or scale_in [D, R] with
scale_out [E, R, D], which scale by sigmoid((x @ scale_in) @ scale_out[e]).
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moejax.dispatch import (
    Groups,
    combine,
    dispatch,
    grouped_slots,
    row_weights,
    sort_by_expert,
)
from moejax.moe_config import Activation
from moejax.sharding import vary_like, vary_tree

Weights = dict[str, jax.Array]

GATED = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}
PLAIN = {
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
}
SHARED = "scale_in"  # the one weight without a leading E

HIDDEN_BYTES, LANES = 1 << 28, 128  # of hidden activations at once, see `_over_width`
MAX_BLOCK = 128  # rows of a block of the tail
CHUNK_ROWS, CHUNK_BYTES = 256, 1 << 24  # of the head, see `_plan`


def feed_forward(x: jax.Array, weights: Weights, activation: Activation) -> jax.Array:
    """Returns one network's output: x [..., D], gate and up [D, F], down [F, D]; no expert dim.

    With "swiglu" down(silu(gate(x)) * up(x)) (Shazeer 2020).
    """
    up = x @ weights["up"]
    if activation in GATED:
        return (GATED[activation](x @ weights["gate"]) * up) @ weights["down"]
    return PLAIN[activation](up) @ weights["down"]


def capacity_experts(
    buf_ecd: jax.Array,
    weight_ec: jax.Array | None,
    weights: Weights,
    activation: Activation,
) -> jax.Array:
    """Runs each expert on its own rows of a buffer with equal groups: [E, C, D] -> [E, C, D].

    Args:
        weight_ec: float32 [E, C]; what each row's output is multiplied by; None is 1.
    """
    # Marked as varying once, so that over a tensor axis one sum goes back, not one a matrix.
    buf_ecd, weight_ec, weights = vary_tree((buf_ecd, weight_ec, weights))
    per_expert, rows = _share(buf_ecd, weights)
    run = functools.partial(_run_network, _stacked_network(activation))
    size = buf_ecd.shape[0] * buf_ecd.shape[1]
    return _over_width(run, per_expert, size, buf_ecd.dtype, rows, weight_ec)


def dropless_experts(
    x_td: jax.Array,
    expert_ts: jax.Array,
    weight_ts: jax.Array,
    weights: Weights,
    *,
    activation: Activation,
    rows: int,
    expected_rows: int | None = None,
    in_order: bool = False,
) -> jax.Array:
    """Runs every assignment: assign, dispatch, experts and combine for tokens of this device.

    On a CPU the work is proportional to the assignments whatever the routing, see `_head_and_tail`.
    Elsewhere each matmul is one grouped product over rows sorted by expert.

    Args:
        x_td: [T, D].
        expert_ts: int32 [T, S], of a token all different; E marks no assignment.
        weight_ts: float32 [T, S]; combine weights.
        rows: a bound on the assignments that are not E; buffers off the CPU have that many rows.
        expected_rows: how many there are usually; default `rows`. Sizes what is computed at once.
        in_order: says that S is 1 and `expert_ts` ascends, so that nothing has to be sorted. What
            is returned for a row without an assignment is then not defined.

    Returns:
        [T, D]: y_t = sum_s weight_ts * expert_ts(x_t), summed in float32, in the dtype of x.
    """
    x_td, expert_ts, weight_ts, weights = vary_tree((x_td, expert_ts, weight_ts, weights))
    num_experts, d_model, hidden = weights["up"].shape
    if SHARED in weights:  # whose gradient is a sum over all rows, and those of nobody may be NaN
        x_td = jnp.where((expert_ts < num_experts).any(1, keepdims=True), x_td, 0)
    per_expert, tokens = _share(x_td, weights)
    row_bytes = (d_model + hidden) * x_td.dtype.itemsize
    expected_rows = expected_rows or rows
    plan = _plan(x_td.shape[0], num_experts, expected_rows, row_bytes)
    sorts = not in_order or SHARED in weights  # whose gradient is a sum over all rows
    by_groups = functools.partial(_by_groups, activation, rows if sorts else None)
    return lax.platform_dependent(
        tokens,
        expert_ts,
        weight_ts,
        per_expert,
        cpu=functools.partial(_head_and_tail, _stacked_network(activation), plan),
        cuda=functools.partial(by_groups, _gpu_grouped_matmul),
        rocm=functools.partial(by_groups, _gpu_grouped_matmul),
        default=functools.partial(by_groups, functools.partial(_tpu_matmul, expected_rows)),
    )


def dropless_modules(
    x_td: jax.Array,
    expert_ts: jax.Array,
    weight_ts: jax.Array,
    params: Any,
    apply_one: Callable[[Any, jax.Array], jax.Array],
    *,
    rows: int,
    expected_rows: int | None = None,
    in_order: bool = False,
) -> jax.Array:
    """`dropless_experts` for experts of one's own; the backward pass runs `apply_one` again.

    Args:
        params: a pytree whose leaves have a leading dim E.
        apply_one: (one expert's params, rows [R, D]) -> [R, D], row by row, 0 or finite for a row
            of zeros. It must not close over traced arrays.
    """
    row_bytes = 4 * x_td.shape[1] * x_td.dtype.itemsize  # what is inside an expert is its own
    plan = _plan(x_td.shape[0], _num_experts(params), expected_rows or rows, row_bytes)
    operands = vary_tree(({"x": x_td}, expert_ts, weight_ts, params))
    return _head_and_tail(_module_network(apply_one), plan, *operands)


def capacity_modules(
    buf_ecd: jax.Array,
    weight_ec: jax.Array | None,
    params: Any,
    apply_one: Callable[[Any, jax.Array], jax.Array],
) -> jax.Array:
    """`capacity_experts` for experts of one's own, see `dropless_modules`."""
    return _weigh(jax.vmap(apply_one)(params, buf_ecd), weight_ec)


def _share(x, weights: Weights) -> tuple[Weights, Weights]:
    """Splits into weights with a leading E and what is a token's own: x, and x @ scale_in."""
    per_expert = {name: w for name, w in weights.items() if name != SHARED}
    tokens = {"x": x}
    if SHARED in weights:
        tokens["scale"] = x @ weights[SHARED]
    return per_expert, tokens


# The network on rows: [E, C, ...] with weights [E, ...].


class Network(NamedTuple):
    """A stack of networks and its backward pass. `weight_ec` scales the rows; None is 1.

    Attributes:
        forward: (weights, rows, weight_ec) -> (outputs [E, C, D], what the backward pass needs).
        backward: (weights, rows, weight_ec, saved, dy_ecd) -> gradients of (weights, rows,
            weight_ec), those of the weights in float32.
    """

    forward: Callable
    backward: Callable


def _hidden(pre: Weights, activation: Activation) -> jax.Array:
    """Returns the hidden activations, float32, from those before the activation function."""
    pre = {name: value.astype(jnp.float32) for name, value in pre.items()}
    if activation in GATED:
        return GATED[activation](pre["gate"]) * pre["up"]
    return PLAIN[activation](pre["up"])


def _output_scale(weights: Weights, rows: Weights) -> jax.Array | None:
    if "output_scale" in weights:
        return jnp.broadcast_to(weights["output_scale"][:, None, :], rows["x"].shape)
    if "scale_out" in weights:
        return jax.nn.sigmoid(jnp.einsum("ecr,erd->ecd", rows["scale"], weights["scale_out"]))
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_network(network: Network, weights, rows, weight_ec):
    return network.forward(weights, rows, weight_ec)[0]


def _run_network_forward(network, weights, rows, weight_ec):
    out_ecd, saved = network.forward(weights, rows, weight_ec)
    return out_ecd, (weights, rows, weight_ec, saved)


def _run_network_backward(network, residuals, dy_ecd):
    weights, rows, weight_ec, saved = residuals
    dweights, drows, dweight_ec = network.backward(weights, rows, weight_ec, saved, dy_ecd)
    dweights, drows = _cast_like((dweights, drows), (weights, rows))
    return dweights, drows, None if weight_ec is None else dweight_ec


_run_network.defvjp(_run_network_forward, _run_network_backward)


def _cast_like(tree, like):
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)


def _over_width(
    run: Callable[..., jax.Array],
    weights: Weights,
    rows: int,
    dtype: jax.typing.DTypeLike,
    *operands: Any,
) -> jax.Array:
    """Returns `run(weights, *operands)`, its sum over the hidden width in parts where it is large.

    Of the hidden activations of a part the backward pass keeps none: a layer's are more than the
    state of many a model. They are computed again, as they are under `model.remat=full` anyway.

    Args:
        run: closes over no traced array.
        rows: of all experts together.
    """
    wide = {"gate": 2, "up": 2, "down": 1}  # the dim of the hidden width
    hidden = weights["up"].shape[2]
    parts = _width_parts(hidden, rows * jnp.dtype(dtype).itemsize)
    if parts == 1:
        return run(weights, *operands)
    size, total = hidden // parts, None
    # A policy of remat that keeps an operand by its name keeps it once for every part; this copy,
    # which XLA leaves out, has none.
    operands = jax.tree.map(lambda a: jnp.expand_dims(a, 0).squeeze(0), operands)
    for n in range(parts):
        # Not `lax.split`: Mixtral at a capacity then took 2.9 GiB and 0.6 G cycles more
        part = {
            name: lax.slice_in_dim(w, n * size, (n + 1) * size, axis=wide[name])
            if name in wide
            else w
            for name, w in weights.items()
        }
        out = jax.checkpoint(run)(part, *operands).astype(jnp.float32)
        total = out if total is None else total + out
    assert total is not None
    return total.astype(dtype)


def _width_parts(hidden: int, column_bytes: int) -> int:
    """Returns into how many parts of whole lanes a hidden width is split, to hold `HIDDEN_BYTES`.

    The fewest that do, or as many as there can be.
    """
    if hidden * column_bytes <= HIDDEN_BYTES:
        return 1
    possible = [n for n in range(1, hidden + 1) if hidden % n == 0 and hidden // n % LANES == 0]
    enough = (n for n in possible if hidden // n * column_bytes <= HIDDEN_BYTES)
    return next(enough, (possible or [1])[-1])


def _weigh(x_ecf, weight_ec):
    """Returns weight_ec * x, multiplied in float32, in the dtype of x."""
    if weight_ec is None:
        return x_ecf
    return (x_ecf.astype(jnp.float32) * weight_ec[..., None]).astype(x_ecf.dtype)


def _network_forward(activation, weights, rows, weight_ec):
    names = [name for name in ("gate", "up") if name in weights]
    pre = {name: jnp.einsum("ecd,edf->ecf", rows["x"], weights[name]) for name in names}
    hidden_ecf = _weigh(_hidden(pre, activation), weight_ec)
    out_ecd = jnp.einsum("ecf,efd->ecd", hidden_ecf.astype(rows["x"].dtype), weights["down"])
    scale = _output_scale(weights, rows)
    return out_ecd if scale is None else out_ecd * scale, pre


def _times_transposed(x_ecf: jax.Array, w_edf: jax.Array) -> jax.Array:
    """Returns x @ w^T for each expert: [E, C, F], [E, D, F] -> [E, C, D]."""
    if x_ecf.shape[1] >= 128:
        return jnp.einsum("ecf,edf->ecd", x_ecf, w_edf)
    # A CPU's matmul packs its second operand: with few rows the weights had better be the first.
    out_edc = jnp.einsum("edf,ecf->edc", w_edf, x_ecf)
    return lax.optimization_barrier(out_edc).swapaxes(1, 2)  # or XLA swaps them back


def _network_backward(activation, weights, rows, weight_ec, pre, dy_ecd):
    dtype = dy_ecd.dtype
    outer = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    hidden_ecf, hidden_vjp = jax.vjp(lambda p: _hidden(p, activation), pre)
    scale, scale_vjp = jax.vjp(_output_scale, weights, rows)
    dout_ecd = dy_ecd if scale is None else dy_ecd * scale  # not yet weighted
    dhidden_ecf = _times_transposed(dout_ecd, weights["down"]).astype(jnp.float32)
    dweight_ec = jnp.sum(hidden_ecf * dhidden_ecf, axis=-1)
    (dpre,) = hidden_vjp(_weigh(dhidden_ecf, weight_ec))
    weighted_ecf = _weigh(hidden_ecf, weight_ec).astype(dtype)
    dweights = {name: outer("ecd,ecf->edf", rows["x"], d) for name, d in dpre.items()}
    dweights["down"] = outer("ecf,ecd->efd", weighted_ecf, dout_ecd)
    dx_ecd = sum(_times_transposed(d, weights[name]) for name, d in dpre.items())
    drows = {"x": dx_ecd}
    if scale is not None:
        out_ecd = jnp.einsum("ecf,efd->ecd", weighted_ecf, weights["down"])
        from_scale, rows_from_scale = scale_vjp((out_ecd * dy_ecd).astype(scale.dtype))
        for name in ("output_scale", "scale_out"):
            if name in weights:
                dweights[name] = from_scale[name].astype(jnp.float32)
        drows |= {"scale": rows_from_scale["scale"]} if "scale" in rows else {}
    return dweights, drows, dweight_ec


def _stacked_network(activation: Activation) -> Network:
    return Network(
        functools.partial(_network_forward, activation),
        functools.partial(_network_backward, activation),
    )


def _module_network(apply_one: Callable) -> Network:
    apply = jax.vmap(apply_one)

    def forward(params, rows, weight_ec):
        out_ecd = apply(params, rows["x"])
        return _weigh(out_ecd, weight_ec), ()

    def backward(params, rows, weight_ec, saved, dy_ecd):
        _, vjp = jax.vjp(lambda p, r, w: forward(p, r, w)[0], params, rows, weight_ec)
        dparams, drows, dweight_ec = vjp(dy_ecd)
        return jax.tree.map(lambda d: d.astype(jnp.float32), dparams), drows, dweight_ec

    return Network(forward, backward)


# A CPU's dropless experts.


class _Plan(NamedTuple):
    """Static sizes: C rows an expert in the head, rows of a tail block, chunks of the head."""

    head: int
    block: int
    chunks: int


def _plan(tokens: int, num_experts: int, rows: int, row_bytes: int) -> _Plan:
    """Sizes for `rows` expected assignments.

    Two standard deviations of a perfect router's load fit into the head. With few rows an expert,
    as in decoding, there is no head: it would read the weights of all experts. Many rows an expert
    go in chunks: fresh memory costs more than the copy of the weights that a chunk makes.
    """
    mean = rows / num_experts
    head = 0 if mean < 2 else min(tokens, -(-math.ceil(mean + 2 * mean**0.5) // 8) * 8)
    block = max(8, min(MAX_BLOCK, 1 << int(mean / 8).bit_length()))
    chunks = 1
    while (
        head >= CHUNK_ROWS
        and num_experts % (2 * chunks) == 0
        and num_experts * head * row_bytes > chunks * CHUNK_BYTES
    ):
        chunks *= 2
    return _Plan(head, block, chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _head_and_tail(network: Network, plan: _Plan, tokens, expert_ts, weight_ts, weights):
    """Each expert's first `head` assignments in one batched product, the rest block by block.

    The head has the same number of rows for all experts: XLA:CPU runs a batched matmul without
    copying a weight. The tail is a loop over blocks of rows of one expert, which copies that
    expert's weights; there are as many blocks as the routing needs, none if it is balanced.
    """
    return _head_and_tail_forward(network, plan, tokens, expert_ts, weight_ts, weights)[0]


def _head_and_tail_forward(network, plan, tokens, expert_ts, weight_ts, weights):
    with jax.named_scope("assign"):
        groups = sort_by_expert(expert_ts, _num_experts(weights))
    rows_of = functools.partial(_take_rows, tokens, weight_ts)

    def run(y_td, assignment_ec, weights):
        token_ec, rows, weight_ec = rows_of(assignment_ec)
        with jax.named_scope("experts"):
            out_ecd, saved = network.forward(weights, rows, weight_ec)
        return _add_rows(y_td, token_ec, out_ecd), saved

    def tail(n, y_td):
        assignment_1b, expert = _tail_block(groups, plan, n, expert_ts.size)
        return run(y_td, assignment_1b, _slice_expert(weights, expert))[0]

    y_td = _like(jnp.zeros(tokens["x"].shape, jnp.float32), tokens["x"])
    saved = None
    if plan.head:
        y_td, saved = _over_head(run, y_td, _head(groups, plan, expert_ts.size), plan, weights)
    y_td = lax.fori_loop(0, _tail_blocks(groups, plan).sum(), tail, y_td)
    return y_td.astype(tokens["x"].dtype), (tokens, weight_ts, weights, groups, saved)


def _head_and_tail_backward(network, plan, residuals, dy_td):
    tokens, weight_ts, weights, groups, saved = residuals
    rows_of = functools.partial(_take_rows, tokens, weight_ts)
    size = weight_ts.size

    def run(carry, assignment_ec, weights, saved):
        dtokens, dweight_a = carry
        token_ec, rows, weight_ec = rows_of(assignment_ec)
        with jax.named_scope("combine"):
            dy_ecd = dy_td.at[token_ec].get(mode="fill", fill_value=0)
        with jax.named_scope("experts"):
            if saved is None:
                saved = network.forward(weights, rows, weight_ec)[1]
            dweights, drows, dweight_ec = network.backward(weights, rows, weight_ec, saved, dy_ecd)
        dtokens = {name: _add_rows(dtokens[name], token_ec, drows[name]) for name in dtokens}
        dweight_a = dweight_a.at[assignment_ec].set(dweight_ec, mode="drop", unique_indices=True)
        return (dtokens, dweight_a), dweights

    def tail(n, carry):
        carry, dweights = carry
        assignment_1b, expert = _tail_block(groups, plan, n, size)
        carry, more = run(carry, assignment_1b, _slice_expert(weights, expert), None)
        add = functools.partial(_add_expert, expert=expert)
        return carry, jax.tree.map(add, dweights, more)

    zeros = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    carry = _like((jax.tree.map(zeros, tokens), zeros(weight_ts).reshape(-1)), dy_td)
    if plan.head:
        carry, dweights = _over_head(run, carry, _head(groups, plan, size), plan, weights, saved)
    else:
        dweights = _like(jax.tree.map(zeros, weights), dy_td)
    blocks = _tail_blocks(groups, plan).sum()
    (dtokens, dweight_a), dweights = lax.fori_loop(0, blocks, tail, (carry, dweights))
    dtokens, dweights = _cast_like((dtokens, dweights), (tokens, weights))
    dexpert_ts = np.zeros(weight_ts.shape, jax.dtypes.float0)
    return dtokens, dexpert_ts, dweight_a.reshape(weight_ts.shape), dweights


_head_and_tail.defvjp(_head_and_tail_forward, _head_and_tail_backward)


def _num_experts(weights) -> int:
    return jax.tree.leaves(weights)[0].shape[0]


def _like(tree, array):
    return jax.tree.map(lambda leaf: vary_like(leaf, array)[0], tree)


def _take_rows(tokens, weight_ts, assignment_ec):
    """Returns each row's token, what it holds and its weight; 0 where there is no assignment."""
    with jax.named_scope("dispatch"):
        token_ec = assignment_ec // weight_ts.shape[1]
        rows = {k: v.at[token_ec].get(mode="fill", fill_value=0) for k, v in tokens.items()}
        weight_ec = weight_ts.reshape(-1).at[assignment_ec].get(mode="fill", fill_value=0)
    return token_ec, rows, weight_ec


@functools.partial(jax.named_call, name="combine")
def _add_rows(y_td, token_ec, out_ecd):
    return y_td.at[token_ec].add(out_ecd.astype(y_td.dtype), mode="drop")


def _over_head(run, carry, assignment_ec, plan: _Plan, *stacked):
    """Returns `run(carry, assignment_ec, *stacked)`, done in chunks of experts."""
    if plan.chunks == 1:
        return run(carry, assignment_ec, *stacked)
    xs = jax.tree.map(lambda a: a.reshape(plan.chunks, -1, *a.shape[1:]), (assignment_ec, *stacked))
    carry, out = lax.scan(lambda carry, x: run(carry, *x), carry, xs)
    return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)


def _head(groups: Groups, plan: _Plan, size: int) -> jax.Array:
    """Returns int32 [E, head]: each expert's first assignments, `size` for an empty row."""
    rank_ec = jnp.arange(plan.head, dtype=jnp.int32)[None]
    return _assignments_at(groups, groups.start_e[:, None], groups.count_e[:, None], rank_ec, size)


def _assignments_at(groups: Groups, start, count, rank, size):
    """Returns the assignment of each rank in an expert's group, `size` for one past its end."""
    place = jnp.where(rank < count, start + rank, size)
    return groups.assignment_a.at[place].get(mode="fill", fill_value=size)


def _tail_blocks(groups: Groups, plan: _Plan) -> jax.Array:
    """Returns int32 [E]: blocks that each expert's assignments beyond the head fill."""
    return -(-jnp.maximum(groups.count_e - plan.head, 0) // plan.block)


def _tail_block(groups: Groups, plan: _Plan, n, size):
    """Returns the n-th tail block's assignments [1, block] and its expert."""
    blocks_e = _tail_blocks(groups, plan)
    end_e = jnp.cumsum(blocks_e)
    expert = jnp.searchsorted(end_e, n, side="right").astype(jnp.int32)
    nth = n - (end_e[expert] - blocks_e[expert])
    rank_b = plan.head + nth * plan.block + jnp.arange(plan.block)
    start, count = groups.start_e[expert], groups.count_e[expert]
    return _assignments_at(groups, start, count, rank_b, size)[None], expert


def _slice_expert(weights, expert):
    return jax.tree.map(lambda w: lax.dynamic_slice_in_dim(w, expert, 1), weights)


def _add_expert(total, more, *, expert):
    old = lax.dynamic_slice_in_dim(total, expert, 1)
    return lax.dynamic_update_slice_in_dim(total, old + more, expert, 0)


# Everywhere else.

TILE_ROWS = 128  # of a TPU's matmul
NO_TOKAMAX = (
    "WITHOUT TOKAMAX, DROPLESS EXPERTS ARE SLOW ON A GPU: XLA lowers ragged_dot there to a dense "
    "product over all experts, num_experts times the FLOPs; pip install tokamax, or set "
    "moe.capacity_factor"
)


def _by_groups(activation, rows, grouped_matmul, tokens, expert_ts, weight_ts, weights):
    """Rows sorted by expert, up to `rows`, and one grouped product a matrix; None: as they are."""
    num_experts = _num_experts(weights)
    run = functools.partial(_on_groups, activation, grouped_matmul, weights)
    if rows is None:
        expert_r = expert_ts.reshape(-1)
        numbers_e1 = jnp.arange(num_experts, dtype=jnp.int32)[:, None]
        size_e = (expert_r[None] == numbers_e1).sum(1, dtype=jnp.int32)
        return run(tokens, expert_r, weight_ts.reshape(-1), size_e)
    with jax.named_scope("assign"):
        slots = grouped_slots(expert_ts, num_experts=num_experts, rows=rows)
        expert_r = expert_ts.reshape(-1).at[slots.assignment_r].get(mode="fill", fill_value=0)
    with jax.named_scope("dispatch"):
        rows_r = {name: dispatch(x, slots) for name, x in tokens.items()}
    out_rd = run(rows_r, expert_r, row_weights(weight_ts, slots), slots.group_size_e)
    with jax.named_scope("combine"):
        return combine(out_rd, slots)


@functools.partial(jax.named_call, name="experts")
def _on_groups(activation, grouped_matmul, weights, rows_r, expert_r, weight_r, size_e):
    """The network on rows [R, ...] in groups of `size_e` rows; undefined behind the last one."""
    x_rd = rows_r["x"]

    def run(weights: Weights, x_rd, weight_r, size_e) -> jax.Array:
        names = [name for name in ("gate", "up") if name in weights]
        pre = {name: grouped_matmul(x_rd, weights[name], group_sizes=size_e) for name in names}
        hidden_rf = _weigh(_hidden(pre, activation), weight_r).astype(x_rd.dtype)
        return grouped_matmul(hidden_rf, weights["down"], group_sizes=size_e)

    out_rd = _over_width(run, weights, x_rd.shape[0], x_rd.dtype, x_rd, weight_r, size_e)
    if "output_scale" in weights:
        return _scaled(out_rd, weights["output_scale"].at[expert_r].get(mode="clip"), size_e)
    if "scale_out" in weights:
        scale_rd = grouped_matmul(rows_r["scale"], weights["scale_out"], group_sizes=size_e)
        scale_rd = jax.nn.sigmoid(scale_rd)
        return _scaled(out_rd, scale_rd, size_e)
    return out_rd


def _scaled(out_rd, scale_rd, size_e):
    """Returns the product, 0 behind the last group: gradients of scales are sums over all rows."""
    owned_r1 = jnp.arange(out_rd.shape[0])[:, None] < size_e.sum()
    return jnp.where(owned_r1, out_rd, 0) * jnp.where(owned_r1, scale_rd, 0)


def _gpu_grouped_matmul(x_rd, w_edf, group_sizes):
    """`lax.ragged_dot`, by Tokamax's kernel if that is installed."""
    matmul = _tokamax_ragged_dot() or lax.ragged_dot
    return matmul(x_rd, w_edf, group_sizes=group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tpu_matmul(expected_rows, x_rd, w_edf, group_sizes):
    """`lax.ragged_dot`, whose own gradient of the weights is a dense product on a TPU.

    libtpu 0.0.42 has kernels for the product and for the gradient of the rows only.
    """
    return lax.ragged_dot(x_rd, w_edf, group_sizes)


def _tpu_forward(expected_rows, x_rd, w_edf, group_sizes):
    return lax.ragged_dot(x_rd, w_edf, group_sizes), (x_rd, w_edf, group_sizes)


def _tpu_backward(expected_rows, saved, dy_rf):
    x_rd, w_edf, group_sizes = saved
    dx_rd = lax.ragged_dot(dy_rf, w_edf.swapaxes(1, 2), group_sizes)
    dw_edf = _grouped_outer(expected_rows, x_rd, dy_rf, group_sizes)
    dgroup_sizes = np.zeros(group_sizes.shape, jax.dtypes.float0)
    return dx_rd.astype(x_rd.dtype), dw_edf.astype(w_edf.dtype), dgroup_sizes


_tpu_matmul.defvjp(_tpu_forward, _tpu_backward)


def _grouped_outer(expected_rows, x_rd, dy_rf, size_e):
    """Returns x_e^T dy_e of each expert's rows, float32 [E, D, F].

    One batched product over each expert's first rows, as many as nearly all have where the load of
    `expected_rows` is balanced, and then a quarter of them at a time while any expert has more.
    """
    rows, mean = x_rd.shape[0], expected_rows / size_e.shape[0]
    first = min(rows, _in_tiles(mean + 2 * mean**0.5))
    more = min(first, _in_tiles(first / 4))
    start_e = jnp.cumsum(size_e) - size_e

    def product(start, count):
        rank_c = start + jnp.arange(count, dtype=jnp.int32)
        row_ec = jnp.where(rank_c[None] < size_e[:, None], start_e[:, None] + rank_c[None], rows)
        x_ecd = x_rd.at[row_ec].get(mode="fill", fill_value=0)
        dy_ecf = dy_rf.at[row_ec].get(mode="fill", fill_value=0)
        return jnp.einsum("ecd,ecf->edf", x_ecd, dy_ecf, preferred_element_type=jnp.float32)

    def body(carry):
        start, total_edf = carry
        return start + more, total_edf + product(start, more)

    most = size_e.max()
    carry = (lax.full_like(most, first), product(0, first))
    return lax.while_loop(lambda carry: carry[0] < most, body, carry)[1]


def _in_tiles(rows: float) -> int:
    """Returns `rows` rounded up to whole tiles."""
    return -(-math.ceil(rows) // TILE_ROWS) * TILE_ROWS


@functools.cache
def _tokamax_ragged_dot() -> Callable | None:
    """Returns Tokamax's grouped matmul, or None after one warning if this process has a GPU."""
    try:
        from tokamax import ragged_dot  # pyright: ignore[reportMissingImports]
    except ImportError:
        if jax.default_backend() == "gpu":  # every platform's branch is traced everywhere
            logging.getLogger(__name__).warning(NO_TOKAMAX)
        return None
    return ragged_dot
