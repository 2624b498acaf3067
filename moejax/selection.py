"""Which experts and tokens a score picks: pure functions of arrays.

Equal scores go to the lowest index, and a score of -inf is never picked. No gradient flows through
a choice; E stands for no expert.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from moejax.sharding import vary_like

SINKHORN_ITERATIONS = 20  # tests/test_routing.py: sums within 1e-4 on logits skewed by 3 deviations


def top_experts(score_bte: jax.Array, top_k: int) -> jax.Array:
    """Returns int32 [B, T, S]: the `top_k` experts with the largest scores, the best first."""
    score_bts, expert_bts = jax.lax.top_k(jax.lax.stop_gradient(score_bte), top_k)
    return jnp.where(jnp.isneginf(score_bts), score_bte.shape[-1], expert_bts)


def limit_groups(score_bte: jax.Array, groups: int, kept: int) -> jax.Array:
    """Puts -inf for all experts but those of each token's `kept` best of `groups` equal groups.

    A group is as good as the sum of its two best scores (DeepSeek-V3, arXiv:2412.19437, section
    2.1.2), or as its only score.
    """
    score_btge = rearrange(jax.lax.stop_gradient(score_bte), "b t (g e) -> b t g e", g=groups)
    best_btgn, _ = jax.lax.top_k(score_btge, min(2, score_btge.shape[-1]))
    group_btg = jnp.where(jnp.isneginf(best_btgn), 0, best_btgn).sum(-1)
    _, kept_btm = jax.lax.top_k(group_btg, kept)
    open_btg = jax.nn.one_hot(kept_btm, groups, dtype=bool).any(-2)
    limited_btge = jnp.where(open_btg[..., None], score_btge, -jnp.inf)
    return rearrange(limited_btge, "b t g e -> b t (g e)")


def kth_excluding(score_bte: jax.Array, top_k: int) -> jax.Array:
    """Returns [B, T, E]: the `top_k`-th largest of the scores of all experts but this one.

    Shazeer et al. 2017 (arXiv:1701.06538), appendix A. It is the k-th largest score for an expert
    that is not among the top k, and the one after it for an expert that is. The gradient flows to
    the score that was found. Needs `top_k` < E.
    """
    _, order_bts = jax.lax.top_k(jax.lax.stop_gradient(score_bte), top_k + 1)
    bounds_bt2 = jnp.take_along_axis(score_bte, order_bts[..., -2:], axis=-1)
    inside_bte = jax.nn.one_hot(order_bts[..., :-1], score_bte.shape[-1], dtype=bool).any(-2)
    return jnp.where(inside_bte, bounds_bt2[..., 1:], bounds_bt2[..., :1])


def top_tokens(score_gte: jax.Array, count_g: jax.Array, most: int) -> jax.Array:
    """Returns bool [G, T, E]: the `count_g` tokens of the group with an expert's largest scores.

    Args:
        score_gte: -inf for what cannot be picked, such as padding.
        count_g: int32; tokens that each expert of the group takes.
        most: the largest value that `count_g` can have.
    """

    def pick(score_t, count):
        best_c, token_c = jax.lax.top_k(score_t, most)
        taken_c = (jnp.arange(most) < count) & ~jnp.isneginf(best_c)
        nobody_t = jnp.zeros(score_t.shape, bool)
        return nobody_t.at[jnp.where(taken_c, token_c, score_t.size)].set(True, mode="drop")

    by_expert = jax.vmap(pick, in_axes=(1, None), out_axes=1)
    return jax.vmap(by_expert)(jax.lax.stop_gradient(score_gte), count_g)


def sinkhorn(logit_gte: jax.Array, mask_gt: jax.Array) -> jax.Array:
    """Returns the log of the plan whose tokens give 1 each and whose experts get equal shares.

    Alternates f_t = -lse_e(logit + g) and g_e = log(T / E) - lse_t(logit + f) over the T real
    tokens of a group (Clark et al. 2022, arXiv:2202.01169, S-BASE). In log space: exp(89) is
    infinite in float32. The experts' sums come last and are exact.

    Args:
        logit_gte: -inf for an expert that is closed to a token.
        mask_gt: bool; False for padding, which has no part in the sums.
    """
    logit_gte = jax.lax.stop_gradient(logit_gte)
    tokens_g = mask_gt.sum(-1, dtype=jnp.int32)
    # A group of padding alone is treated as one of real tokens, so that no infinities meet.
    real_gt1 = (mask_gt | (tokens_g == 0)[:, None])[..., None]
    share_g11 = jnp.log(jnp.maximum(tokens_g, 1) / logit_gte.shape[-1])[:, None, None]

    def balance(_, plan):
        _, g_g1e = plan
        f_gt1 = -jax.nn.logsumexp(logit_gte + g_g1e, axis=-1, keepdims=True)
        given_gte = jnp.where(real_gt1, logit_gte + f_gt1, -jnp.inf)
        got_g1e = jax.nn.logsumexp(given_gte, axis=1, keepdims=True)
        # Nobody gives to an expert that is closed to the whole group.
        return f_gt1, jnp.where(jnp.isneginf(got_g1e), 0, share_g11 - got_g1e)

    start = jnp.zeros_like(logit_gte[..., :1]), jnp.zeros_like(logit_gte[:, :1])
    f_gt1, g_g1e, _ = vary_like(*start, logit_gte)
    f_gt1, g_g1e = jax.lax.fori_loop(0, SINKHORN_ITERATIONS, balance, (f_gt1, g_g1e))
    return logit_gte + f_gt1 + g_g1e
