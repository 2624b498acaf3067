"""What a layer's routing did, as sums over tokens: shards, microbatches and batches add up."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.moe_config import MoEConfig, Stack
from moejax.routing import Routing

LEVEL_BINS = 512  # of the histogram of levels, over [-LEVEL_RANGE, LEVEL_RANGE]
LEVEL_RANGE = 1.0


class RouterStats(NamedTuple):
    """What one MoE layer's routing did. E counts every choice, free experts too.

    Of all layers of a model the fields have a leading layer dim. Where layers differ in E, it is
    the largest one, and the entries behind a layer's own experts are 0: `of_stack` leaves them out.

    Attributes:
        count_e: int32 [E]; assignments asked for, before any drop.
        first_e: int32 [E]; tokens whose first choice the expert is.
        dropped_e: int32 [E]; assignments that got no slot.
        tokens: int32; real tokens.
        padding: int32; tokens that are padding.
        probability_e: float32 [E]; sum of `Routing.probability_bte`.
        importance_e: float32 [E]; sum of combine weights (Shazeer et al. 2017).
        load_e: float32 [E]; smooth load of the noisy router; 0 for others.
        z: float32; sum of logsumexp(logits)^2.
        entropy: float32; sum of the entropy of the probabilities, nats.
        sequence_balance: float32; sum over sequences of their balance loss.
        sequences: int32; sequences with a real token.
        level_eb: int32 [E, LEVEL_BINS]; histogram of `Routing.level_bte`; [E, 0] for routers
            whose state tracks no quantile.
        overflow_rounds: int32; further rounds over the receive buffer, the most of any device.
            The only field that depends on the layout.
    """

    count_e: jax.Array
    first_e: jax.Array
    dropped_e: jax.Array
    tokens: jax.Array
    padding: jax.Array
    probability_e: jax.Array
    importance_e: jax.Array
    load_e: jax.Array
    z: jax.Array
    entropy: jax.Array
    sequence_balance: jax.Array
    sequences: jax.Array
    level_eb: jax.Array
    overflow_rounds: jax.Array


def widened(value_le: jax.Array, width: int) -> jax.Array:
    """Returns [L, E, ...] with zeros behind the experts, up to `width` of them."""
    behind = [(0, 0)] * value_le.ndim
    behind[1] = (0, width - value_le.shape[1])
    return jnp.pad(value_le, behind)


def of_stack(stats: RouterStats, stack: Stack) -> RouterStats:
    """Returns the sums of the layers of one stack [layers, ...], as wide as their experts."""

    def take(path: tuple, leaf: jax.Array) -> jax.Array:
        leaf = leaf[stack.start : stack.stop]
        return leaf[:, : stack.config.choices] if _has_experts(path[0].name) else leaf

    return jax.tree_util.tree_map_with_path(take, stats)


def of_stacks(parts: Sequence[RouterStats], width: int) -> RouterStats:
    """Returns the sums of all layers from those of the stacks, `width` experts wide."""

    def join(path: tuple, *leaves: jax.Array) -> jax.Array:
        if _has_experts(path[0].name):
            leaves = tuple(widened(leaf, width) for leaf in leaves)
        return jnp.concatenate(leaves)

    return jax.tree_util.tree_map_with_path(join, *parts)


def _has_experts(name: str) -> bool:
    return name.endswith(("_e", "_eb"))


LAYOUT_FIELDS = ("overflow_rounds",)  # of RouterStats, that may differ between layouts


def expert_counts(expert_ts: jax.Array, num_experts: int) -> jax.Array:
    """Returns int32 [E]: how many assignments each expert has; the sentinel E is not counted."""
    return jnp.zeros(num_experts, jnp.int32).at[expert_ts.reshape(-1)].add(1, mode="drop")


def router_stats(
    routing: Routing, kept_bts: jax.Array, mask_bt: jax.Array, config: MoEConfig
) -> RouterStats:
    """Sums up the routing of a batch of sequences.

    Args:
        routing: with leading dims [B, T].
        kept_bts: int32 [B, T, S]; `expert_bts` with the sentinel in place of what was dropped.
        mask_bt: bool [B, T]; False for padding.
    """
    choices = config.choices
    count = jax.vmap(lambda expert_ts: expert_counts(expert_ts, choices))
    count_be, first_be = count(routing.expert_bts), count(first_choices(routing))
    token_b = mask_bt.sum(1, dtype=jnp.int32)
    lse_bt = jax.nn.logsumexp(routing.logit_bte, axis=-1)
    probability_be = routing.probability_bte.sum(1)
    balance_b = jax.vmap(functools.partial(balance, config=config))(
        count_be, first_be, probability_be, token_b
    )
    load = routing.load_bte
    return RouterStats(
        count_e=count_be.sum(0),
        first_e=first_be.sum(0),
        dropped_e=(count_be - count(kept_bts)).sum(0),
        tokens=token_b.sum(),
        padding=(~mask_bt).sum(dtype=jnp.int32),
        probability_e=probability_be.sum(0),
        importance_e=_weight_sums(routing, choices),
        load_e=jnp.zeros(choices, jnp.float32) if load is None else load.sum((0, 1)),
        z=jnp.sum(jnp.where(mask_bt, lse_bt**2, 0)),
        entropy=_entropy(routing.probability_bte).sum(),
        sequence_balance=balance_b.sum(),
        sequences=jnp.sum(token_b > 0, dtype=jnp.int32),
        level_eb=_level_histogram(routing, mask_bt, choices),
        overflow_rounds=jnp.zeros((), jnp.int32),
    )


def first_choices(routing: Routing) -> jax.Array:
    """Returns int32 [B, T, 1]: the choice of each token with the largest weight, the sentinel for
    none.
    """
    best_bt1 = jnp.argmax(routing.weight_bts, axis=-1)[..., None]
    return jnp.take_along_axis(routing.expert_bts, best_bt1, axis=-1)


def _weight_sums(routing: Routing, choices: int) -> jax.Array:
    zero_e = jnp.zeros(choices, jnp.float32)
    flat_a = routing.expert_bts.reshape(-1)
    return zero_e.at[flat_a].add(routing.weight_bts.reshape(-1), mode="drop")


def _entropy(probability_bte: jax.Array) -> jax.Array:
    """Returns the entropy of each token's probabilities, nats; they are scaled to sum to 1."""
    total = probability_bte.sum(-1, keepdims=True)
    p = probability_bte / jnp.where(total > 0, total, 1)
    return -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), axis=-1)


def _level_histogram(routing: Routing, mask_bt: jax.Array, choices: int) -> jax.Array:
    """Counts levels by expert in equal bins; whole numbers add up alike on every layout."""
    level = routing.level_bte
    if level is None:
        return jnp.zeros((choices, 0), jnp.int32)
    position = (jax.lax.stop_gradient(level) + LEVEL_RANGE) * (LEVEL_BINS / (2 * LEVEL_RANGE))
    bin_bte = jnp.clip(jnp.floor(position), 0, LEVEL_BINS - 1).astype(jnp.int32)
    bin_bte = jnp.where(mask_bt[..., None], bin_bte, LEVEL_BINS)
    expert_bte = jnp.broadcast_to(jnp.arange(choices, dtype=jnp.int32), bin_bte.shape)
    empty_eb = jnp.zeros((choices, LEVEL_BINS), jnp.int32)
    return empty_eb.at[expert_bte, bin_bte].add(1, mode="drop")


def balance(
    count_e: jax.Array,
    first_e: jax.Array,
    probability_e: jax.Array,
    tokens: jax.Array,
    config: MoEConfig,
) -> jax.Array:
    """Returns the load-balancing loss E * sum_e f_e P_e of one layer over some tokens.

    P_e is the mean probability over the tokens. f_e depends on `moe.balance_convention`, so that a
    coefficient keeps the strength that it has in its paper (docs/routers.md): count / (tokens * k)
    for megatron and olmoe; first choices / tokens for switch; count / tokens for huggingface and
    maxtext. No gradient flows through f. 0 without tokens. With free experts (MoE++, Jin et al.
    2024) every one of them weighs `zero_computation_weight`.

    Args:
        count_e: int32 [E]; assignments over the scope.
        first_e: int32 [E]; first choices over the scope.
        probability_e: float32 [E]; sum of probabilities over the scope.
        tokens: real tokens of the scope.
    """
    count = first_e if config.balance_convention == "switch" else count_e
    tokens_float = jnp.maximum(tokens, 1).astype(jnp.float32)
    share_e = jax.lax.stop_gradient(count.astype(jnp.float32)) / tokens_float
    if config.balance_convention in ("megatron", "olmoe"):
        share_e = share_e / config.mean_selected
    product_e = share_e * probability_e / tokens_float
    if config.free_experts:
        free_e = jnp.arange(config.choices) >= config.num_experts
        product_e = product_e * jnp.where(free_e, config.zero_computation_weight, 1.0)
    return config.choices * jnp.sum(product_e)
