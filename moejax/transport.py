"""How tokens get to their experts and back: one function for each transport.

All are called inside the layer's `shard_map`, with one device's tokens. `by_slots` and `by_mixing`
move equal buffers; the others move assignments, and drop none of those that they are given.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moejax import exchange
from moejax.dispatch import (
    Slots,
    combine,
    dispatch,
    grouped_slots,
    rank_in_expert,
    row_weights,
    rows_of_slots,
)
from moejax.moe_config import MoEConfig
from moejax.rounds import sum_rounds
from moejax.routing import SoftMixing
from moejax.sharding import vary_like, vary_tree


class Experts(NamedTuple):
    """The expert networks of one device.

    Attributes:
        weights: leading dim E/Z; whole over fsdp, in the compute dtype.
        on_slots: `experts.capacity_experts` or `capacity_modules` with all but arrays bound.
        on_rows: `experts.dropless_experts` or `dropless_modules` with all but arrays bound.
    """

    weights: Any
    on_slots: Callable
    on_rows: Callable


EXCHANGED = "exchanged"  # name by which remat policies keep what an exchange delivered


def _delivered(tree: Any) -> Any:
    """Marks what a collective over the expert axes delivered, by name, for remat policies."""
    return checkpoint_name(tree, EXCHANGED)


def by_slots(experts: Experts, x_td, weight_ts, slots: Slots, num_experts: int):
    """Capacity: equal buffers [E, C, D], an all-to-all to the experts and one back."""
    with jax.named_scope("dispatch"):
        buf_ecd = dispatch(x_td, slots).reshape(num_experts, -1, x_td.shape[1])
        weight_ec = row_weights(weight_ts, slots).reshape(num_experts, -1)
    out_ecd = _to_experts_and_back(experts, buf_ecd, weight_ec)
    with jax.named_scope("combine"):
        return combine(out_ecd.reshape(-1, x_td.shape[1]), slots)


def by_mixing(experts: Experts, x_gtd, mixing: SoftMixing):
    """Soft MoE: every slot is a mean of a group's tokens, every output a mean of its slots."""
    groups, _, num_experts, _ = mixing.dispatch_gtep.shape
    with jax.named_scope("dispatch"):
        mix_gtep = mixing.dispatch_gtep.astype(x_gtd.dtype)
        buf_egpd = jnp.einsum("gtd,gtep->egpd", x_gtd, mix_gtep)
        buf_ecd = buf_egpd.reshape(num_experts, -1, x_gtd.shape[2])
    out_ecd = _to_experts_and_back(experts, buf_ecd, None)
    with jax.named_scope("combine"):
        mix_gtep = mixing.combine_gtep.astype(x_gtd.dtype)
        out_egpd = out_ecd.reshape(num_experts, groups, -1, x_gtd.shape[2])
        return jnp.einsum("egpd,gtep->gtd", *vary_like(out_egpd, mix_gtep))


def _to_experts_and_back(experts: Experts, buf_ecd, weight_ec):
    """Runs the experts on equal buffers, wherever they are: [E, C, D] -> [E, C, D]."""
    with jax.named_scope("exchange"):
        sent = (buf_ecd, weight_ec)
        buf_ecd, weight_ec = _delivered(jax.tree.map(exchange.slots_to_experts, sent))
    with jax.named_scope("experts"):
        buf_ecd = experts.on_slots(buf_ecd, weight_ec, experts.weights)
    with jax.named_scope("exchange_back"):
        return _delivered(exchange.slots_to_tokens(buf_ecd))


def by_assignments(
    experts: Experts, x_td, expert_ts, weight_ts, config: MoEConfig
) -> tuple[jax.Array, jax.Array]:
    """Moves assignments by `config.transport_over`; none is dropped.

    Args:
        expert_ts: int32 [T, S]; num_experts marks no assignment.

    Returns:
        y [T, D], partial over the tensor axis, and int32: rounds after the first over the receive
        buffer, the most of any device.
    """
    way = {"all_to_all": _by_peers, "ragged": _by_ragged, "gather": _by_gather}
    if exchange.expert_degree() == 1:
        run = _at_home
    else:
        run = way[config.transport_over(exchange.expert_degree())]
    return run(experts, x_td, expert_ts, weight_ts, config)


def _buffer_rows(tokens: int, config: MoEConfig) -> int:
    """Returns the rows of a receive buffer: `buffer_factor` times a device's balanced load.

    Args:
        tokens: of each device that sends.
    """
    return int(config.buffer_factor * tokens * config.mean_selected)


def _expected_rows(tokens: int, rows: int, config: MoEConfig) -> int:
    """Returns the rows of a receive buffer that balanced routing fills, at most `rows`."""
    return min(rows, int(tokens * config.mean_selected) + 1)


def _in_rounds(run: Callable, operands, fixed, rounds, most: int):
    """Returns `sum_rounds` of `run`, and the rounds after the first.

    Args:
        rounds: int32; how many this routing needs.
        most: how many any routing can need; with 1, `run` is called once, without a loop.
    """
    if most <= 1:
        return run(0, operands, fixed), jnp.zeros((), jnp.int32)
    rounds = _delivered(jnp.maximum(rounds, 1))
    y = _delivered(sum_rounds(run, operands, fixed, rounds))
    return y, exchange.most(rounds - 1)


def _window(expert_ts: jax.Array, index, rows: int, none: int) -> jax.Array:
    """Returns `expert_ts` with `none` for all assignments but those of round `index`."""
    real_a = (expert_ts < none).reshape(-1)
    position_a = jnp.cumsum(real_a, dtype=jnp.int32) - 1
    inside_a = real_a & (position_a // rows == index)
    return jnp.where(inside_a.reshape(expert_ts.shape), expert_ts, none)


def _local_rounds(experts: Experts, x_td, expert_ts, weight_ts, degree: int, config: MoEConfig):
    """Runs this device's experts on tokens that are here, in rounds; see `by_assignments`.

    Args:
        x_td, expert_ts, weight_ts: tokens of `degree` devices; experts are numbered 0 to E/Z - 1,
            and E/Z marks an assignment to another device's expert.
        degree: Z, or 1 where nothing is split.
    """
    local, tokens = config.num_experts // degree, expert_ts.shape[0] // degree
    rows = min(_buffer_rows(tokens, config), expert_ts.size)
    expected = _expected_rows(tokens, rows, config)

    def run(index, operands, expert_ts):
        weights, x_td, weight_ts = operands
        chosen_ts = _window(expert_ts, index, rows, local) if most > 1 else expert_ts
        return experts.on_rows(
            x_td, chosen_ts, weight_ts, weights, rows=rows, expected_rows=expected
        )

    most = -(-expert_ts.shape[0] * min(expert_ts.shape[1], local) // rows)
    count = (expert_ts < local).sum(dtype=jnp.int32)
    operands = vary_tree((experts.weights, x_td, weight_ts), expert_ts)
    return _in_rounds(run, operands, expert_ts, -(-count // rows), most)


def _at_home(experts: Experts, x_td, expert_ts, weight_ts, config: MoEConfig):
    """One device holds all experts: nothing is exchanged."""
    return _local_rounds(experts, x_td, expert_ts, weight_ts, 1, config)


def _by_gather(experts: Experts, x_td, expert_ts, weight_ts, config: MoEConfig):
    """The expert group's tokens come to every device, which runs its experts on them."""
    with jax.named_scope("exchange"):
        x_td, expert_ts, weight_ts = _delivered(
            jax.tree.map(exchange.gather_tokens, (x_td, expert_ts, weight_ts))
        )
        expert_ts = exchange.local_experts(expert_ts, config.num_experts)
    degree = exchange.expert_degree()
    y_td, further = _local_rounds(experts, x_td, expert_ts, weight_ts, degree, config)
    with jax.named_scope("exchange_back"):
        return _delivered(exchange.scatter_results(y_td)), further


def _run_received(
    experts: Experts,
    weights: Any,
    x_rd,
    expert_r,
    weight_r,
    tokens: int,
    config: MoEConfig,
    *,
    in_order: bool = False,
):
    """Runs this device's experts on rows that were received, each for one expert.

    Args:
        tokens: of each device that sends.
        in_order: says that `expert_r` ascends.
    """
    rows = x_rd.shape[0]
    expected = _expected_rows(tokens, rows, config)
    return experts.on_rows(
        x_rd,
        expert_r[:, None],
        weight_r[:, None],
        weights,
        rows=rows,
        expected_rows=expected,
        in_order=in_order,
    )


def _by_peers(experts: Experts, x_td, expert_ts, weight_ts, config: MoEConfig):
    """A padded all-to-all: every device has the same number of rows for every other one."""
    degree, none = exchange.expert_degree(), config.num_experts
    local, assignments = none // degree, expert_ts.size
    tokens = expert_ts.shape[0]
    part = min(-(-_buffer_rows(expert_ts.shape[0], config) // degree), assignments)
    rows = part * degree
    with jax.named_scope("assign"):
        peer_a = jnp.where(expert_ts < none, expert_ts // local, degree).reshape(-1)
        rank_a, by_peer = rank_in_expert(peer_a, degree)
        rounds = exchange.most(-(-by_peer.count_e.max() // part))

    def run(index, operands, fixed):
        weights, x_td, weight_ts = operands
        expert_ts, peer_a, rank_a = fixed
        with jax.named_scope("assign"):
            inside_a = (rank_a // part == index) & (peer_a < degree)
            slot_a = jnp.where(inside_a, peer_a * part + rank_a - index * part, rows)
            slots = rows_of_slots(slot_a.reshape(expert_ts.shape), rows)
            expert_r = _row_experts(expert_ts, slots, local)
        with jax.named_scope("dispatch"):
            sent = (dispatch(x_td, slots), expert_r, row_weights(weight_ts, slots))
        with jax.named_scope("exchange"):
            x_rd, expert_r, weight_r = _delivered(jax.tree.map(exchange.peers_exchange, sent))
        y_rd = _run_received(experts, weights, x_rd, expert_r, weight_r, tokens, config)
        with jax.named_scope("exchange_back"):
            y_rd = _delivered(exchange.peers_exchange(y_rd))
        with jax.named_scope("combine"):
            return combine(y_rd, slots)

    most = -(-assignments // part)
    operands = vary_tree((experts.weights, x_td, weight_ts), expert_ts)
    return _in_rounds(run, operands, (expert_ts, peer_a, rank_a), rounds, most)


def _row_experts(expert_ts: jax.Array, slots: Slots, local: int) -> jax.Array:
    """Returns int32 [R]: each row's expert by its number on its device, `local` for no row."""
    expert_a = expert_ts.reshape(-1)
    return (expert_a % local).at[slots.assignment_r].get(mode="fill", fill_value=local)


def _by_ragged(experts: Experts, x_td, expert_ts, weight_ts, config: MoEConfig):
    """A ragged all-to-all: every device sends each other one exactly the rows that are for it.

    The send buffer holds every assignment that a device can make: T * k rows, and T * E where a
    router may choose any number of experts.
    """
    degree, none = exchange.expert_degree(), config.num_experts
    local, assignments = none // degree, expert_ts.size
    tokens = expert_ts.shape[0]
    rows = min(_buffer_rows(expert_ts.shape[0], config), degree * assignments)
    with jax.named_scope("assign"):
        slots = grouped_slots(expert_ts, num_experts=none, rows=assignments)
        count_zze = _delivered(exchange.gather_counts(slots.group_size_e.reshape(degree, local)))
        count_zz = count_zze.sum(2)
        rounds = exchange.most(-(-count_zz.sum(0).max() // rows))

    def run(index, operands, fixed):
        weights, x_td, weight_ts = operands
        slots, count_zze = fixed
        with jax.named_scope("assign"):
            plan = exchange.ragged_window(count_zze.sum(2), index, rows)
            here_ts = exchange.sent_in(plan, slots.slot_ts)  # others come back from another round
            slots = slots._replace(slot_ts=jnp.where(here_ts, slots.slot_ts, assignments))
        with jax.named_scope("dispatch"):
            sent = (dispatch(x_td, slots), row_weights(weight_ts, slots))
        with jax.named_scope("exchange"):
            send = functools.partial(exchange.ragged_exchange, plan=plan, out_rows=rows)
            x_rd, weight_r = _delivered(jax.tree.map(send, sent))
            expert_r = exchange.received_experts(count_zze, index, rows)
        y_rd = _run_received(
            experts, weights, x_rd, expert_r, weight_r, tokens, config, in_order=local == 1
        )
        with jax.named_scope("exchange_back"):
            y_nd = _delivered(exchange.ragged_exchange(y_rd, plan.back, assignments))
        with jax.named_scope("combine"):
            return combine(y_nd, slots)

    most = -(-degree * assignments // rows)
    operands = vary_tree((experts.weights, x_td, weight_ts), expert_ts)
    return _in_rounds(run, operands, (slots, count_zze), rounds, most)
