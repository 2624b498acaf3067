"""route: each token's experts and weights, by every router of `MoEConfig.router`.

Pure functions of one device's whole sequences; docs/routers.md has every formula with its source.
Random numbers come from a key of each sequence, so that no result depends on which device holds it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from moejax.dispatch import capacity_table
from moejax.moe_config import FORCED, SCORED, MoEConfig
from moejax.router_logits import (
    CHOICE,
    Logits,
    Weights,
    cap,
    draw,
    jitter,
    router_logits,
    router_matmul,
    unit,
)
from moejax.selection import (
    kth_excluding,
    limit_groups,
    sinkhorn,
    top_experts,
    top_tokens,
)

TINY = 1e-15  # of a sum of scores that underflowed; its square, in the gradient, is above 0
KEEP = "keep"  # entry that an inspection adds to a router's state, see `Inspected`
SMALLEST_NOISE = 1e-6  # standard deviation of router="noisy" where softplus has underflowed


class RouterInputs(NamedTuple):
    """What a router reads beside the tokens' vectors.

    Attributes:
        mask_bt: bool; False for padding.
        token_bt: int32 token ids, read by `hash`; None for others.
        key_b: uint32 [B, 2]; key data of each sequence in this layer and step. None is evaluation:
            nothing is random.
        choice_bts: int32 [B, T, S]; replay: these choices instead of the router's own.
    """

    mask_bt: jax.Array
    token_bt: jax.Array | None = None
    key_b: jax.Array | None = None
    choice_bts: jax.Array | None = None


class Routing(NamedTuple):
    """What a router decided. E counts every choice, free experts too.

    Attributes:
        expert_bts: int32 [B, T, S]; the selected experts, E where there is no assignment. A router
            that takes any number of experts has a column an expert.
        weight_bts: float32 [B, T, S]; combine weights, 0 where there is no assignment.
        probability_bte: float32 [B, T, E]; for the balance loss. They sum to 1, but for `relu`
            whose gates they are; 0 for padding.
        logit_bte: float32 [B, T, E]; for the z-loss, before noise, bias and dropout; 0 for padding
            and for routers without logits.
        load_bte: float32 [B, T, E]; router `noisy` in training: the probability that the expert is
            selected if its noise is drawn again. None for others.
        level_bte: float32 [B, T, E] in [-1, 1]; the values whose running quantile is the state of
            `quantile` and `threshold`. None for others.
    """

    expert_bts: jax.Array
    weight_bts: jax.Array
    probability_bte: jax.Array
    logit_bte: jax.Array
    load_bte: jax.Array | None = None
    level_bte: jax.Array | None = None


class Inspected(NamedTuple):
    """What an inspection sees of every choice, [B, T, S]; of a model with a leading dim of layers.

    A forward pass is an inspection if its router state has `KEEP`, float32 [E]. Each combine weight
    is then multiplied by its expert's entry: 0 leaves out an expert's output without changing the
    weights of the others. Training and evaluation have no such entry, and none of this is in their
    programs.

    Attributes:
        expert_bts: int32; the choices that got a slot, E for none.
        weight_bts: float32; combine weights, 0 where there is no expert.
        norm_bts: float32; |weight * output|, of router `soft` NaN.
    """

    expert_bts: jax.Array
    weight_bts: jax.Array
    norm_bts: jax.Array


def route(
    x_btd: jax.Array, weights: Weights, state: Weights, inputs: RouterInputs, config: MoEConfig
) -> Routing:
    """Decides which experts every token goes to, and with which weights.

    With `inputs.choice_bts` (router replay, arXiv:2510.11370) the choices are given; their weights
    are those that the router's current scores give them, with gradient.

    Args:
        x_btd: tokens of whole sequences, whole groups of `config.group_sequences`.
        weights: the layer's parameters, by the names of `parameters.moe_parameters`.
        state: the layer's router state, by the names of `router_state.initial_router_state`.
    """
    # Padding may hold anything, and 0 times NaN is NaN: it is taken out first.
    keep_bt1 = inputs.mask_bt[..., None]
    x_btd = jnp.where(keep_bt1, x_btd, 0)
    routing = _ROUTERS[config.router](x_btd, weights, state, inputs, config)
    return _keep(_mask(routing, keep_bt1, config), state)


def _keep(routing: Routing, state: Weights) -> Routing:
    """Multiplies combine weights by what an inspection keeps of each expert, see `Inspected`."""
    if KEEP not in state:
        return routing
    keep_bts = state[KEEP].at[routing.expert_bts].get(mode="fill", fill_value=0)
    return routing._replace(weight_bts=routing.weight_bts * keep_bts)


def _mask(routing: Routing, keep_bt1: jax.Array, config: MoEConfig) -> Routing:
    """Takes padding out and scales the weights."""

    def real(value):
        return None if value is None else jnp.where(keep_bt1, value, 0)

    return Routing(
        expert_bts=jnp.where(keep_bt1, routing.expert_bts, config.choices),
        weight_bts=jnp.where(keep_bt1, routing.weight_bts * config.weight_scale, 0),
        probability_bte=jnp.where(keep_bt1, routing.probability_bte, 0),
        logit_bte=jnp.where(keep_bt1, routing.logit_bte, 0),
        load_bte=real(routing.load_bte),
        level_bte=real(routing.level_bte),
    )


# Choices and their weights


def _choices(expert_bts: jax.Array, inputs: RouterInputs, config: MoEConfig) -> jax.Array:
    """Returns the router's own choices, or in a replay the given ones."""
    given_bts = inputs.choice_bts
    if given_bts is None:
        return expert_bts
    valid_bts = (given_bts >= 0) & (given_bts < config.choices)
    return jnp.where(valid_bts, given_bts, config.choices)


def _columns(selected_bte: jax.Array) -> jax.Array:
    """Returns choices with a column an expert: its number where selected, E elsewhere."""
    experts = selected_bte.shape[-1]
    expert_11e = jnp.arange(experts, dtype=jnp.int32)[None, None]
    return jnp.where(selected_bte, expert_11e, experts)


def _pick(score_bte: jax.Array, expert_bts: jax.Array) -> jax.Array:
    """Returns the score of each choice, 0 where there is none; the gradient goes to that score."""
    return jnp.take_along_axis(score_bte, expert_bts, axis=-1, mode="fill", fill_value=0)


def _normalize(value: jax.Array) -> jax.Array:
    return value / jnp.maximum(value.sum(-1, keepdims=True), TINY)


def _weigh(score_bte: jax.Array, expert_bts: jax.Array, config: MoEConfig) -> jax.Array:
    """Returns the scores of the choices, divided by their sum with `normalize_weights`.

    A single choice is never divided: its weight would be 1, without a gradient to the router.
    """
    weight_bts = _pick(score_bte, expert_bts)
    return _normalize(weight_bts) if config.normalize_weights and config.top_k > 1 else weight_bts


# Routers: (x_btd, weights, state, inputs, config) -> Routing


def _scored(x_btd, weights, state, inputs, config) -> Routing:
    """Top-k of scores: softmax, sigmoid, sqrt_softplus, cosine, sigmoid_bias and quantile.

    The selection bias of the last two picks and never weighs.
    """
    logits = router_logits(x_btd, weights, inputs.key_b, config)
    if config.router in ("softmax", "cosine"):
        score_bte = probability_bte = jax.nn.softmax(logits.used)
    else:
        score_of = _sqrt_softplus if config.router == "sqrt_softplus" else jax.nn.sigmoid
        score_bte = score_of(logits.used)
        probability_bte = _normalize(score_bte)
    selection_bte = jnp.where(jnp.isneginf(logits.used), -jnp.inf, score_bte)
    if "bias" in state:
        selection_bte = selection_bte + state["bias"][None, None]
    if config.expert_groups is not None and config.groups_per_token is not None:
        selection_bte = limit_groups(selection_bte, config.expert_groups, config.groups_per_token)
    expert_bts = _choices(top_experts(selection_bte, config.top_k), inputs, config)
    level_bte = None
    if config.router == "quantile":
        level_bte = _margin(jax.nn.sigmoid(logits.clean), selection_bte, config)
    weight_bts = _weigh(score_bte, expert_bts, config)
    return Routing(expert_bts, weight_bts, probability_bte, logits.clean, level_bte=level_bte)


def _margin(score_bte: jax.Array, selection_bte: jax.Array, config: MoEConfig) -> jax.Array:
    """Returns by how much each score lies above what an expert without a bias had to exceed."""
    if config.top_k == config.choices:
        return jnp.zeros_like(score_bte)
    bound_bte = kth_excluding(selection_bte, config.top_k)
    return jax.lax.stop_gradient(jnp.clip(score_bte - bound_bte, -1, 1))


def _sqrt_softplus(logit: jax.Array) -> jax.Array:
    """Returns sqrt(log(1 + exp(logit))), whose gradient is 0, not NaN, where it has underflowed."""
    softplus = jax.nn.softplus(logit)
    positive = softplus > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, softplus, 1)), 0)


def _noisy(x_btd, weights, state, inputs, config) -> Routing:
    """Noisy top-k (Shazeer et al. 2017): softmax over the selected noisy logits."""
    logits = router_logits(x_btd, weights, inputs.key_b, config)
    noisy_bte, load_bte = logits.used, None
    if inputs.key_b is not None:
        seen_btd = jitter(x_btd, inputs.key_b, config)
        deviation_bte = jax.nn.softplus(router_matmul(seen_btd, weights["router_noise"]))
        deviation_bte = jnp.maximum(deviation_bte, SMALLEST_NOISE)
        shape = logits.used.shape[1:]
        noise_bte = draw(inputs.key_b, CHOICE, lambda key: jax.random.normal(key, shape))
        noisy_bte = logits.used + noise_bte * deviation_bte
        load_bte = _load(logits, noisy_bte, deviation_bte, config.top_k)
    expert_bts = _choices(top_experts(noisy_bte, config.top_k), inputs, config)
    chosen_bts = _pick(noisy_bte, expert_bts)
    # A replay may name an expert that dropout has closed: its weight is 0, as that of none.
    absent_bts = (expert_bts == config.choices) | jnp.isneginf(chosen_bts)
    all_absent_bt1 = absent_bts.all(-1, keepdims=True)
    chosen_bts = jnp.where(absent_bts & ~all_absent_bt1, -jnp.inf, chosen_bts)
    chosen_bts = jnp.where(all_absent_bt1, 0, chosen_bts)
    weight_bts = jnp.where(absent_bts, 0, jax.nn.softmax(chosen_bts))
    return Routing(
        expert_bts, weight_bts, jax.nn.softmax(logits.used), logits.clean, load_bte=load_bte
    )


def _load(logits: Logits, noisy_bte, deviation_bte, top_k: int) -> jax.Array:
    """Returns P(x, e) of Shazeer et al. 2017: Phi((logit - k-th noisy logit of the others) / dev).

    It is 1 where nobody else competes.
    """
    open_bte = ~jnp.isneginf(logits.used)
    if top_k == noisy_bte.shape[-1]:
        return open_bte.astype(jnp.float32)
    # A finite bound far below all logits: infinities would make the gradient NaN.
    bound_bte = kth_excluding(jnp.maximum(noisy_bte, -1e9), top_k)
    chance_bte = jax.scipy.stats.norm.cdf((logits.clean - bound_bte) / deviation_bte)
    return jnp.where(open_bte, chance_bte, 0)


def _gshard(x_btd, weights, state, inputs, config) -> Routing:
    """GShard top-2 (Lepikhin et al. 2020): the second is kept with probability 2 g2 / (g1 + g2)."""
    logits = router_logits(x_btd, weights, inputs.key_b, config)
    probability_bte = jax.nn.softmax(logits.used)
    own_bts = top_experts(logits.used, 2)
    expert_bts = _choices(own_bts, inputs, config)
    # A replayed choice without a second still shares with the best of the others.
    first_bte = jax.nn.one_hot(expert_bts[..., 0], config.choices, dtype=bool)
    second_bt1 = top_experts(jnp.where(first_bte, -jnp.inf, logits.used), 1)
    absent_bt1 = expert_bts[..., 1:] == config.choices
    pair_bts = jnp.concatenate(
        [expert_bts[..., :1], jnp.where(absent_bt1, second_bt1, expert_bts[..., 1:])], -1
    )
    weight_bts = _normalize(_pick(probability_bte, pair_bts))
    if inputs.key_b is not None and inputs.choice_bts is None:
        drawn_bt = draw(inputs.key_b, CHOICE, lambda key: jax.random.uniform(key, x_btd.shape[1:2]))
        absent_bt1 = absent_bt1 | (2 * weight_bts[..., 1:] <= drawn_bt[..., None])
    absent_bts = jnp.concatenate([expert_bts[..., :1] == config.choices, absent_bt1], -1)
    expert_bts = jnp.where(absent_bts, config.choices, expert_bts)
    weight_bts = jnp.where(absent_bts, 0, weight_bts)
    return Routing(expert_bts, weight_bts, probability_bte, logits.clean)


def _group(x: jax.Array, config: MoEConfig) -> jax.Array:
    """Joins the sequences of a group: [B, T, ...] -> [G, tokens of the group, ...]."""
    return rearrange(x, "(g n) t ... -> g (n t) ...", n=config.group_sequences)


def _expert_choice(x_btd, weights, state, inputs, config) -> Routing:
    """Expert choice (Zhou et al. 2022): every expert takes the k T / E tokens that like it best."""
    logits = router_logits(x_btd, weights, inputs.key_b, config)
    score_bte = jax.nn.softmax(logits.used)
    mask_gt = _group(inputs.mask_bt, config)
    closed_bte = ~inputs.mask_bt[..., None] | jnp.isneginf(logits.used)
    selection_gte = _group(jnp.where(closed_bte, -jnp.inf, score_bte), config)
    table = capacity_table(mask_gt.shape[1], config.num_experts, config.top_k, 1.0)
    count_g = jnp.asarray(table)[mask_gt.sum(-1)]
    selected_bte = top_tokens(selection_gte, count_g, int(table[-1])).reshape(score_bte.shape)
    expert_bts = _choices(_columns(selected_bte), inputs, config)
    return Routing(expert_bts, _pick(score_bte, expert_bts), score_bte, logits.clean)


def _sinkhorn(x_btd, weights, state, inputs, config) -> Routing:
    """Sinkhorn (S-BASE, Clark et al. 2022): top-k of the balanced plan, weighed by sigmoid(logit).

    In evaluation the plain top-k of the logits, as in the papers: a test token has no group.
    """
    logits = router_logits(x_btd, weights, inputs.key_b, config)
    selection_bte = logits.used
    if inputs.key_b is not None:
        plan_gte = sinkhorn(_group(logits.used, config), _group(inputs.mask_bt, config))
        selection_bte = plan_gte.reshape(logits.used.shape)
    expert_bts = _choices(top_experts(selection_bte, config.top_k), inputs, config)
    weight_bts = _pick(jax.nn.sigmoid(logits.used), expert_bts)
    return Routing(expert_bts, weight_bts, jax.nn.softmax(logits.used), logits.clean)


def _mixture_of_depths(x_btd, weights, state, inputs, config) -> Routing:
    """Mixture-of-Depths (Raposo et al. 2024): a sequence's best tokens are computed, others skip.

    A computed token goes to its top-k experts, with their softmax weights times sigmoid(depth).
    """
    logits = router_logits(x_btd, weights, inputs.key_b, config)
    score_bte = jax.nn.softmax(logits.used)
    depth_bt1 = router_matmul(x_btd, weights["router_depth"][:, None])
    table = capacity_table(x_btd.shape[1], 1, 1, config.depth_fraction)
    count_b = jnp.asarray(table)[inputs.mask_bt.sum(-1)]
    selection_bt1 = jnp.where(inputs.mask_bt[..., None], depth_bt1, -jnp.inf)
    computed_bt1 = top_tokens(selection_bt1, count_b, int(table[-1]))
    own_bts = jnp.where(computed_bt1, top_experts(logits.used, config.top_k), config.choices)
    expert_bts = _choices(own_bts, inputs, config)
    weight_bts = _weigh(score_bte, expert_bts, config) * jax.nn.sigmoid(depth_bt1)
    return Routing(expert_bts, weight_bts, score_bte, logits.clean)


def _without_logits(x_btd, weights, state, inputs, config) -> Routing:
    """hash (Roller et al. 2021), random and balanced: k experts of equal weight, nothing learned.

    Random is drawn per sequence; in evaluation with one fixed key. Balanced goes round robin over a
    sequence's real tokens.
    """
    if config.router == "hash":
        assert inputs.token_bt is not None, "hash routing reads token ids"
        own_bts = state["table"].at[inputs.token_bt].get(mode="fill", fill_value=config.choices)
    elif config.router == "random":
        key_b = inputs.key_b
        if key_b is None:
            key_b = jnp.zeros((x_btd.shape[0], 2), jnp.uint32)
        shape = (x_btd.shape[1], config.choices)
        score_bte = draw(key_b, CHOICE, lambda key: jax.random.uniform(key, shape))
        own_bts = top_experts(score_bte, config.top_k)
    else:
        place_bt1 = jnp.cumsum(inputs.mask_bt, axis=1, dtype=jnp.int32)[..., None] - 1
        choice_11s = jnp.arange(config.top_k, dtype=jnp.int32)[None, None]
        own_bts = (place_bt1 * config.top_k + choice_11s) % config.choices
    expert_bts = _choices(own_bts, inputs, config)
    weight_bts = jnp.where(expert_bts < config.choices, 1.0 / config.top_k, 0.0)
    probability_bte = jax.nn.one_hot(expert_bts, config.choices, dtype=jnp.float32).mean(-2)
    return Routing(expert_bts, weight_bts, probability_bte, jnp.zeros_like(probability_bte))


def _dense(x_btd, weights, state, inputs, config) -> Routing:
    """Every expert with its softmax weight (Jacobs et al. 1991); gate dropout closes some gates."""
    logits = router_logits(x_btd, weights, inputs.key_b, config)
    used_bte = logits.used
    if inputs.key_b is not None and config.gate_dropout > 0:
        shape = used_bte.shape[1:]
        drawn_bte = draw(inputs.key_b, CHOICE, lambda key: jax.random.uniform(key, shape))
        drawn_bte = jnp.where(jnp.isneginf(used_bte), -1, drawn_bte)
        kept_bte = drawn_bte >= jnp.minimum(
            config.gate_dropout, drawn_bte.max(-1, keepdims=True)
        )  # one stays open always
        used_bte = jnp.where(kept_bte, used_bte, -jnp.inf)
    score_bte = jax.nn.softmax(used_bte)
    expert_bts = _choices(_columns(~jnp.isneginf(used_bte)), inputs, config)
    return Routing(expert_bts, _pick(score_bte, expert_bts), score_bte, logits.clean)


def _elementwise(x_btd, weights, state, inputs, config) -> Routing:
    """Every expert with weight 1 / sqrt(E); the vector gate acts on the experts' side."""
    shape = (*x_btd.shape[:2], config.choices)
    expert_bts = _choices(_columns(jnp.ones(shape, bool)), inputs, config)
    weight_bts = jnp.where(expert_bts < config.choices, config.num_experts**-0.5, 0.0)
    uniform_bte = jnp.full(shape, 1 / config.choices, jnp.float32)
    return Routing(expert_bts, weight_bts, uniform_bte, jnp.zeros(shape, jnp.float32))


def _relu(x_btd, weights, state, inputs, config) -> Routing:
    """ReMoE (Wang et al. 2024): the gate is relu(logit), and the experts with a gate are taken."""
    logits = router_logits(x_btd, weights, inputs.key_b, config)
    gate_bte = jax.nn.relu(logits.used)
    expert_bts = _choices(_columns(gate_bte > 0), inputs, config)
    return Routing(expert_bts, _pick(gate_bte, expert_bts), gate_bte, logits.clean)


def _threshold(x_btd, weights, state, inputs, config) -> Routing:
    """Expert threshold (arXiv:2603.11535): the experts whose running threshold a score exceeds."""
    logits = router_logits(x_btd, weights, inputs.key_b, config)
    score_bte = jax.nn.sigmoid(logits.used)
    own_bts = _columns(score_bte > state["threshold"][None, None])
    expert_bts = _choices(own_bts, inputs, config)
    level_bte = jax.lax.stop_gradient(jax.nn.sigmoid(logits.clean))
    return Routing(
        expert_bts,
        _pick(score_bte, expert_bts),
        _normalize(score_bte),
        logits.clean,
        level_bte=level_bte,
    )


# Soft MoE


class SoftMixing(NamedTuple):
    """Soft MoE's mixing of the tokens of each group; P is slots an expert.

    Attributes:
        dispatch_gtep: float32 [G, T, E, P]; slot = sum_t dispatch * x_t; sums to 1 over real
            tokens.
        combine_gtep: float32 [G, T, E, P]; y_t = sum_ep combine * slot; sums to `weight_scale`.
        logit_gtep: float32 [G, T, E, P].
    """

    dispatch_gtep: jax.Array
    combine_gtep: jax.Array
    logit_gtep: jax.Array


def soft_mixing(
    x_btd: jax.Array, weights: Weights, mask_bt: jax.Array, config: MoEConfig
) -> SoftMixing:
    """Returns how slots mix a group's tokens, and tokens the slots' results (Puigcerver et al.).

    Logits are cosines of tokens and slots times a learned scale (arXiv:2308.00951, algorithm 2).
    """
    x_btd = jnp.where(mask_bt[..., None], x_btd, 0)
    length_bt1 = jnp.sum(x_btd.astype(jnp.float32) ** 2, -1, keepdims=True) + 1e-12
    logit_bts = router_matmul(x_btd, unit(weights["router"], 0)) * jax.lax.rsqrt(length_bt1)
    logit_bts = cap(logit_bts * weights["router_scale"], config)
    logit_gtep = rearrange(_group(logit_bts, config), "g t (e p) -> g t e p", p=config.soft_slots)
    mask_gt = _group(mask_bt, config)
    # A group of padding alone takes the softmax of what is there, and is set to 0 after it.
    closed_gt = ~mask_gt & mask_gt.any(-1, keepdims=True)
    open_gtep = jnp.where(closed_gt[..., None, None], -jnp.inf, logit_gtep)
    real_gt11 = mask_gt[..., None, None]
    return SoftMixing(
        dispatch_gtep=jnp.where(real_gt11, jax.nn.softmax(open_gtep, axis=1), 0),
        combine_gtep=jnp.where(real_gt11, jax.nn.softmax(logit_gtep, axis=(2, 3)), 0)
        * config.weight_scale,
        logit_gtep=logit_gtep,
    )


def kept_mixing(mixing: SoftMixing, state: Weights) -> SoftMixing:
    """Returns the mixing without the experts that an inspection takes out."""
    if KEEP not in state:
        return mixing
    keep_11e1 = state[KEEP][None, None, :, None]
    return mixing._replace(combine_gtep=mixing.combine_gtep * keep_11e1)


def _soft(x_btd, weights, state, inputs, config) -> Routing:
    """Soft MoE (Puigcerver et al. 2023): a token's expert of the largest mass, for statistics."""
    mask_bt = inputs.mask_bt
    mixing = soft_mixing(x_btd, weights, mask_bt, config)

    def ungroup(value_gte):
        return value_gte.reshape(*mask_bt.shape, value_gte.shape[-1])

    mass_bte = ungroup(mixing.combine_gtep.sum(-1)) / config.weight_scale
    logit_bte = ungroup(jax.nn.logsumexp(mixing.logit_gtep, axis=-1))
    expert_bt1 = top_experts(mass_bte, 1)
    return Routing(expert_bt1, _pick(mass_bte, expert_bt1), mass_bte, logit_bte)


_ROUTERS: dict[str, Callable[..., Routing]] = {
    **dict.fromkeys(SCORED, _scored),
    "noisy": _noisy,
    "gshard": _gshard,
    "expert_choice": _expert_choice,
    "sinkhorn": _sinkhorn,
    "soft": _soft,
    "mixture_of_depths": _mixture_of_depths,
    **dict.fromkeys(("hash", *FORCED), _without_logits),
    "dense": _dense,
    **dict.fromkeys(("elementwise", "elementwise_input"), _elementwise),
    "relu": _relu,
    "threshold": _threshold,
}
