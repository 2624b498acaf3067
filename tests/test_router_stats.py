"""What a layer's routing did, in numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe_config import MoEConfig
from moejax.router_stats import (
    LEVEL_BINS,
    RouterStats,
    balance,
    expert_counts,
    first_choices,
    router_stats,
)
from moejax.routing import RouterInputs, Routing, route

E = 4
LOGIT_BTE = np.random.default_rng(0).normal(scale=2, size=(3, 5, E)).astype(np.float32)
REAL_BT = np.ones((3, 5), bool)

_stats_of = jax.jit(router_stats, static_argnums=3)
_balance = jax.jit(balance, static_argnums=4)


def _config(**changes) -> MoEConfig:
    defaults = {"num_experts": E, "top_k": 2, "expert_hidden": 4, "capacity_factor": None}
    return MoEConfig(**{**defaults, **changes})


def _route(logit_bte, mask_bt, config, state=None):
    weights = {"router": np.eye(logit_bte.shape[-1], dtype=np.float32)}
    return jax.jit(route, static_argnums=4)(
        logit_bte, weights, state or {}, RouterInputs(mask_bt), config
    )


def _stats(logit_bte, mask_bt, config, state=None):
    routing = _route(logit_bte, mask_bt, config, state)
    return _stats_of(routing, routing.expert_bts, mask_bt, config)


def test_stats_count_what_they_say():
    """A row of two tokens and a row of padding; the second token's last choice was dropped."""
    logit_bte = np.zeros((2, 2, E), np.float32)
    logit_bte[0, 0, 3] = 5
    mask_bt = np.array([[True, True], [False, False]])
    config = _config()
    routing = _route(logit_bte, mask_bt, config)
    np.testing.assert_array_equal(routing.expert_bts[0], [[3, 0], [0, 1]])
    kept_bts = np.array(routing.expert_bts)
    kept_bts[0, 1, 1] = E
    stats = _stats_of(routing, kept_bts, mask_bt, config)
    np.testing.assert_array_equal(stats.count_e, [2, 1, 0, 1])
    np.testing.assert_array_equal(stats.first_e, [1, 0, 0, 1])
    np.testing.assert_array_equal(stats.dropped_e, [0, 1, 0, 0])
    assert (int(stats.tokens), int(stats.padding), int(stats.sequences)) == (2, 2, 1)
    p = np.exp([0, 0, 0, 5]) / np.exp([0, 0, 0, 5]).sum()
    np.testing.assert_allclose(stats.probability_e, p + 0.25, rtol=1e-6)
    weight = p[3] / (p[3] + p[0])
    np.testing.assert_allclose(stats.importance_e, [1.5 - weight, 0.5, 0, weight], rtol=1e-6)
    np.testing.assert_array_equal(stats.load_e, np.zeros(E))
    np.testing.assert_allclose(stats.entropy, -(p * np.log(p)).sum() + np.log(4), rtol=1e-5)
    z = np.log(3 + np.exp(5)) ** 2 + np.log(4) ** 2
    np.testing.assert_allclose(stats.z, z, rtol=1e-6)
    shares = np.array([2, 1, 0, 1]) / 4
    np.testing.assert_allclose(
        stats.sequence_balance, 4 * (shares * (p + 0.25) / 2).sum(), rtol=1e-6
    )
    assert stats.level_eb.shape == (E, 0)
    assert stats.overflow_rounds == 0


@pytest.mark.parametrize("experts", [8, 64])
def test_z_of_zero_logits_is_the_squared_log_of_experts(experts):
    stats = _stats(
        np.zeros((2, 3, experts), np.float32), REAL_BT[:2, :3], _config(num_experts=experts)
    )
    np.testing.assert_allclose(stats.z / 6, np.log(experts) ** 2, rtol=1e-6)


def test_importance_of_one_expert_alone_has_a_squared_variation_of_e_minus_1():
    """CV^2 = Var / Mean^2 with the population's variance (claim 0.2)."""
    logit_bte = np.zeros((2, 3, E), np.float32)
    logit_bte[..., 2] = 50
    stats = _stats(logit_bte, REAL_BT[:2, :3], _config(top_k=1, normalize_weights=False))
    importance = np.asarray(stats.importance_e)
    np.testing.assert_allclose(importance, [0, 0, 6, 0], atol=1e-6)
    np.testing.assert_allclose(importance.var() / importance.mean() ** 2, E - 1, rtol=1e-5)


def test_load_is_the_sum_of_the_noisy_routers_probabilities():
    config = _config(router="noisy")
    weights = {"router": np.eye(E, dtype=np.float32), "router_noise": np.eye(E, dtype=np.float32)}
    key_b = np.arange(6, dtype=np.uint32).reshape(3, 2)
    routing = jax.jit(route, static_argnums=4)(
        LOGIT_BTE, weights, {}, RouterInputs(REAL_BT, None, key_b), config
    )
    stats = _stats_of(routing, routing.expert_bts, REAL_BT, config)
    np.testing.assert_allclose(stats.load_e, routing.load_bte.sum((0, 1)), rtol=1e-6)
    assert stats.load_e.sum() > 0


def test_levels_are_counted_in_bins_and_the_padding_is_not():
    """-1 is in the first bin, 0 in the first of the upper half, 1 and all above in the last."""
    level_bte = np.array([[[-1.0, 0.0], [0.999, 5.0], [-7.0, -0.001], [0.3, 0.3]]], np.float32)
    mask_bt = np.array([[True, True, True, False]])
    config = _config(router="threshold", num_experts=2, top_k=1)
    routing = _route(np.zeros((1, 4, 2), np.float32), mask_bt, config, {"threshold": np.zeros(2)})
    routing = routing._replace(level_bte=level_bte)
    counts = np.asarray(_stats_of(routing, routing.expert_bts, mask_bt, config).level_eb)
    assert {int(b): int(counts[0, b]) for b in np.flatnonzero(counts[0])} == {
        0: 2,
        LEVEL_BINS - 1: 1,
    }
    half = LEVEL_BINS // 2
    assert {int(b): int(counts[1, b]) for b in np.flatnonzero(counts[1])} == {
        half - 1: 1,
        half: 1,
        LEVEL_BINS - 1: 1,
    }


def test_first_choice_is_that_of_the_largest_weight():
    """A router with a column an expert has no order of choices; a token without any has none."""
    routing = Routing(
        jnp.array([[[0, 4, 2, 3], [4, 4, 4, 4]]]),
        jnp.array([[[0.1, 0.0, 0.3, 0.2], [0.0, 0.0, 0.0, 0.0]]]),
        *(jnp.zeros((1, 2, E)),) * 2,
    )
    np.testing.assert_array_equal(first_choices(routing), [[[2], [4]]])


@pytest.mark.parametrize("router", ["sigmoid_bias", "relu", "expert_choice"])
def test_appended_padding_changes_no_sum(router):
    """Two padding tokens a row and a whole row of padding: only the count of padding may change."""
    config = _config(router=router)
    state = {"bias": np.linspace(-0.1, 0.1, E, dtype=np.float32)} if "bias" in router else {}
    plain = _stats(LOGIT_BTE, REAL_BT, config, state)
    padded = np.pad(LOGIT_BTE, ((0, 1), (0, 2), (0, 0)), constant_values=3.0)
    more = _stats(padded, np.pad(REAL_BT, ((0, 1), (0, 2))), config, state)
    assert (int(plain.padding), int(more.padding)) == (0, 3 * 2 + 7)
    for name, expected, actual in zip(plain._fields, plain, more, strict=True):
        if name != "padding":
            np.testing.assert_allclose(actual, expected, rtol=1e-5, err_msg=name)


def test_stats_of_parts_add_up():
    mask_bt = REAL_BT.copy()
    mask_bt[0, 1:] = False
    config = _config(router="quantile")
    state = {"bias": np.zeros(E, np.float32)}
    whole = _stats(LOGIT_BTE, mask_bt, config, state)
    parts = [_stats(LOGIT_BTE[s], mask_bt[s], config, state) for s in (slice(0, 1), slice(1, 3))]
    for name, total, *part in zip(RouterStats._fields, whole, *parts, strict=True):
        np.testing.assert_allclose(part[0] + part[1], total, rtol=1e-5, err_msg=name)
    assert whole.level_eb.sum() == E * mask_bt.sum()


# Balance loss


def _value(convention, count_e, first_e, probability_e, tokens, **changes):
    config = _config(balance_convention=convention, num_experts=len(count_e), **changes)
    arrays = [np.array(count_e, np.int32), np.array(first_e, np.int32)]
    return _balance(*arrays, np.array(probability_e, np.float32), tokens, config)


@pytest.mark.parametrize(
    ("convention", "at_balance", "collapsed"),
    [
        ("megatron", 1, 2),
        ("olmoe", 1, 2),
        ("switch", 1, 4),
        ("huggingface", 2, 4),
        ("maxtext", 2, 4),
    ],
)
def test_balance_loss_by_convention(convention, at_balance, collapsed):
    """4 experts, top 2, 8 tokens, in balance; and all tokens on experts 0 and 1, 0 first.

    Collapsed with p = (1, 0, 0, 0): f_0 is 8/16 for megatron and olmoe, else 8/8; times 4.
    """
    even = _value(convention, [4] * 4, [2] * 4, [2] * 4, 8)
    np.testing.assert_allclose(even, at_balance, rtol=1e-6)
    one = _value(convention, [8, 8, 0, 0], [8, 0, 0, 0], [8, 0, 0, 0], 8)
    np.testing.assert_allclose(one, collapsed, rtol=1e-6)


def test_balance_does_not_depend_on_top_k_for_megatron():
    """Shares 3/4, 1/4 and mean probabilities 0.6, 0.4: 2 * (0.45 + 0.1) = 1.1, for any k."""
    for k, normalize in ((1, False), (2, True)):
        value = _value(
            "megatron", [3 * k, k], [3, 1], [2.4, 1.6], 4, top_k=k, normalize_weights=normalize
        )
        np.testing.assert_allclose(value, 1.1, rtol=1e-6)


def test_free_experts_weigh_less():
    """MoE++: 2 experts and 2 zero experts, tau = 0.75: (1 + 1 + 0.75 + 0.75) / 4 at balance."""
    config = _config(num_experts=2, zero_experts=2, zero_computation_weight=0.75)
    four = np.full(4, 4, np.int32)
    value = _balance(four, four, np.full(4, 2, np.float32), 8, config)
    np.testing.assert_allclose(value, 3.5 / 4, rtol=1e-6)


def test_balance_without_tokens_is_0():
    assert _value("megatron", [0] * 4, [0] * 4, [0] * 4, 0) == 0


def test_balance_has_no_gradient_through_the_counts():
    count_e, probability_e = jnp.array([6.0, 2.0]), jnp.array([2.4, 1.6])
    config = _config(num_experts=2)
    by_count, by_probability = jax.grad(balance, argnums=(0, 2))(
        count_e, count_e, probability_e, 4, config
    )
    np.testing.assert_array_equal(by_count, [0, 0])
    np.testing.assert_allclose(by_probability, [2 * 0.75 / 4, 2 * 0.25 / 4], rtol=1e-6)


def test_expert_counts_leave_out_the_sentinel():
    np.testing.assert_array_equal(expert_counts(jnp.array([[0, 2], [2, 3]]), 3), [1, 0, 2])
