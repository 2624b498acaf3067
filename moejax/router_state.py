"""Router state: what a router keeps between steps and no gradient moves.

It is made once, read by `routing.route`, and moved once a step from the counts of the whole step,
over every device and microbatch. It never sees the optimizer: no gradient, no decay, no clipping.
"""

import functools
import heapq
import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax.moe_config import MoEConfig, Stack
from moejax.router_stats import LEVEL_BINS, LEVEL_RANGE, RouterStats, of_stack, widened

BIASED = ("sigmoid_bias", "quantile")
BY_EXPERT = ("bias", "threshold", "keep")  # state with a number for each expert of a layer
FIRST_DEVIATION = 0.1  # of a logit before training: `parameters.moe_parameters` draws it so
LARGEST_L1 = 1e30  # a coefficient that never makes the gates sparse enough stays finite

State = dict[str, jax.Array]


def initial_router_state(
    config: MoEConfig, num_layers: int, vocab_size: int, token_counts: np.ndarray | None = None
) -> State:
    """Returns the state of `num_layers` MoE layers; empty for routers that keep none.

    - `bias` float32 [L, E] of `sigmoid_bias` and `quantile`: 0.
    - `threshold` float32 [L, E] of `threshold`: what k of E sigmoid scores of a fresh router
      exceed on average.
    - `l1` float32 [L] of `relu`: `l1_coefficient`.
    - `table` int32 [L, V, S] of `hash`: see `hash_table`.

    Where layers differ in E, it is the largest one, with zeros behind a layer's own experts.

    Args:
        token_counts: [V]; how often each token occurs in the corpus, for `hash`. None: equally.
    """
    stacks = config.stacks(num_layers)
    parts = [_initial_state(stack, vocab_size, token_counts) for stack in stacks]
    return _of_stacks(parts, config.choices)


def _initial_state(stack: Stack, vocab_size: int, token_counts: np.ndarray | None) -> State:
    config, num_layers = stack.config, stack.num_layers
    if config.router in BIASED:
        return {"bias": jnp.zeros((num_layers, config.choices), jnp.float32)}
    if config.router == "threshold":
        start = _first_threshold(config.top_k / config.choices)
        return {"threshold": jnp.full((num_layers, config.choices), start, jnp.float32)}
    if config.router == "relu":
        return {"l1": jnp.full(num_layers, config.l1_coefficient, jnp.float32)}
    if config.router == "hash":
        counts = np.zeros(vocab_size) if token_counts is None else np.asarray(token_counts)
        assert counts.shape == (vocab_size,), (counts.shape, vocab_size)
        weights = tuple(int(count) + 1 for count in counts)
        tables = [hash_table(weights, config, layer) for layer in range(stack.start, stack.stop)]
        return {"table": jnp.asarray(np.stack(tables))}
    return {}


def state_of_stack(state: State, stack: Stack) -> State:
    """Returns the state of the layers of one stack [layers, ...], as wide as their experts."""

    def take(name: str, leaf: jax.Array) -> jax.Array:
        leaf = leaf[stack.start : stack.stop]
        return leaf[:, : stack.config.choices] if name in BY_EXPERT else leaf

    return {name: take(name, leaf) for name, leaf in state.items()}


def _of_stacks(parts: Sequence[State], width: int) -> State:
    """Returns the state of all layers from that of the stacks."""
    joined = {}
    for name in parts[0]:
        leaves = [part[name] for part in parts]
        if name in BY_EXPERT:
            leaves = [widened(leaf, width) for leaf in leaves]
        joined[name] = jnp.concatenate(leaves)
    return joined


def _first_threshold(share: float) -> float:
    """Returns the sigmoid of the logit that `share` of a fresh router's logits exceed."""
    if share >= 1:
        return 0.0
    logit = statistics.NormalDist(0, FIRST_DEVIATION).inv_cdf(1 - share)
    return float(1 / (1 + np.exp(-logit)))


@functools.lru_cache(maxsize=64)
def hash_table(weights: tuple[int, ...], config: MoEConfig, layer: int) -> np.ndarray:
    """Returns int32 [V, S]: the experts of each token id, balanced by frequency.

    Greedy (Roller et al. 2021, arXiv:2106.04426, balanced hash): the most frequent token first,
    each to the `top_k` experts with the least load so far. Ties are broken by numbers drawn for the
    layer, so that layers differ. The table depends on its arguments alone, not on the machine.

    Args:
        weights: of each token id; counts plus 1, or all tokens that the corpus lacks would go to
            the one expert with the least load.
    """
    random = np.random.default_rng([layer, config.num_experts])
    frequent_first = np.lexsort((random.permutation(len(weights)), -np.asarray(weights)))
    heap = [(0, int(tie), expert) for expert, tie in enumerate(random.permutation(config.choices))]
    heapq.heapify(heap)
    table = np.empty((len(weights), config.top_k), np.int32)
    for token in frequent_first:
        least = [heapq.heappop(heap) for _ in range(config.top_k)]
        table[token] = [expert for _, _, expert in least]
        for load, tie, expert in least:
            heapq.heappush(heap, (load + weights[token], tie, expert))
    return table


def update_router_state(state: State, stats: RouterStats, config: MoEConfig) -> State:
    """Returns the state after a step. A step without real tokens changes nothing.

    Args:
        stats: [L, ...]; sums over the whole step.
    """
    if config.router == "relu":
        new = {"l1": _l1(state["l1"], stats, config)}
    elif config.router in (*BIASED, "threshold"):
        stacks = config.stacks(stats.tokens.shape[0])
        new = _of_stacks(
            [_by_expert(state_of_stack(state, s), of_stack(stats, s), s.config) for s in stacks],
            config.choices,
        )
    else:
        return state
    seen_l = stats.tokens > 0

    def moved(before, after):
        return jnp.where(seen_l.reshape(-1, *(1,) * (before.ndim - 1)), after, before)

    return jax.tree.map(moved, state, new)


def _by_expert(state: State, stats: RouterStats, config: MoEConfig) -> State:
    """Returns what a step makes of a number by expert; all layers have the same experts."""
    if config.router == "sigmoid_bias":
        return {"bias": _signed_bias(state["bias"], stats, config)}
    if config.router == "quantile":
        return {"bias": _quantile_bias(state["bias"], stats, config)}
    return {"threshold": _moved(state["threshold"], _level_quantile(stats, config), config)}


def _centred(bias_le: jax.Array) -> jax.Array:
    """Takes the mean off: it changes no selection, and the bias does not drift."""
    return bias_le - bias_le.mean(-1, keepdims=True)


def _moved(old: jax.Array, target: jax.Array, config: MoEConfig) -> jax.Array:
    return config.quantile_decay * old + (1 - config.quantile_decay) * target


def _signed_bias(bias_le: jax.Array, stats: RouterStats, config: MoEConfig) -> jax.Array:
    """b += rate * sign(mean load - load): too little load raises (arXiv:2408.15664, alg. 1)."""
    load_le = stats.count_e.astype(jnp.float32)
    move_le = jnp.sign(load_le.mean(-1, keepdims=True) - load_le)
    return _centred(bias_le + config.bias_update_rate * move_le)


def _quantile_bias(bias_le: jax.Array, stats: RouterStats, config: MoEConfig) -> jax.Array:
    """Moves the bias towards the one that gives the expert T k / E tokens, the others' held.

    Expert e is among a token's top k exactly if s_te + b_e exceeds u_te, the k-th largest s + b of
    the *other* experts. As u_te does not depend on b_e, the tokens that select e are those whose
    level s_te - u_te exceeds -b_e, and they are a share k / E of all tokens if -b_e is the quantile
    of the levels that k / E of them exceed.

    All experts move at once. Where the load is linear in the bias, an error that sums to 0 over
    experts becomes -1 / (E - 1) of itself in a full step, so quantile_decay decides how fast it
    goes: its factor in a step is quantile_decay - (1 - quantile_decay) / (E - 1). A number added
    to all biases moves all u and all targets alike, so re-centring changes neither.
    """
    return _centred(_moved(bias_le, -_level_quantile(stats, config), config))


def _level_quantile(stats: RouterStats, config: MoEConfig) -> jax.Array:
    """Returns float32 [L, E]: the level that k / E of a layer's tokens exceed, by expert.

    From the histogram; levels are taken as evenly spread within a bin.
    """
    below = 1 - config.top_k / config.choices
    count_leb = stats.level_eb.astype(jnp.float32)
    wanted_le1 = below * count_leb.sum(-1, keepdims=True)
    until_leb = jnp.cumsum(stats.level_eb, axis=-1).astype(jnp.float32)
    bin_le1 = jnp.argmax((until_leb >= wanted_le1) & (count_leb > 0), axis=-1, keepdims=True)
    inside_le1 = jnp.take_along_axis(count_leb, bin_le1, axis=-1)
    before_le1 = jnp.take_along_axis(until_leb, bin_le1, axis=-1) - inside_le1
    part_le1 = jnp.clip((wanted_le1 - before_le1) / jnp.maximum(inside_le1, 1), 0, 1)
    position_le1 = (bin_le1.astype(jnp.float32) + part_le1) / LEVEL_BINS
    return LEVEL_RANGE * (2 * position_le1 - 1)[..., 0]


def _l1(l1_l: jax.Array, stats: RouterStats, config: MoEConfig) -> jax.Array:
    """l1 *= factor^sign(wanted sparsity - sparsity), the same in all layers (ReMoE, eq. 9).

    Sparsity is the share of gates that are 0, over tokens, experts and layers; 1 - k / E is wanted:
    a token opens k gates in a layer, in the mean over layers, whatever their numbers of experts.
    """
    tokens_l = jnp.maximum(stats.tokens, 1).astype(jnp.float32)
    open_l = stats.count_e.sum(-1).astype(jnp.float32) / tokens_l
    missing = open_l.mean() - config.top_k
    moved_l = l1_l * config.l1_update_factor ** jnp.sign(missing)
    return jnp.clip(moved_l, 1 / LARGEST_L1, LARGEST_L1)
