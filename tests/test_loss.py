"""The losses: functions of sums over the whole step, and what a microbatch adds to them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MoEConfig
from moejax.loss import (
    auxiliary_loss,
    auxiliary_part,
    auxiliary_terms,
    cross_entropy,
    layer_terms,
    load_balancing_loss,
    microbatch_balance,
    needs_whole_step,
    router_z_loss,
    squared_variation,
    token_losses,
    totals,
    whole_losses,
)
from moejax.moe_config import WITHOUT_LOGITS
from moejax.router_stats import RouterStats, router_stats
from moejax.routing import RouterInputs, route

E, V, L, B, T = 4, 11, 2, 8, 6
RANDOM = np.random.default_rng(0)
LOGIT_BTV = RANDOM.normal(scale=3, size=(B, T, V)).astype(np.float32)
TARGET_BT = RANDOM.integers(V, size=(B, T)).astype(np.int32)
ROUTER_LOGIT_LBTE = RANDOM.normal(scale=2, size=(L, B, T, E)).astype(np.float32)
NOISE_DE = RANDOM.normal(size=(E, E)).astype(np.float32)
KEY_B = RANDOM.integers(2**32, size=(B, 2), dtype=np.uint32)
# Row 0 ends in padding, row 2 is padding, rows 4 to 7 are nearly; a document's last token has no
# target.
SEGMENT_BT = np.array(
    [
        [1, 1, 2, 2, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0],
        [1, 2, 2, 2, 3, 3],
        *[[1, 1, 0, 0, 0, 0]] * 4,
    ],
    np.int32,
)
MASK_BT = SEGMENT_BT > 0
LOSS_MASK_BT = MASK_BT & (np.roll(SEGMENT_BT, -1, 1) == SEGMENT_BT)
LOSS_MASK_BT[:, -1] = False
SEQUENCES = [b for b in range(B) if MASK_BT[b].any()]


def _config(**changes) -> MoEConfig:
    """Returns a config with weights so that no two terms could be mistaken for each other."""
    weights = {"balance_loss_weight": 0.5, "router_z_loss_weight": 0.25}
    if changes.get("router") in ("relu", *WITHOUT_LOGITS):  # that refuse them
        weights = {}
    changes = {
        **weights,
        "capacity_factor": None,
        **changes,
    }
    return MoEConfig(num_experts=E, top_k=2, expert_hidden=4, **changes)


ALL = {
    "sequence_balance_loss_weight": 0.125,
    "importance_loss_weight": 0.75,
    "mutual_information_loss_weight": 1.5,
    "device_balance_loss_weight": 0.375,
    "device_groups": 2,
}
NOISY = {"router": "noisy", "importance_loss_weight": 0.75, "load_loss_weight": 0.6}
RELU = {"router": "relu"}
L1_L = np.array([0.5, 2.0], np.float32)


@functools.partial(jax.jit, static_argnums=1)
def _stats(rows, config: MoEConfig) -> RouterStats:
    """Routes logits: the router's matrix is the identity.

    Args:
        rows: logits [L, B, T, E], mask [B, T] and keys [B, 2] of some rows.
    """
    logit_lbte, mask_bt, key_b = rows
    weights = {"router": jnp.eye(E), "router_noise": jnp.asarray(NOISE_DE)}

    def layer(logit_bte):
        routing = route(logit_bte, weights, {}, RouterInputs(mask_bt, None, key_b), config)
        return router_stats(routing, routing.expert_bts, mask_bt, config)

    return jax.vmap(layer)(logit_lbte)


def _rows(rows: slice = slice(0, B), logit_lbte=ROUTER_LOGIT_LBTE):
    return logit_lbte[:, rows], MASK_BT[rows], KEY_B[rows]


def _parts(count: int) -> list[slice]:
    return [slice(start, start + B // count) for start in range(0, B, B // count)]


def _l1(config: MoEConfig):
    return jnp.asarray(L1_L) if config.router == "relu" else None


# Cross-entropy


def _summed(loss_bt, mask_bt):
    return jnp.sum(jnp.where(mask_bt, loss_bt, 0))


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
    assert tuple(map(int, total)) == (2 + 5 + 0 + 3 + 4, 4 + 6 + 0 + 6 + 8, 7)


def test_the_loss_is_the_mean_over_targets_alone():
    total = totals(jnp.asarray(LOSS_MASK_BT), jnp.asarray(SEGMENT_BT))
    loss_bt = np.asarray(token_losses(LOGIT_BTV, TARGET_BT))
    loss = cross_entropy(_summed(loss_bt, LOSS_MASK_BT), total)
    np.testing.assert_allclose(loss, loss_bt[LOSS_MASK_BT].mean(), rtol=1e-6)
    dense = whole_losses(loss, None, None, None, _config())
    assert dense.total == dense.loss == loss
    assert dense.terms == {}


@pytest.mark.parametrize("count", [2, 4, 8])
def test_cross_entropies_of_unequal_microbatches_add_up_to_that_of_the_step(count):
    """No mean of means: rows 0 and 1 have 7 targets, rows 2 and 3 have 3."""
    total = totals(jnp.asarray(LOSS_MASK_BT), jnp.asarray(SEGMENT_BT))
    loss_bt = token_losses(LOGIT_BTV, TARGET_BT)
    whole = cross_entropy(_summed(loss_bt, LOSS_MASK_BT), total)
    parts = [
        cross_entropy(_summed(loss_bt[rows], LOSS_MASK_BT[rows]), total) for rows in _parts(count)
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


# Auxiliary losses by hand


def _by_hand() -> dict[str, np.ndarray]:
    """Returns each term by layer, from the logits, by the papers' formulas with loops."""
    logit = ROUTER_LOGIT_LBTE.astype(np.float64)
    p = np.exp(logit) / np.exp(logit).sum(-1, keepdims=True)
    chosen = np.argsort(np.argsort(-logit, -1), -1) < 2  # the two largest of each token
    weight = np.where(chosen, p, 0) / np.where(chosen, p, 0).sum(-1, keepdims=True)
    found: dict[str, list] = {}

    def note(**terms):
        for name, value in terms.items():
            found.setdefault(name, []).append(value)

    for layer in range(L):
        c_te, p_te, w_te = chosen[layer][MASK_BT], p[layer][MASK_BT], weight[layer][MASK_BT]
        sequences = [
            E * np.sum(chosen[layer][b][MASK_BT[b]].mean(0) / 2 * p[layer][b][MASK_BT[b]].mean(0))
            for b in SEQUENCES
        ]
        entropy_t = -(p_te * np.log(p_te)).sum(-1)
        mean_e, importance_e = p_te.mean(0), w_te.sum(0)
        f_e = c_te.mean(0) * E / 2
        note(
            balance=E * np.sum(c_te.mean(0) / 2 * mean_e),
            z=np.mean(np.log(np.exp(logit[layer][MASK_BT]).sum(-1)) ** 2),
            sequence_balance=np.mean(sequences),
            importance=importance_e.var() / importance_e.mean() ** 2,
            mutual_information=entropy_t.mean() + np.sum(mean_e * np.log(mean_e)),
            # Experts 0 and 1 are on the first device, 2 and 3 on the second.
            device_balance=sum(f_e[d].mean() * mean_e[d].sum() for d in ([0, 1], [2, 3])),
        )
    return {name: np.array(values) for name, values in found.items()}


def test_every_auxiliary_loss_by_hand_and_their_weighted_sum():
    config, expected = _config(**ALL), _by_hand()
    stats = _stats(_rows(), config)
    actual = whole_losses(jnp.float32(3.0), None, stats, None, config)
    assert set(actual.terms) == set(expected)
    for name, value_l in expected.items():
        np.testing.assert_allclose(actual.terms[name], value_l, rtol=1e-5, err_msg=name)
        assert abs(value_l).min() > 0.01, name
    weights = {"z": 0.25, "balance": 0.5}
    weights |= {name.removesuffix("_loss_weight"): w for name, w in ALL.items() if "_loss_" in name}
    total = sum(weights[name] * value_l.sum() for name, value_l in expected.items())
    assert actual.loss == 3
    np.testing.assert_allclose(actual.total, 3 + total, rtol=1e-5)
    np.testing.assert_allclose(auxiliary_loss(stats, None, config), total, rtol=1e-5)


def test_load_by_hand():
    """Var / Mean^2 of the smooth loads (Shazeer et al. 2017), of the noisy router alone."""
    config = _config(**NOISY)
    stats = _stats(_rows(), config)
    load_le = np.asarray(stats.load_e, np.float64)
    assert load_le.std() > 1
    expected_l = load_le.var(-1) / load_le.mean(-1) ** 2
    np.testing.assert_allclose(layer_terms(stats, config)["load"], expected_l, rtol=1e-5)


def test_l1_by_hand():
    """ReMoE: E * sum_e f_e * mean gate_e, each layer weighed by the state's coefficient."""
    config = _config(**RELU)
    stats = _stats(_rows(), config)
    gate_lte = np.maximum(ROUTER_LOGIT_LBTE.astype(np.float64), 0)[:, MASK_BT]
    expected_l = E * np.sum((gate_lte > 0).mean(1) / 2 * gate_lte.mean(1), -1)
    losses = whole_losses(jnp.float32(0), None, stats, jnp.asarray(L1_L), config)
    assert list(losses.terms) == ["l1"]
    np.testing.assert_allclose(losses.terms["l1"], expected_l, rtol=1e-5)
    np.testing.assert_allclose(losses.total, 0.5 * expected_l[0] + 2 * expected_l[1], rtol=1e-5)
    slope_l = jax.grad(lambda l1_l: auxiliary_loss(stats, l1_l, config))(jnp.asarray(L1_L))
    np.testing.assert_array_equal(slope_l, 0)  # the state's rule moves it, never a gradient


@pytest.mark.parametrize("experts", [8, 16, 32, 64, 128, 256])
def test_z_loss_of_zero_logits_is_the_squared_log_of_experts(experts):
    config = dataclasses.replace(_config(), num_experts=experts)
    zero_bte = jnp.zeros((2, 3, experts))
    inputs = RouterInputs(jnp.ones((2, 3), bool))
    routing = route(zero_bte, {"router": jnp.eye(experts)}, {}, inputs, config)
    stats = router_stats(routing, routing.expert_bts, inputs.mask_bt, config)
    np.testing.assert_allclose(router_z_loss(stats), np.log(experts) ** 2, rtol=1e-6)


@pytest.mark.parametrize("experts", [2, 8, 64])
def test_squared_variation_is_0_at_balance_and_e_minus_1_where_one_has_all(experts):
    np.testing.assert_allclose(squared_variation(jnp.full(experts, 7.0)), 0, atol=1e-6)
    alone = jnp.zeros(experts).at[1].set(7.0)
    np.testing.assert_allclose(squared_variation(alone), experts - 1, rtol=1e-6)
    assert squared_variation(jnp.zeros(experts)) == 0
    # At any scale: the coefficient does not depend on the number of tokens.
    value_e = jnp.asarray(np.random.default_rng(0).uniform(size=experts).astype(np.float32))
    np.testing.assert_allclose(squared_variation(1000 * value_e), squared_variation(value_e), 1e-5)


def _layers(share_lke, tokens: int = 6, k: int = 2) -> RouterStats:
    """Returns stats whose first, ... k-th choices and probabilities have given shares [L, k, E]."""
    share_lke = np.asarray(share_lke, np.float32)
    zero_l = np.zeros(share_lke.shape[0], np.float32)
    assert share_lke.shape[1] == k
    stats = RouterStats(*(zero_l,) * len(RouterStats._fields))
    return stats._replace(
        count_e=(share_lke.sum(1) * tokens).astype(np.int32),
        first_e=(share_lke[:, 0] * tokens).astype(np.int32),
        tokens=np.full(zero_l.shape, tokens, np.int32),
        probability_e=share_lke.mean(1) * tokens,
        importance_e=share_lke.mean(1) * tokens,
        dropped_e=np.zeros(share_lke[:, 0].shape, np.int32),
        load_e=np.zeros_like(share_lke[:, 0]),
        level_eb=np.zeros((*share_lke[:, 0].shape, 0), np.int32),
    )


EVEN = np.full((2, E), 1 / E)
PAIRS = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0]]), np.array([[0.0, 0, 1, 0], [0, 0, 0, 1]])


def _balance_alone(stats: RouterStats, convention: str) -> float:
    config = _config(
        balance_loss_weight=1.0, router_z_loss_weight=0.0, balance_convention=convention
    )
    return float(auxiliary_loss(stats, None, config))


@pytest.mark.parametrize(
    ("convention", "balanced", "collapsed", "opposite"),
    [
        # Three balanced layers; three with all tokens on experts 0 and 1; one of these and one with
        # all tokens on experts 2 and 3. E = 4, k = 2. Huggingface pools layers: opposite
        # imbalances cancel. In Switch's f a token counts for its first choice alone.
        ("megatron", 3, 3 * 2, 2 * 2),
        ("switch", 3, 3 * 2, 2 * 2),
        ("huggingface", 2, 4, 2),
        ("maxtext", 2, 4, 4),
        ("olmoe", 1, 2, 2),
    ],
)
def test_balance_conventions_over_layers(convention, balanced, collapsed, opposite):
    """Each has the value that its source gives it, so that published coefficients carry over."""
    even = _layers([EVEN] * 3, tokens=8)
    assert _balance_alone(even, convention) == pytest.approx(balanced)
    assert _balance_alone(_layers([PAIRS[0]] * 3), convention) == pytest.approx(collapsed)
    assert _balance_alone(_layers(PAIRS), convention) == pytest.approx(opposite)


def test_balance_is_1_at_balance_and_e_where_one_expert_has_all():
    one = dataclasses.replace(_config(), top_k=1, normalize_weights=False)
    layer = jax.tree.map(lambda leaf: leaf[0], _layers([EVEN[:1]], tokens=8, k=1))
    np.testing.assert_allclose(load_balancing_loss(layer, one), 1)
    layer = jax.tree.map(lambda leaf: leaf[0], _layers([PAIRS[0][:1]], k=1))
    np.testing.assert_allclose(load_balancing_loss(layer, one), E)


def test_device_balance_counts_groups_of_experts_and_not_experts():
    """Experts 0 and 2 have everything, one in each of two groups: no device is overloaded."""
    config = _config(**ALL)
    groups = _layers([[[1.0, 0, 0, 0], [0, 0, 1, 0]], PAIRS[0]])
    terms = layer_terms(groups, config)
    np.testing.assert_allclose(terms["device_balance"], [1, 2])
    np.testing.assert_allclose(terms["balance"], [2, 2])


def test_mutual_information_is_0_where_tokens_are_alike_and_minus_log_e_where_each_has_its_own():
    config = _config(**ALL)
    alike, apart = _layers([EVEN]), _layers([EVEN])
    alike = alike._replace(entropy=np.full(1, 6 * np.log(E), np.float32))
    terms = [layer_terms(stats, config)["mutual_information"][0] for stats in (alike, apart)]
    np.testing.assert_allclose(terms, [0, -np.log(E)], atol=1e-6)


# Which terms there are


@pytest.mark.parametrize(
    ("changes", "names", "ahead"),
    [
        ({}, ["balance", "z"], True),
        # A sum over sequences or tokens needs no look at the other microbatches.
        ({"balance_loss_weight": 0.0}, ["balance", "z"], False),
        (
            {"balance_loss_weight": 0.0, "sequence_balance_loss_weight": 0.1},
            ["balance", "z", "sequence_balance"],
            False,
        ),
        (
            {"balance_loss_weight": 0.0, "importance_loss_weight": 0.1},
            ["balance", "z", "importance"],
            True,
        ),
        (
            {"balance_loss_weight": 0.0, "device_balance_loss_weight": 0.1, "device_groups": 2},
            ["balance", "z", "device_balance"],
            True,
        ),
        (
            {"balance_loss_weight": 0.0, "mutual_information_loss_weight": 0.1},
            ["balance", "z", "mutual_information"],
            True,
        ),
        (NOISY, ["balance", "z", "importance", "load"], True),
        (RELU, ["l1"], True),
        ({"router": "hash"}, [], False),
    ],
)
def test_terms_that_are_computed_and_whether_they_need_the_whole_step(changes, names, ahead):
    config = _config(**changes)
    assert list(auxiliary_terms(config)) == names
    assert needs_whole_step(config) == ahead


@pytest.mark.parametrize("router", WITHOUT_LOGITS)
def test_a_router_without_logits_has_no_auxiliary_loss(router):
    config = _config(router=router)
    losses = whole_losses(jnp.float32(2.0), None, _layers([EVEN]), None, config)
    assert (losses.loss, losses.total, losses.terms) == (2, 2, {})


# Microbatches

MIXES = {"softmax": ALL, "noisy": NOISY, "relu": RELU}
ALONE = {
    "balance": {"balance_loss_weight": 0.5},
    "z": {"router_z_loss_weight": 0.25},
    **{n.removesuffix("_loss_weight"): {n: w} for n, w in ALL.items() if "_loss_" in n},
}
ALONE["device_balance"]["device_groups"] = 2


@functools.cache
def _stats_of_rows(config: MoEConfig) -> RouterStats:
    """Returns the stats of each row alone: [B, L, ...]."""
    logit_bl1te = jnp.swapaxes(ROUTER_LOGIT_LBTE, 0, 1)[:, :, None]
    rows = (logit_bl1te, jnp.asarray(MASK_BT)[:, None], jnp.asarray(KEY_B)[:, None])
    return jax.vmap(lambda *row: _stats(row, config))(*rows)


def _microbatches(config: MoEConfig, count: int) -> tuple[RouterStats, RouterStats]:
    """Returns the stats of `count` microbatches [count, L, ...], and those of the whole step."""
    rows = _stats_of_rows(config)
    parts = jax.tree.map(lambda x: x.reshape(count, B // count, *x.shape[1:]).sum(1), rows)
    return parts, jax.tree.map(lambda leaf: leaf.sum(0), rows)


FLOATS = ("probability_e", "importance_e", "load_e", "z", "entropy", "sequence_balance")


def _slopes(value, stats: RouterStats) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """Returns a function of stats, and its gradient by every sum that a gradient flows to."""
    floats = {name: getattr(stats, name) for name in FLOATS}
    return jax.jit(jax.value_and_grad(lambda sums: value(stats._replace(**sums))))(floats)


def _whole(config: MoEConfig, whole: RouterStats):
    return _slopes(lambda stats: auxiliary_loss(stats, _l1(config), config), whole)


def _sum_of_parts(config: MoEConfig, parts: RouterStats, whole: RouterStats):
    part = functools.partial(auxiliary_part, whole=whole, l1_l=_l1(config), config=config)
    return _slopes(lambda stats: jax.vmap(part)(stats).sum(), parts)


def _mean_of_losses(config: MoEConfig, parts: RouterStats):
    """What is wrong: a mean of the microbatches' own losses."""
    loss = functools.partial(auxiliary_loss, l1_l=_l1(config), config=config)
    return _slopes(lambda stats: jax.vmap(loss)(stats).mean(), parts)


def _assert_slopes_agree(expected, actual):
    """Every microbatch's sums have the slope that the sums of the whole step have."""
    for name, slope in expected.items():
        wanted = np.broadcast_to(slope, actual[name].shape)
        atol = 1e-6 * np.abs(slope).max()
        np.testing.assert_allclose(actual[name], wanted, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_slopes_of_the_parts_are_those_of_the_whole(mix, count):
    """So gradients add up. Microbatches have 16, 8 or 0 tokens, and not all losses are linear."""
    config = _config(**mix)
    parts, whole = _microbatches(config, count)
    expected = _whole(config, whole)[1]
    moved = {name for name, slope in expected.items() if np.abs(slope).max() > 0}
    assert (
        moved
        == {
            "softmax": set(FLOATS) - {"load_e"},
            "noisy": set(FLOATS) - {"entropy", "sequence_balance"},
            "relu": {"probability_e"},
        }[config.router]
    )
    _assert_slopes_agree(expected, _sum_of_parts(config, parts, whole)[1])


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_a_mean_over_microbatches_is_something_else(mix):
    """Or the test above could not fail."""
    config = _config(**mix)
    parts, whole = _microbatches(config, 4)
    with pytest.raises(AssertionError):
        _assert_slopes_agree(_whole(config, whole)[1], _mean_of_losses(config, parts)[1])


@pytest.mark.parametrize("changes", ALONE.values(), ids=ALONE)
def test_slopes_of_the_parts_of_one_loss_alone(changes):
    config = _config(**{"balance_loss_weight": 0.0, "router_z_loss_weight": 0.0, **changes})
    parts, whole = _microbatches(config, 4)
    expected = _whole(config, whole)[1]
    assert max(np.abs(slope).max() for slope in expected.values()) > 1e-4
    _assert_slopes_agree(expected, _sum_of_parts(config, parts, whole)[1])


def test_gradients_of_the_parts_add_up_to_that_of_the_whole():
    """Down to the router's logits, through counts, weights and probabilities."""
    config = _config(**ALL)

    def whole(logit_lbte):
        return auxiliary_loss(_stats(_rows(logit_lbte=logit_lbte), config), None, config)

    def parts(logit_lbte):
        total = _stats(_rows(logit_lbte=logit_lbte), config)
        stats = (_stats(_rows(rows, logit_lbte), config) for rows in _parts(2))
        return sum(auxiliary_part(part, total, None, config) for part in stats)

    expected, actual = (
        jax.jit(jax.grad(f))(jnp.asarray(ROUTER_LOGIT_LBTE)) for f in (whole, parts)
    )
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("convention", ["megatron", "switch", "huggingface", "maxtext", "olmoe"])
def test_parts_of_every_balance_convention_add_up(convention):
    """The value too: at given counts the balance loss is linear in the probabilities."""
    config = _config(balance_convention=convention, sequence_balance_loss_weight=0.125)
    parts, whole = _microbatches(config, 4)
    value, expected = _whole(config, whole)
    sum_of_parts, actual = _sum_of_parts(config, parts, whole)
    np.testing.assert_allclose(sum_of_parts, value, rtol=1e-5)
    _assert_slopes_agree(expected, actual)


def test_microbatch_balance_is_a_mean_of_microbatches_by_their_tokens():
    """The loss that most trainers have: it changes with accumulation, by its definition."""
    config = _config()
    total = totals(jnp.asarray(LOSS_MASK_BT), jnp.asarray(SEGMENT_BT))
    balance_of = {}
    for count in (1, 4):
        stats = [_stats(_rows(rows), config) for rows in _parts(count)]
        balance_of[count] = sum(microbatch_balance(s, total, config) for s in stats)
        tokens = [int(s.tokens[0]) for s in stats]
        by_layer = [layer_terms(s, config)["balance"] for s in stats]
        expected = sum(t * np.asarray(b) for t, b in zip(tokens, by_layer, strict=True))
        np.testing.assert_allclose(balance_of[count], expected / sum(tokens), rtol=1e-6)
    np.testing.assert_allclose(balance_of[1], _by_hand()["balance"], rtol=1e-5)
    assert (balance_of[4] > balance_of[1] * 1.05).all()


def test_the_microbatch_balance_loss_is_weighed_and_reported():
    config = _config(microbatch_balance_loss_weight=0.7)
    stats = _stats(_rows(), config)
    without = whole_losses(jnp.float32(1.0), None, stats, None, config)
    level_l = jnp.array([3.0, 5.0])
    losses = whole_losses(jnp.float32(1.0), level_l, stats, None, config)
    np.testing.assert_allclose(losses.total - without.total, 0.7 * 8, rtol=1e-5)
    np.testing.assert_array_equal(losses.terms["microbatch_balance"], level_l)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_a_step_without_tokens_has_no_loss_and_no_nan(mix):
    config = _config(**mix)
    rows = (ROUTER_LOGIT_LBTE, np.zeros((B, T), bool), KEY_B)

    def auxiliary(logit_lbte):
        return auxiliary_loss(_stats((logit_lbte, *rows[1:]), config), _l1(config), config)

    value, gradient = jax.value_and_grad(auxiliary)(jnp.asarray(ROUTER_LOGIT_LBTE))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    no_target = np.zeros((B, T), bool)
    total = totals(jnp.asarray(no_target), jnp.zeros((B, T), jnp.int32))
    assert cross_entropy(_summed(jnp.ones((B, T)), no_target), total) == 0
    level_l = microbatch_balance(_stats(rows, config), total, config)
    np.testing.assert_array_equal(level_l, 0)
