"""The losses. Each is a sum over a part of the batch divided by a count over the whole step.

So the losses, gradients and metrics of microbatches and shards add up to those of one large batch,
whatever the number of real tokens in each part. Auxiliary losses are functions of the routing sums
of the whole step (`RouterStats`); where such a function is not linear, a microbatch gets the part
that the function's gradient at the whole step's sums gives it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.moe_config import WITHOUT_LOGITS, MoEConfig, Stack
from moejax.router_stats import RouterStats, balance, of_stack

Term = Callable[[RouterStats, MoEConfig], jax.Array]  # of one layer


class Totals(NamedTuple):
    """Counts over the whole step, the divisors of every loss: int32 scalars.

    Attributes:
        targets: tokens with a loss.
        tokens: real tokens, which are routed.
        sequences: sequences with a real token.
    """

    targets: jax.Array
    tokens: jax.Array
    sequences: jax.Array


def totals(loss_mask: jax.Array, segments: jax.Array) -> Totals:
    """Counts over batch arrays [..., T] of a whole step."""
    real = segments > 0
    return Totals(
        loss_mask.sum(dtype=jnp.int32), real.sum(dtype=jnp.int32), real.any(-1).sum(dtype=jnp.int32)
    )


def _divide(total: jax.Array, count: jax.Array) -> jax.Array:
    return total / jnp.maximum(count, 1).astype(jnp.float32)


def token_losses(logit_btv: jax.Array, target_bt: jax.Array) -> jax.Array:
    """Returns float32 [B, T]: -log softmax(logits)[target], nats.

    A target outside the vocabulary gives NaN. The oracle of `cross_entropy.token_losses`, which
    needs no logits of a whole batch.
    """
    lse_bt = jax.nn.logsumexp(logit_btv, axis=-1)
    # Not a gather: its gradient is a scatter, which fuses with nothing.
    id_btv = jax.lax.broadcasted_iota(jnp.int32, logit_btv.shape, logit_btv.ndim - 1)
    picked_bt = jnp.where(id_btv == target_bt[..., None].astype(jnp.int32), logit_btv, 0).sum(-1)
    known_bt = (target_bt >= 0) & (target_bt < logit_btv.shape[-1])
    return lse_bt - jnp.where(known_bt, picked_bt, jnp.nan)


# Auxiliary losses of one layer, from its sums over a scope


def load_balancing_loss(stats: RouterStats, config: MoEConfig) -> jax.Array:
    """Returns the load-balancing loss of one layer over a whole batch.

    For a model of one's own that calls `MoE`: add it, times a weight such as 0.01, to the loss.
    1 at perfect balance with the default `moe.balance_convention`.
    """
    return balance(stats.count_e, stats.first_e, stats.probability_e, stats.tokens, config)


def router_z_loss(stats: RouterStats) -> jax.Array:
    """Returns the mean of logsumexp(logits)^2 over tokens (Zoph et al. 2022, eq. 5).

    Its usual weight is 0.001.
    """
    return _divide(stats.z, stats.tokens)


def squared_variation(value_e: jax.Array) -> jax.Array:
    """Returns Var / Mean^2 over experts (Shazeer et al. 2017, eq. 7), population variance.

    0 where all are equal, E - 1 where one has everything.
    """
    mean = value_e.mean()
    return jnp.square(value_e - mean).mean() / jnp.maximum(jnp.square(mean), 1e-20)


def mutual_information_loss(stats: RouterStats) -> jax.Array:
    """Returns -(H(mean p) - mean H(p)), nats (Mod-Squad, Chen et al. 2022, arXiv:2212.08066)."""
    mean_e = _divide(stats.probability_e, stats.tokens)
    entropy_of_mean = -jnp.sum(mean_e * jnp.log(jnp.where(mean_e > 0, mean_e, 1)))
    return _divide(stats.entropy, stats.tokens) - entropy_of_mean


def device_balance_loss(stats: RouterStats, config: MoEConfig) -> jax.Array:
    """Returns the balance loss over `device_groups` equal groups of experts, 1 at balance.

    sum_d f'_d P'_d with f' the mean of the group's f and P' the sum of its P (DeepSeekMoE, Dai et
    al. 2024, eq. 15 to 17). Groups are a property of the config, so it is the same on every mesh.
    """
    groups = config.device_groups
    assert groups is not None
    tokens = jnp.maximum(stats.tokens, 1).astype(jnp.float32)
    routed = slice(0, config.num_experts)
    share_e = jax.lax.stop_gradient(stats.count_e[routed].astype(jnp.float32)) / tokens
    share_e *= config.num_experts / config.mean_selected
    mean_e = stats.probability_e[routed] / tokens
    return jnp.sum(share_e.reshape(groups, -1).mean(1) * mean_e.reshape(groups, -1).sum(1))


def l1_loss(stats: RouterStats, config: MoEConfig) -> jax.Array:
    """Returns ReMoE's balanced L1 norm of the gates: E * sum_e f_e * mean gate_e.

    f_e = count / (tokens * k) (Wang et al. 2024, arXiv:2412.14711, eq. 9 and 10).
    """
    tokens = jnp.maximum(stats.tokens, 1).astype(jnp.float32)
    count_e = jax.lax.stop_gradient(stats.count_e.astype(jnp.float32))
    share_e = count_e / (tokens * config.mean_selected)
    return config.choices * jnp.sum(share_e * stats.probability_e / tokens)


def auxiliary_terms(config: MoEConfig) -> dict[str, Callable[[RouterStats], jax.Array]]:
    """Returns the terms over the whole step that the config weighs, each a function of one layer.

    The balance loss and the z-loss are reported even at weight 0. A router without logits has no
    term: nothing could move.
    """
    always = {
        "balance": lambda stats: load_balancing_loss(stats, config),
        "z": router_z_loss,
    }
    optional = {
        "sequence_balance": lambda stats: _divide(stats.sequence_balance, stats.sequences),
        "importance": lambda stats: squared_variation(stats.importance_e),
        "load": lambda stats: squared_variation(stats.load_e),
        "mutual_information": mutual_information_loss,
        "device_balance": lambda stats: device_balance_loss(stats, config),
    }
    if config.router == "relu":
        return {"l1": lambda stats: l1_loss(stats, config)}
    if config.router in WITHOUT_LOGITS:
        return {}
    return always | {name: f for name, f in optional.items() if term_weight(name, config) > 0}


def term_weight(name: str, config: MoEConfig) -> float:
    """Returns the config's weight of an auxiliary term."""
    field = {"z": "router_z_loss_weight"}.get(name, f"{name}_loss_weight")
    return getattr(config, field)


LINEAR = ("z", "sequence_balance")  # in the sums: no counting ahead is needed


def needs_whole_step(config: MoEConfig) -> bool:
    """Returns whether a loss of a microbatch needs the routing sums of the whole step."""
    return config.router == "relu" or any(
        term_weight(name, config) > 0 for name in auxiliary_terms(config) if name not in LINEAR
    )


def layer_terms(stats: RouterStats, config: MoEConfig) -> dict[str, jax.Array]:
    """Returns each term by layer, without its weight: float32 [L]. `stats` has a layer dim."""

    def term(name: str) -> Term:
        return lambda layer, own: auxiliary_terms(own)[name](layer)

    return {name: _by_layer(term(name), stats, config) for name in auxiliary_terms(config)}


def _by_layer(term: Term, stats: RouterStats, config: MoEConfig) -> jax.Array:
    """Returns float32 [L]: a term of each layer, over its own experts and by its own config."""

    def of_layers(stack: Stack) -> jax.Array:
        return jax.vmap(lambda layer: term(layer, stack.config))(of_stack(stats, stack))

    return jnp.concatenate([of_layers(s) for s in config.stacks(stats.tokens.shape[0])])


def over_layers(value_l: jax.Array, stats: RouterStats, config: MoEConfig) -> jax.Array:
    """Returns the balance loss of the model from those of its layers, by the convention.

    Summed over layers (megatron, switch), averaged (olmoe, maxtext), or of all layers' tokens
    pooled (huggingface), where imbalances of layers can cancel.
    """
    if config.balance_convention == "huggingface":
        pooled = jax.tree.map(lambda leaf: leaf.sum(0), stats)
        return load_balancing_loss(pooled, config)
    if config.balance_convention in ("olmoe", "maxtext"):
        return value_l.mean()
    return value_l.sum()


def auxiliary_loss(stats: RouterStats, l1_l: jax.Array | None, config: MoEConfig) -> jax.Array:
    """Returns the weighted sum of all auxiliary terms over the whole step, summed over layers.

    Args:
        stats: with a leading layer dim.
        l1_l: float32 [L]; the router state's coefficients of router `relu`, else None.
    """
    total = jnp.zeros((), jnp.float32)
    for name, value_l in layer_terms(stats, config).items():
        if name == "l1":
            assert l1_l is not None
            total += jnp.sum(jax.lax.stop_gradient(l1_l) * value_l)
        elif name == "balance":
            total += config.balance_loss_weight * over_layers(value_l, stats, config)
        else:
            total += term_weight(name, config) * value_l.sum()
    return total


def microbatch_balance(stats: RouterStats, total: Totals, config: MoEConfig) -> jax.Array:
    """Returns float32 [L]: this microbatch's part of the microbatch-level balance loss.

    A mean over microbatches, each weighed by its tokens.
    """
    share_l = stats.tokens.astype(jnp.float32) / jnp.maximum(total.tokens, 1).astype(jnp.float32)
    return share_l * _by_layer(load_balancing_loss, stats, config)


_SUMS = ("probability_e", "importance_e", "load_e", "z", "entropy", "sequence_balance")


def auxiliary_part(
    stats: RouterStats, whole: RouterStats, l1_l: jax.Array | None, config: MoEConfig
) -> jax.Array:
    """Returns what a microbatch adds to the auxiliary loss: a value with the right gradient.

    d loss(whole) / d sums, times the microbatch's sums. Where `loss` is linear in the sums the
    parts add up to it; in every case their gradients do.

    Args:
        stats: sums of the microbatch.
        whole: sums of the whole step.
    """
    fixed = jax.lax.stop_gradient(whole)

    def loss(sums: dict[str, jax.Array]) -> jax.Array:
        return auxiliary_loss(fixed._replace(**sums), l1_l, config)

    slope = jax.grad(loss)({name: getattr(fixed, name) for name in _SUMS})
    return sum(
        (jnp.vdot(slope[name], getattr(stats, name)) for name in _SUMS), jnp.zeros((), jnp.float32)
    )


class Losses(NamedTuple):
    """What a step's losses are.

    Attributes:
        loss: cross-entropy, nats a target.
        total: loss plus the weighted auxiliary losses; what is differentiated.
        terms: each auxiliary loss by layer, float32 [L], without its weight.
    """

    loss: jax.Array
    total: jax.Array
    terms: dict[str, jax.Array]


def cross_entropy(summed: jax.Array, total: Totals) -> jax.Array:
    """Returns this part's share of the mean cross-entropy of the step, from its sum."""
    return _divide(summed, total.targets)


def whole_losses(
    loss: jax.Array,
    microbatch_l: jax.Array | None,
    stats: RouterStats | None,
    l1_l: jax.Array | None,
    config: MoEConfig,
) -> Losses:
    """Returns the losses of a step from its cross-entropy and its summed routing.

    Args:
        microbatch_l: float32 [L]; microbatch-level balance loss, None where it is off.
        stats: of the whole step, with a leading layer dim; None for a dense model.
    """
    if stats is None:
        return Losses(loss, loss, {})
    terms = layer_terms(stats, config)
    total = loss + auxiliary_loss(stats, l1_l, config)
    if microbatch_l is not None:
        terms["microbatch_balance"] = microbatch_l
        total += config.microbatch_balance_loss_weight * microbatch_l.sum()
    return Losses(loss, total, terms)
