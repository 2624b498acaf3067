"""Routing as pure functions: selection, weights, the bias, the auxiliary losses and the counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MoEConfig
from moejax.routing import (
    balance,
    expert_counts,
    initial_router_state,
    route,
    router_logits,
    router_stats,
    update_router_state,
)

E = 8
LOGIT_BTE = np.random.default_rng(0).normal(scale=2, size=(3, 5, E)).astype(np.float32)
REAL_BT = np.ones((3, 5), bool)
ONE = np.ones(1, bool)

_route = jax.jit(route, static_argnums=3)
_sums = jax.jit(router_stats)
_balance = jax.jit(balance)


def _config(**changes) -> MoEConfig:
    return MoEConfig(**{"num_experts": E, "top_k": 2, "expert_hidden": 4, **changes})


def _logits(*probabilities: float) -> np.ndarray:
    """Returns the logits [1, E] of one token whose softmax is `probabilities`."""
    return np.log(np.array([probabilities], np.float32))


def _stats(logit_bte, mask_bt, config, bias_e=None):
    routing = _route(logit_bte, mask_bt, bias_e, config)
    return _sums(routing, routing.expert_ts, mask_bt)


def test_softmax_weights_are_the_probabilities_of_the_selected_experts():
    logit_te = _logits(0.125, 0.5, 0.125, 0.25)
    config = _config(num_experts=4, normalize_weights=False)
    routing = _route(logit_te, ONE, None, config)
    np.testing.assert_array_equal(routing.expert_ts, [[1, 3]])
    np.testing.assert_allclose(routing.weight_ts, [[0.5, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(routing.probability_te, [[0.125, 0.5, 0.125, 0.25]], rtol=1e-6)


def test_normalized_weights_are_divided_by_their_sum():
    config = _config(num_experts=4, normalize_weights=True)
    routing = _route(_logits(0.125, 0.5, 0.125, 0.25), ONE, None, config)
    np.testing.assert_allclose(routing.weight_ts, [[2 / 3, 1 / 3]], rtol=1e-6)


def test_normalizing_after_softmax_is_softmax_over_the_selected():
    """renorm(top-k(softmax l)) and softmax(top-k(l)) are the same numbers (claim 0.4)."""
    routing = _route(LOGIT_BTE, REAL_BT, None, _config(top_k=3))
    other = jax.nn.softmax(jax.lax.top_k(LOGIT_BTE, 3)[0], axis=-1)
    np.testing.assert_allclose(routing.weight_ts, other, rtol=2e-6)
    unnormalized = _route(LOGIT_BTE, REAL_BT, None, _config(top_k=3, normalize_weights=False))
    assert np.abs(unnormalized.weight_ts - other).max() > 0.01


def test_top_1_weight_is_the_largest_probability():
    routing = _route(LOGIT_BTE, REAL_BT, None, _config(top_k=1, normalize_weights=False))
    largest = jax.nn.softmax(LOGIT_BTE, axis=-1).max(-1)
    np.testing.assert_allclose(routing.weight_ts[..., 0], largest, rtol=1e-6)
    assert routing.weight_ts.max() < 1


def test_equal_logits_select_the_first_experts_on_every_layout():
    routing = _route(np.zeros((2, E), np.float32), np.ones(2, bool), None, _config())
    np.testing.assert_array_equal(routing.expert_ts, [[0, 1], [0, 1]])


def test_the_bias_selects_but_never_enters_the_weight():
    """Sigmoid scores 0.9, 0.8, 0.5, 0.1; a bias of 1 brings in the last, with a weight of 0.1."""
    score = np.array([[0.9, 0.8, 0.5, 0.1]], np.float32)
    logit_te = np.log(score) - np.log1p(-score)
    config = _config(num_experts=4, router="sigmoid_bias", normalize_weights=False)
    plain = _route(logit_te, ONE, np.zeros(4, np.float32), config)
    np.testing.assert_array_equal(plain.expert_ts, [[0, 1]])
    biased = _route(logit_te, ONE, np.array([0, 0, 0, 1], np.float32), config)
    np.testing.assert_array_equal(biased.expert_ts, [[3, 0]])
    np.testing.assert_allclose(biased.weight_ts, [[0.1, 0.9]], rtol=1e-5)
    np.testing.assert_array_equal(biased.probability_te, plain.probability_te)
    np.testing.assert_allclose(biased.probability_te.sum(), 1, rtol=1e-6)


def test_the_bias_gets_no_gradient():
    config = _config(router="sigmoid_bias")

    def loss(bias_e):
        routing = _route(LOGIT_BTE, REAL_BT, bias_e, config)
        return jnp.sum(routing.weight_ts**2) + jnp.sum(routing.probability_te**2)

    np.testing.assert_array_equal(jax.grad(loss)(jnp.linspace(-1, 1, E)), np.zeros(E))


def test_bias_update_raises_what_has_too_little_load_and_recentres():
    """Loads 10, 2, 4, 0 around a mean of 4: signs -1, +1, 0, +1, whose mean 1/4 is taken off."""
    config = _config(num_experts=4, router="sigmoid_bias", bias_update_rate=0.01)
    state = initial_router_state(config, num_layers=2)
    np.testing.assert_array_equal(state["bias"], np.zeros((2, 4)))
    count_le = jnp.array([[10, 2, 4, 0], [4, 4, 4, 4]])
    bias_le = update_router_state(state, count_le, config)["bias"]
    moved = 0.01 * (np.array([-1, 1, 0, 1]) - 0.25)
    np.testing.assert_allclose(bias_le, [moved, np.zeros(4)], atol=1e-8)
    for _ in range(20):
        bias_le = update_router_state({"bias": bias_le}, count_le, config)["bias"]
    np.testing.assert_allclose(bias_le.sum(-1), 0, atol=1e-6)
    assert bias_le[0, 0] < bias_le[0, 2] < bias_le[0, 3]


def test_a_softmax_router_keeps_no_state():
    assert initial_router_state(_config(), 2) == {}
    assert update_router_state({}, jnp.ones((2, E), jnp.int32), _config()) == {}


def test_padding_selects_nothing_and_weighs_nothing():
    mask_bt = REAL_BT.copy()
    mask_bt[0, 3:] = mask_bt[2] = False
    routing = _route(LOGIT_BTE, mask_bt, None, _config())
    padding = ~mask_bt
    assert (np.asarray(routing.expert_ts)[padding] == E).all()
    assert (np.asarray(routing.weight_ts)[padding] == 0).all()
    assert (np.asarray(routing.probability_te)[padding] == 0).all()
    assert (np.asarray(routing.expert_ts)[~padding] < E).all()


def test_appended_padding_changes_no_sum_and_no_bias():
    """Two padding tokens a row and a whole row of padding: only the count of padding may change."""
    config = _config(router="sigmoid_bias")
    bias_e = np.linspace(-0.1, 0.1, E, dtype=np.float32)
    plain = _stats(LOGIT_BTE, REAL_BT, config, bias_e)
    padded = np.pad(LOGIT_BTE, ((0, 1), (0, 2), (0, 0)), constant_values=3.0)
    more = _stats(padded, np.pad(REAL_BT, ((0, 1), (0, 2))), config, bias_e)
    assert (int(plain.padding), int(more.padding)) == (0, 3 * 2 + 7)
    for name, expected, actual in zip(plain._fields, plain, more, strict=True):
        if name != "padding":
            np.testing.assert_allclose(actual, expected, rtol=1e-6, err_msg=name)
    before, after = (
        update_router_state({"bias": bias_e[None]}, s.count_e[None], config) for s in (plain, more)
    )
    np.testing.assert_array_equal(after["bias"], before["bias"])
    assert np.abs(after["bias"] - bias_e[None]).max() > 0


def test_stats_of_parts_add_up():
    mask_bt = REAL_BT.copy()
    mask_bt[0, 1:] = False
    whole = _stats(LOGIT_BTE, mask_bt, _config())
    parts = [_stats(LOGIT_BTE[s], mask_bt[s], _config()) for s in (slice(0, 1), slice(1, 3))]
    for name, total, *part in zip(whole._fields, whole, *parts, strict=True):
        np.testing.assert_allclose(part[0] + part[1], total, rtol=1e-6, err_msg=name)


def test_stats_count_what_they_say():
    """A row of two tokens and a row of padding; the second token's last choice was dropped."""
    logit_bte = np.zeros((2, 2, 4), np.float32)
    logit_bte[0, 0, 3] = 5
    mask_bt = np.array([[True, True], [False, False]])
    config = _config(num_experts=4)
    routing = _route(logit_bte, mask_bt, None, config)
    np.testing.assert_array_equal(routing.expert_ts[0], [[3, 0], [0, 1]])
    kept_bts = np.array(routing.expert_ts)
    kept_bts[0, 1, 1] = 4
    stats = _sums(routing, kept_bts, mask_bt)
    np.testing.assert_array_equal(stats.count_e, [2, 1, 0, 1])
    np.testing.assert_array_equal(stats.dropped_e, [0, 1, 0, 0])
    assert (int(stats.tokens), int(stats.padding), int(stats.sequences)) == (2, 2, 1)
    p = np.exp([0, 0, 0, 5]) / np.exp([0, 0, 0, 5]).sum()
    np.testing.assert_allclose(stats.probability_e, p + 0.25, rtol=1e-6)
    np.testing.assert_allclose(stats.entropy, -(p * np.log(p)).sum() + np.log(4), rtol=1e-5)
    shares = np.array([2, 1, 0, 1]) / 4
    np.testing.assert_allclose(
        stats.sequence_balance, 4 * (shares * (p + 0.25) / 2).sum(), rtol=1e-6
    )


@pytest.mark.parametrize("experts", [8, 64])
def test_z_loss_of_zero_logits_is_the_squared_log_of_experts(experts):
    stats = _stats(
        np.zeros((2, 3, experts), np.float32), REAL_BT[:2, :3], _config(num_experts=experts)
    )
    np.testing.assert_allclose(stats.z / 6, np.log(experts) ** 2, rtol=1e-6)


def test_balance_is_1_when_uniform_and_e_when_collapsed():
    uniform = _balance(np.full(E, 6), np.full(E, 3, np.float32), 24)
    np.testing.assert_allclose(uniform, 1, rtol=1e-6)
    collapsed = _balance(np.eye(E, dtype=np.int32)[0] * 24, np.eye(E, dtype=np.float32)[0] * 24, 24)
    np.testing.assert_allclose(collapsed, E, rtol=1e-6)


def test_balance_does_not_depend_on_top_k():
    """Shares 3/4, 1/4 and mean probabilities 0.6, 0.4: 2 * (0.45 + 0.1) = 1.1, for any k."""
    for k in (1, 2):
        value = _balance(np.array([3 * k, k]), np.array([2.4, 1.6], np.float32), 4)
        np.testing.assert_allclose(value, 1.1, rtol=1e-6)


def test_balance_without_tokens_is_0():
    assert _balance(np.zeros(E, np.int32), np.zeros(E, np.float32), 0) == 0


def test_balance_has_no_gradient_through_the_counts():
    count_e, probability_e = jnp.array([3.0, 1.0]), jnp.array([2.4, 1.6])
    by_count, by_probability = jax.grad(_balance, argnums=(0, 1))(count_e, probability_e, 4)
    np.testing.assert_array_equal(by_count, [0, 0])
    np.testing.assert_allclose(by_probability, [2 * 0.75 / 4, 2 * 0.25 / 4], rtol=1e-6)


def test_router_gets_a_task_gradient_from_top_1_only_without_normalization():
    """If all experts give 1, y is the sum of weights: constant when normalised (claim 0.7)."""

    def gradient(**changes):
        def y(logit_bte):
            return _route(logit_bte, REAL_BT, None, _config(**changes)).weight_ts.sum()

        return np.abs(jax.grad(y)(LOGIT_BTE)).max()

    assert gradient(top_k=1, normalize_weights=False) > 0.05
    assert gradient(top_k=2, normalize_weights=False) > 0.05
    assert gradient(top_k=2, normalize_weights=True) < 1e-7


def test_router_logits_of_bfloat16_are_summed_in_float32():
    """256 + 1 is 256 in bfloat16: a bfloat16 sum over D would tie experts 0 and 1."""
    x_td = jnp.array([[256.0, 1.0]], jnp.bfloat16)
    logit_te = router_logits(x_td, jnp.array([[1.0, 1.0], [1.0, 0.0]]))
    assert logit_te.dtype == jnp.float32
    np.testing.assert_array_equal(logit_te, [[257.0, 256.0]])


def test_expert_counts_leave_out_the_sentinel():
    np.testing.assert_array_equal(expert_counts(jnp.array([[0, 2], [2, 3]]), 3), [1, 0, 2])
