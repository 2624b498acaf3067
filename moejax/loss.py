"""The losses. Each is a sum over a part of the batch divided by a count over the whole step.

So the losses, gradients and metrics of microbatches and shards add up to those of one large batch,
whatever the number of real tokens in each part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.config import MoEConfig
from moejax.routing import RouterStats, balance


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

    A target outside the vocabulary gives NaN.
    """
    lse_bt = jax.nn.logsumexp(logit_btv, axis=-1)
    picked = jnp.take_along_axis(logit_btv, target_bt[..., None], axis=-1, mode="fill")[..., 0]
    return lse_bt - picked


def load_balancing_loss(stats: RouterStats) -> jax.Array:
    """Returns the load-balancing loss of one layer over a whole batch; 1 at perfect balance.

    For a model of one's own that calls `MoE`: add it, times a weight such as 0.01, to the loss.
    """
    return balance(stats.count_e, stats.probability_e, stats.tokens)


def router_z_loss(stats: RouterStats) -> jax.Array:
    """Returns the mean of logsumexp(logits)^2 over tokens (Zoph et al. 2022, eq. 5).

    Its usual weight is 0.001.
    """
    return _divide(stats.z, stats.tokens)


class Losses(NamedTuple):
    """float32 scalars; `total` is what is differentiated.

    Attributes:
        loss: cross-entropy, nats a target.
        balance: load-balancing loss summed over layers, without its weight.
        z: router z-loss summed over layers, without its weight.
        total: loss + balance_loss_weight * balance + router_z_loss_weight * z.
    """

    loss: jax.Array
    balance: jax.Array
    z: jax.Array
    total: jax.Array


def losses(
    loss_bt: jax.Array,
    mask_bt: jax.Array,
    stats: RouterStats | None,
    count_le: jax.Array | None,
    total: Totals,
    config: MoEConfig,
) -> Losses:
    """Returns this microbatch's part of the step's losses.

    Args:
        loss_bt: float32; `token_losses`.
        mask_bt: bool; which of them count.
        stats: routing of this microbatch, with a leading layer dim; None for a dense model.
        count_le: int32 [L, E]; assignments of the whole step, for `balance_scope="global"`.
        total: counts of the whole step.
    """
    loss = _divide(jnp.sum(jnp.where(mask_bt, loss_bt, 0)), total.targets)
    if stats is None:
        zero = jnp.zeros((), jnp.float32)
        return Losses(loss, zero, zero, loss)
    if config.balance_scope == "sequence":
        balance_loss = _divide(stats.sequence_balance.sum(), total.sequences)
    else:
        assert count_le is not None
        per_layer = jax.vmap(lambda count, p: balance(count, p, total.tokens))
        balance_loss = per_layer(count_le, stats.probability_e).sum()
    z = _divide(stats.z.sum(), total.tokens)
    weighted = config.balance_loss_weight * balance_loss + config.router_z_loss_weight * z
    return Losses(loss, balance_loss, z, loss + weighted)
