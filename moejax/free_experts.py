"""Experts without a network: zero, copy and constant (MoE++, Jin et al. 2024, arXiv:2410.07348).

Every device computes them for its own tokens, so nothing is exchanged and no slot is taken.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moejax.moe_config import MoEConfig


def free_outputs(
    weights: Mapping[str, jax.Array],
    x_btd: jax.Array,
    expert_bts: jax.Array,
    weight_bts: jax.Array,
    config: MoEConfig,
) -> jax.Array:
    """Returns the weighted sum [B, T, D] of the outputs of the free experts that tokens chose.

    A zero expert gives 0, a copy expert x, constant expert j gives a1 * x + a2 * v_j with
    (a1, a2) = softmax(x W_j). Choices are numbered from `num_experts` on, in this order.
    """
    first_copy = config.num_experts + config.zero_experts
    first_constant = first_copy + config.copy_experts
    x32_btd = x_btd.astype(jnp.float32)

    def chosen_weight(first: int, count: int) -> jax.Array:
        inside_bts = (expert_bts >= first) & (expert_bts < first + count)
        return jnp.where(inside_bts, weight_bts, 0).sum(-1)[..., None]

    y_btd = x32_btd * chosen_weight(first_copy, config.copy_experts)
    for j in range(config.constant_experts):
        logit_bta = jnp.einsum("btd,da->bta", x32_btd, weights["constant_gate"][j])
        mix_bta = jax.nn.softmax(logit_bta, axis=-1)
        constant_11d = weights["constant"][j][None, None]
        out_btd = mix_bta[..., :1] * x32_btd + mix_bta[..., 1:] * constant_11d
        y_btd += out_btd * chosen_weight(first_constant + j, 1)
    return y_btd.astype(x_btd.dtype)
