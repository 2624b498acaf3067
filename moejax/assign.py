"""assign: which assignments of a capacity group get a slot, and in which order they are served."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from moejax.dispatch import Slots, capacity_table, rank_in_expert, rows_of_slots
from moejax.moe_config import MoEConfig, Priority
from moejax.routing import RouterInputs


def capacities(tokens: int, config: MoEConfig) -> np.ndarray:
    """Returns int32 [tokens + 1, E]: each expert's capacity by the group's number of real tokens.

    The rule is `expert_capacity`'s, with the factor times the expert's `capacity_by_expert`.
    """
    assert config.capacity_factor is not None
    base = Fraction(str(config.capacity_factor))
    by_expert = config.capacity_by_expert or (1.0,) * config.num_experts
    columns = {
        own: capacity_table(
            tokens, config.num_experts, config.mean_selected, base * Fraction(str(own))
        )
        for own in by_expert
    }
    return np.stack([columns[own] for own in by_expert], axis=1)


def service_order(weight_ts: jax.Array, key: jax.Array, priority: Priority) -> jax.Array:
    """Returns int32 [T * S]: assignment numbers t * S + s in the order in which slots are given.

    `token`: token by token, a token's choices in order: no earlier token depends on a later one.
    `rank` (GShard, Lepikhin et al. 2020): all first choices before any second. `weight`: the
    assignment with the largest combine weight first. `best_weight` (batch-prioritised routing,
    Riquelme et al. 2021): as `rank`, tokens in the order of their largest weight. `random`: drawn.
    All but `token` let a later token take the slot of an earlier one.

    Args:
        weight_ts: float32 [T, S]; combine weights of one group.
        key: random key, read by `random`.
    """
    tokens, slots = weight_ts.shape
    number_ts = jnp.arange(tokens * slots, dtype=jnp.int32).reshape(tokens, slots)
    weight_ts = jax.lax.stop_gradient(weight_ts)
    if priority == "rank":
        return number_ts.T.reshape(-1)
    if priority == "best_weight":
        best_first_t = jnp.argsort(-weight_ts.max(1), stable=True)
        return number_ts[best_first_t].T.reshape(-1)
    if priority == "weight":
        return jnp.argsort(-weight_ts.reshape(-1), stable=True).astype(jnp.int32)
    if priority == "random":
        return jnp.argsort(jax.random.uniform(key, (tokens * slots,))).astype(jnp.int32)
    return number_ts.reshape(-1)


def group_keys(inputs: RouterInputs, config: MoEConfig) -> jax.Array:
    """Returns a random key for each group [G]: its first sequence's; in evaluation one for all."""
    groups = inputs.mask_bt.shape[0] // config.group_sequences
    if inputs.key_b is None:
        data = jax.random.key_data(jax.random.key(0))
        return jax.random.wrap_key_data(jnp.broadcast_to(data, (groups, *data.shape)))
    first = rearrange(inputs.key_b, "(g n) k -> g n k", n=config.group_sequences)[:, 0]
    return jax.vmap(lambda key: jax.random.fold_in(key, 1))(jax.random.wrap_key_data(first))


def capacity_slots(
    expert_ts: jax.Array, capacity_e: jax.Array, order_a: jax.Array, *, rows_per_expert: int
) -> Slots:
    """Gives each expert `rows_per_expert` rows, of which the first `capacity_e` are used.

    Args:
        expert_ts: int32 [T, S] of one group; E marks no assignment.
        capacity_e: int32 [E]; slots of each expert, at most `rows_per_expert`.
        order_a: int32 [T * S]; see `service_order`.
    """
    num_experts = capacity_e.shape[0]
    expert_a = expert_ts.reshape(-1)
    rank_a, _ = rank_in_expert(expert_a[order_a], num_experts)
    rank_a = jnp.zeros_like(rank_a).at[order_a].set(rank_a, unique_indices=True)
    limit_a = capacity_e.at[expert_a].get(mode="fill", fill_value=0)
    rows = num_experts * rows_per_expert
    slot_a = jnp.where(rank_a < limit_a, expert_a * rows_per_expert + rank_a, rows)
    return rows_of_slots(slot_a.reshape(expert_ts.shape), rows)
