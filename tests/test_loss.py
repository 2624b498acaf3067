"""The losses: each a sum over a part of the batch, divided by a count over the whole step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MoEConfig
from moejax.loss import Totals, losses, token_losses, totals
from moejax.routing import route, router_stats

E, V = 4, 11
RANDOM = np.random.default_rng(0)
LOGIT_BTV = RANDOM.normal(scale=3, size=(4, 6, V)).astype(np.float32)
TARGET_BT = RANDOM.integers(V, size=(4, 6)).astype(np.int32)
ROUTER_LOGIT_LBTE = RANDOM.normal(size=(2, 4, 6, E)).astype(np.float32)
# Row 0 ends in padding, row 2 is padding; a document's last token has no target.
SEGMENT_BT = np.array(
    [[1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1], [0] * 6, [1, 2, 2, 2, 3, 3]], np.int32
)
LOSS_MASK_BT = (SEGMENT_BT > 0) & (np.roll(SEGMENT_BT, -1, 1) == SEGMENT_BT)
LOSS_MASK_BT[:, -1] = False


def _config(**changes) -> MoEConfig:
    changes = {"balance_loss_weight": 0.5, "router_z_loss_weight": 0.25, **changes}
    return MoEConfig(num_experts=E, top_k=2, expert_hidden=4, **changes)


@jax.jit
def _stats(router_logit_lbte, mask_bt):
    def layer(logit_bte):
        routing = route(logit_bte, mask_bt, None, _config())
        return router_stats(routing, routing.expert_ts, mask_bt)

    return jax.vmap(layer)(router_logit_lbte)


def _losses(rows: slice, total: Totals, count_le, config):
    """The losses of some rows, as a microbatch of a step with these totals and counts."""
    loss_bt = token_losses(LOGIT_BTV[rows], TARGET_BT[rows])
    stats = _stats(ROUTER_LOGIT_LBTE[:, rows], SEGMENT_BT[rows] > 0)
    return losses(loss_bt, LOSS_MASK_BT[rows], stats, count_le, total, config)


def test_cross_entropy_is_minus_the_log_of_the_target_s_probability():
    p = np.exp(LOGIT_BTV.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, TARGET_BT[..., None], -1))[..., 0]
    np.testing.assert_allclose(token_losses(LOGIT_BTV, TARGET_BT), expected, rtol=1e-5)


def test_cross_entropy_survives_large_logits():
    np.testing.assert_allclose(
        token_losses(np.array([[[1e4, 0.0]]], np.float32), np.array([[1]])), [[1e4]]
    )


def test_a_target_outside_the_vocabulary_is_nan_and_not_another_token():
    loss_bt = token_losses(LOGIT_BTV[:1, :2], jnp.array([[V, 3]]))
    assert np.isnan(loss_bt[0, 0])
    assert np.isfinite(loss_bt[0, 1])


def test_totals_count_targets_tokens_and_sequences_of_packed_rows():
    """Row 0 has 4 real tokens in two documents, hence 2 targets; row 2 is no sequence."""
    total = totals(jnp.asarray(LOSS_MASK_BT), jnp.asarray(SEGMENT_BT))
    assert tuple(map(int, total)) == (2 + 5 + 0 + 3, 4 + 6 + 0 + 6, 3)


def test_the_loss_is_the_mean_over_targets_alone():
    total = totals(jnp.asarray(LOSS_MASK_BT), jnp.asarray(SEGMENT_BT))
    loss_bt = np.asarray(token_losses(LOGIT_BTV, TARGET_BT))
    dense = losses(loss_bt, LOSS_MASK_BT, None, None, total, _config())
    np.testing.assert_allclose(dense.loss, loss_bt[LOSS_MASK_BT].mean(), rtol=1e-6)
    assert (float(dense.balance), float(dense.z)) == (0, 0)
    assert dense.total == dense.loss


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_losses_of_unequal_microbatches_add_up_to_those_of_the_step(scope):
    """Rows 0, 1 have 7 targets and 10 tokens, rows 2, 3 have 3 and 6: no mean of means."""
    config = _config(balance_scope=scope)
    total = totals(jnp.asarray(LOSS_MASK_BT), jnp.asarray(SEGMENT_BT))
    count_le = _stats(ROUTER_LOGIT_LBTE, SEGMENT_BT > 0).count_e
    whole = _losses(slice(0, 4), total, count_le, config)
    parts = [_losses(rows, total, count_le, config) for rows in (slice(0, 2), slice(2, 4))]
    for name, expected, *part in zip(whole._fields, whole, *parts, strict=True):
        assert expected > 0.1
        np.testing.assert_allclose(sum(part), expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("scope", ["sequence", "global"])
def test_auxiliary_losses_by_hand(scope):
    """Balance: E * sum_e f_e P_e over each sequence, or over the step; summed over 2 layers."""
    config = _config(balance_scope=scope)
    total = totals(jnp.asarray(LOSS_MASK_BT), jnp.asarray(SEGMENT_BT))
    count_le = _stats(ROUTER_LOGIT_LBTE, SEGMENT_BT > 0).count_e
    actual = _losses(slice(0, 4), total, count_le, config)

    logit = ROUTER_LOGIT_LBTE.astype(np.float64)
    p = np.exp(logit) / np.exp(logit).sum(-1, keepdims=True)
    chosen = np.argsort(np.argsort(-logit, -1), -1) < 2  # the two largest of each token
    balance = 0.0
    for layer in range(2):
        scopes = [SEGMENT_BT > 0]
        if scope == "sequence":
            scopes = [(np.arange(4)[:, None] == b) & (SEGMENT_BT > 0) for b in (0, 1, 3)]
        values = [E * np.sum(chosen[layer][m].mean(0) / 2 * p[layer][m].mean(0)) for m in scopes]
        balance += np.mean(values)
    z = 2 * np.mean(np.log(np.exp(logit).sum(-1))[:, SEGMENT_BT > 0] ** 2)
    np.testing.assert_allclose(actual.balance, balance, rtol=1e-5)
    np.testing.assert_allclose(actual.z, z, rtol=1e-5)
    np.testing.assert_allclose(
        actual.total, float(actual.loss) + 0.5 * balance + 0.25 * z, rtol=1e-5
    )


def test_a_step_without_targets_has_no_loss_and_no_nan():
    zero = Totals(*(jnp.zeros((), jnp.int32),) * 3)
    stats = _stats(ROUTER_LOGIT_LBTE, np.zeros((4, 6), bool))
    parts = losses(jnp.ones((4, 6)), jnp.zeros((4, 6), bool), stats, stats.count_e, zero, _config())
    assert [float(value) for value in parts] == [0, 0, 0, 0]
