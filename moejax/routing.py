"""route: from router logits to each token's experts and weights, on one device's tokens.

The functions are pure. Logits and all that is made of them are float32: bfloat16 logits tie, and
ties change which experts are selected. Only the inputs of the router's matmul have the compute
dtype.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.config import MoEConfig

TINY = 1e-20  # keeps 0 / 0 out where every sigmoid score has underflowed


class Routing(NamedTuple):
    """What the router decided for the tokens of one scope.

    Attributes:
        expert_ts: int32 [..., T, S]; the selected experts, E where there is no assignment
            (padding).
        weight_ts: float32 [..., T, S]; combine weights, 0 where there is no assignment.
        probability_te: float32 [..., T, E]; scores that sum to 1, for the balance loss; 0 for
            padding.
        logit_te: float32 [..., T, E]; for the z-loss.
    """

    expert_ts: jax.Array
    weight_ts: jax.Array
    probability_te: jax.Array
    logit_te: jax.Array


def router_logits(x_td: jax.Array, router_de: jax.Array) -> jax.Array:
    """Returns logits [..., T, E]: inputs in the compute dtype, accumulated and given in float32."""
    return jnp.einsum(
        "...td,de->...te",
        x_td,
        router_de.astype(x_td.dtype),
        preferred_element_type=jnp.float32,
    )


def route(
    logit_te: jax.Array, mask_t: jax.Array, bias_e: jax.Array | None, config: MoEConfig
) -> Routing:
    """Selects `top_k` experts a token.

    `softmax`: p = softmax(logits), select the top k of p (Shazeer et al. 2017; Fedus et al. 2021).
    With `normalize_weights` the selected p are divided by their sum (Mixtral), else used as they
    are (Switch, OLMoE).

    `sigmoid_bias`: s = sigmoid(logits), select the top k of s + bias, weigh by s alone
    (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). The bias is router state, never a parameter.

    Args:
        logit_te: float32 [..., T, E].
        mask_t: bool [..., T]; False for padding, which selects nothing.
        bias_e: float32 [E], the selection bias of `sigmoid_bias`; else None.
    """
    if config.router == "sigmoid_bias":
        assert bias_e is not None
        score_te = jax.nn.sigmoid(logit_te)
        probability_te = score_te / (score_te.sum(-1, keepdims=True) + TINY)
        selection_te = score_te + bias_e.reshape((1,) * (logit_te.ndim - 1) + bias_e.shape)
    else:
        score_te = probability_te = jax.nn.softmax(logit_te, axis=-1)
        selection_te = score_te
    _, expert_ts = jax.lax.top_k(jax.lax.stop_gradient(selection_te), config.top_k)
    weight_ts = jnp.take_along_axis(score_te, expert_ts, axis=-1)
    if config.normalize_weights and config.top_k > 1:
        weight_ts = weight_ts / (weight_ts.sum(-1, keepdims=True) + TINY)
    return mask_routing(Routing(expert_ts, weight_ts, probability_te, logit_te), mask_t)


def mask_routing(routing: Routing, mask_t: jax.Array) -> Routing:
    """Takes padding out: no assignment, no weight, no part in any loss."""
    keep = mask_t[..., None]
    num_experts = routing.logit_te.shape[-1]
    return Routing(
        expert_ts=jnp.where(keep, routing.expert_ts, num_experts),
        weight_ts=jnp.where(keep, routing.weight_ts, 0),
        probability_te=jnp.where(keep, routing.probability_te, 0),
        logit_te=routing.logit_te,
    )


def expert_counts(expert_ts: jax.Array, num_experts: int) -> jax.Array:
    """Returns int32 [E]: how many assignments each expert has; the sentinel E is not counted."""
    return jnp.zeros(num_experts, jnp.int32).at[expert_ts.reshape(-1)].add(1, mode="drop")


def initial_router_state(config: MoEConfig, num_layers: int) -> dict[str, jax.Array]:
    """Returns the router state of `num_layers` MoE layers; empty for routers that keep none."""
    if config.router == "sigmoid_bias":
        return {"bias": jnp.zeros((num_layers, config.num_experts), jnp.float32)}
    return {}


def update_router_state(
    state: dict[str, jax.Array], count_le: jax.Array, config: MoEConfig
) -> dict[str, jax.Array]:
    """Moves the selection bias once a step: b += rate * sign(mean load - load), then re-centred.

    An expert with too little load gets a larger bias (Wang et al. 2024, arXiv:2408.15664). The
    re-centring keeps sum(b) at 0 and changes no selection.

    Args:
        state: `bias` float32 [L, E], or empty.
        count_le: int32 [L, E]; the whole step's assignments, over every device and microbatch.
    """
    if "bias" not in state:
        return state
    load_le = count_le.astype(jnp.float32)
    move_le = jnp.sign(load_le.mean(-1, keepdims=True) - load_le)
    bias_le = state["bias"] + config.bias_update_rate * move_le
    return {"bias": bias_le - bias_le.mean(-1, keepdims=True)}


class RouterStats(NamedTuple):
    """What one MoE layer's routing did: token sums, so shards, microbatches and batches add up.

    Attributes:
        count_e: int32 [E]; assignments asked for, before any drop.
        dropped_e: int32 [E]; of these, the ones that got no slot.
        tokens: int32; real tokens.
        padding: int32; tokens that are padding.
        probability_e: float32 [E]; sum of `probability_te`.
        z: float32; sum of logsumexp(logits)^2.
        entropy: float32; sum of the entropy of `probability_te`, nats.
        sequence_balance: float32; sum over sequences of their balance loss.
        sequences: int32; sequences with a real token.
    """

    count_e: jax.Array
    dropped_e: jax.Array
    tokens: jax.Array
    padding: jax.Array
    probability_e: jax.Array
    z: jax.Array
    entropy: jax.Array
    sequence_balance: jax.Array
    sequences: jax.Array


def router_stats(routing: Routing, kept_bts: jax.Array, mask_bt: jax.Array) -> RouterStats:
    """Sums up the routing of a batch of sequences.

    Args:
        routing: with leading dims [B, T].
        kept_bts: int32 [B, T, S]; `expert_ts` with the sentinel E for what was dropped.
        mask_bt: bool [B, T]; False for padding.
    """
    num_experts = routing.logit_te.shape[-1]
    count = jax.vmap(lambda expert_ts: expert_counts(expert_ts, num_experts))
    count_be = count(routing.expert_ts)
    token_b = mask_bt.sum(1, dtype=jnp.int32)
    lse_bt = jax.nn.logsumexp(routing.logit_te, axis=-1)
    p = routing.probability_te
    entropy_bt = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), axis=-1)
    probability_be = p.sum(1)
    return RouterStats(
        count_e=count_be.sum(0),
        dropped_e=(count_be - count(kept_bts)).sum(0),
        tokens=token_b.sum(),
        padding=(~mask_bt).sum(dtype=jnp.int32),
        probability_e=probability_be.sum(0),
        z=jnp.sum(jnp.where(mask_bt, lse_bt**2, 0)),
        entropy=entropy_bt.sum(),
        sequence_balance=jax.vmap(balance)(count_be, probability_be, token_b).sum(),
        sequences=jnp.sum(token_b > 0, dtype=jnp.int32),
    )


def balance(count_e: jax.Array, probability_e: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the load-balancing loss E * sum_e f_e P_e: 1 in balance, E if one expert gets all.

    f_e is the expert's share of the assignments and P_e the mean probability (Fedus et al. 2021,
    eq. 4; divided by top-k as in Megatron-Core and DeepSeek). No gradient flows through f. 0
    without tokens.

    Args:
        count_e: int32 [E]; assignments over the scope.
        probability_e: float32 [E]; sum of probabilities over the scope, or over a part of it.
        tokens: real tokens of the scope.
    """
    count_e = jax.lax.stop_gradient(count_e.astype(jnp.float32))
    share_e = count_e / jnp.maximum(count_e.sum(), 1)
    mean_e = probability_e / jnp.maximum(tokens, 1).astype(jnp.float32)
    return count_e.shape[-1] * jnp.sum(share_e * mean_e)
