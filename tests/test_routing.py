"""Every router as a pure function: formulas, selection, knobs, replay, padding and causality."""

import functools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.moe_config import ALL_EXPERTS, NOT_CAUSAL, READ_BY, SCORED, MoEConfig, Router
from moejax.parameters import moe_parameters
from moejax.router_logits import router_matmul
from moejax.router_state import initial_router_state
from moejax.routing import RouterInputs, route, soft_mixing
from moejax.selection import kth_excluding, limit_groups, sinkhorn, top_tokens
from moejax.sharding import vary_like

D, E, B, T, V = 16, 8, 4, 6, 11
CUT = 3  # of T; earlier tokens are those before it
ROUTERS = get_args(Router)
REPLAYED = [name for name in ROUTERS if name != "soft"]  # soft has no choices
LEARNED = [r for r in READ_BY["logit_cap"] if r != "soft"]  # from one column of weights an expert
PROBABILITY = np.array([[[0.125, 0.5, 0.125, 0.25]]], np.float32)


def _config(router="softmax", **changes) -> MoEConfig:
    defaults = {"num_experts": E, "top_k": 2, "expert_hidden": 4, "capacity_factor": None}
    return MoEConfig(**{"router": router, **defaults, **changes})


KNOBS = {"jitter": 0.1, "expert_dropout": 0.7, "gate_dropout": 0.3}  # random, in training alone


def _knobs(router) -> dict[str, float]:
    return {name: value for name, value in KNOBS.items() if router in READ_BY[name]}


def _full_config(router) -> MoEConfig:
    """A config with every random knob that the router reads, compiled once for all tests."""
    return _config(router, **_knobs(router))


def _random(*shape, scale=1.0, seed=0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype(np.float32)


def _weights(config, d=D):
    random = np.random.default_rng(7)
    shapes = {n: p.shape for n, p in moe_parameters(config, d).items() if n.startswith("router")}
    drawn = {n: random.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    return drawn | {n: np.float32(1.5) for n, shape in shapes.items() if shape == ()}


def _state(config):
    state = {name: value[0] for name, value in initial_router_state(config, 1, V).items()}
    if "bias" in state:
        state["bias"] = jnp.linspace(-0.2, 0.2, config.choices)
    return state


def _keys(b=B, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, (b, 2), np.uint32)


def _inputs(mask_bt=None, **fields):
    if mask_bt is None:
        mask_bt = np.ones((B, T), bool)
    token_bt = np.random.default_rng(5).integers(0, V, mask_bt.shape, np.int32)
    return RouterInputs(mask_bt, **{"token_bt": token_bt, **fields})


_route = jax.jit(route, static_argnums=4)


def _of_logits(logit_bte, config, *, state=None, mask_bt=None, **weights):
    """Routes tokens that are their own logits: the router is the identity."""
    logit_bte = np.asarray(logit_bte, np.float32)
    if mask_bt is None:
        mask_bt = np.ones(logit_bte.shape[:2], bool)
    fields = {name: weights.pop(name) for name in ("key_b", "choice_bts") if name in weights}
    weights = {"router": np.eye(logit_bte.shape[-1], dtype=np.float32)} | weights
    return _route(logit_bte, weights, state or {}, RouterInputs(mask_bt, None, **fields), config)


@functools.partial(jax.jit, static_argnums=4)
def _probe(x_btd, weights, state, inputs, config):
    """Returns the routing, and the gradients of random sums of what it says of earlier tokens."""

    def loss(x_btd, weights):
        routing = route(x_btd, weights, state, inputs, config)
        parts = [routing.weight_bts, routing.probability_bte, routing.logit_bte**2]
        if routing.load_bte is not None:
            parts.append(routing.load_bte)
        factors = [_random(*part[:, :CUT].shape, seed=3) for part in parts]
        total = sum(jnp.sum(f * part[:, :CUT]) for f, part in zip(factors, parts, strict=True))
        return total, routing

    (_, routing), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_btd, weights)
    return routing, *gradients


def _assert_equal(actual, expected, tokens=np.s_[:, :], err_msg="", **tolerance):
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert (a is None) == (e is None), name
        if a is not None:
            a, e = np.asarray(a)[tokens], np.asarray(e)[tokens]
            np.testing.assert_allclose(a, e, err_msg=f"{name} {err_msg}", **tolerance)


def _softmax(logit):
    shifted = np.exp(logit - logit.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _sigmoid(logit):
    return 1 / (1 + np.exp(-logit))


def _logit(score):
    score = np.asarray(score, np.float64)
    return np.log(score) - np.log1p(-score)


# Top-k of scores


def test_softmax_weights_are_the_probabilities_of_the_selected_experts():
    routing = _of_logits(np.log(PROBABILITY), _config(num_experts=4, normalize_weights=False))
    np.testing.assert_array_equal(routing.expert_bts, [[[1, 3]]])
    np.testing.assert_allclose(routing.weight_bts, [[[0.5, 0.25]]], rtol=1e-6)
    np.testing.assert_allclose(routing.probability_bte, PROBABILITY, rtol=1e-6)
    np.testing.assert_array_equal(routing.logit_bte, np.log(PROBABILITY))


def test_normalized_weights_are_divided_by_their_sum():
    routing = _of_logits(np.log(PROBABILITY), _config(num_experts=4))
    np.testing.assert_allclose(routing.weight_bts, [[[2 / 3, 1 / 3]]], rtol=1e-6)


def test_normalizing_after_softmax_is_softmax_over_the_selected():
    """renorm(top-k(softmax l)) and softmax(top-k(l)) are the same numbers (claim 0.4)."""
    logit_bte = _random(3, 5, E, scale=2)
    routing = _of_logits(logit_bte, _config(top_k=3))
    other = _softmax(-np.sort(-logit_bte, axis=-1)[..., :3])
    np.testing.assert_allclose(routing.weight_bts, other, rtol=2e-6)
    unnormalized = _of_logits(logit_bte, _config(top_k=3, normalize_weights=False))
    assert np.abs(unnormalized.weight_bts - other).max() > 0.01


def test_switch_weighs_by_the_largest_probability():
    logit_bte = _random(3, 5, E)
    routing = _of_logits(logit_bte, _config(top_k=1, normalize_weights=False))
    np.testing.assert_allclose(routing.weight_bts[..., 0], _softmax(logit_bte).max(-1), rtol=1e-6)
    assert routing.weight_bts.max() < 1


def test_equal_logits_select_the_first_experts():
    routing = _of_logits(np.zeros((1, 2, E)), _config())
    np.testing.assert_array_equal(routing.expert_bts, [[[0, 1], [0, 1]]])


@pytest.mark.parametrize("router", ["sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("normalize", [True, False])
def test_scores_of_one_expert_each(router, normalize):
    """The weight is the expert's own score; the probabilities are scores scaled to sum to 1."""
    logit_bte = _random(2, 3, E, scale=3)
    score = _sigmoid(logit_bte) if router == "sigmoid" else np.sqrt(np.log1p(np.exp(logit_bte)))
    routing = _of_logits(logit_bte, _config(router, normalize_weights=normalize))
    best = -np.sort(-score, axis=-1)[..., :2]
    expected = best / best.sum(-1, keepdims=True) if normalize else best
    np.testing.assert_allclose(routing.weight_bts, expected, rtol=1e-5)
    expected = score / score.sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.probability_bte, expected, rtol=1e-5)


def test_sqrt_softplus_has_a_finite_gradient_where_it_underflows():
    config = _config("sqrt_softplus", num_experts=4)

    def weight(logit_bte):
        return route(
            logit_bte, {"router": jnp.eye(4)}, {}, RouterInputs(np.ones((1, 1), bool)), config
        ).weight_bts[0, 0, 1]

    gradient = jax.grad(weight)(jnp.array([[[1.0, -200.0, -300.0, -400.0]]]))
    np.testing.assert_array_equal(gradient, np.zeros((1, 1, 4)))


def test_scores_that_all_underflow_give_no_nan():
    """sigmoid(-120) is 0 in float32, and so is the square of a tiny sum in the gradient."""
    config = _config("sigmoid", num_experts=4)

    def total(logit_bte):
        inputs = RouterInputs(np.ones((1, 1), bool))
        routing = route(logit_bte, {"router": jnp.eye(4)}, {}, inputs, config)
        return jnp.sum(routing.weight_bts[..., 0]) + jnp.sum(routing.probability_bte[..., 0])

    for logit in (-120.0, -70.0, -40.0):
        gradient = jax.jit(jax.grad(total))(jnp.full((1, 1, 4), logit))
        assert np.isfinite(gradient).all(), logit


@pytest.mark.parametrize(("temperature", "used"), [(2.0, 2.0), (500.0, 100.0)])
def test_cosine_router_is_temperature_times_cosine(temperature, used):
    config = _config("cosine", cosine_width=5)
    weights = _weights(config) | {"router_temperature": np.float32(temperature)}
    x_btd = _random(B, T, D)
    projected = x_btd @ weights["router_projection"]
    projected /= np.linalg.norm(projected, axis=-1, keepdims=True)
    vectors = weights["router"] / np.linalg.norm(weights["router"], axis=0)
    routing = _route(x_btd, weights, {}, _inputs(), config)
    np.testing.assert_allclose(routing.logit_bte, used * (projected @ vectors), atol=2e-4)
    scaled = _route(x_btd * 50, weights, {}, _inputs(), config)
    np.testing.assert_allclose(scaled.logit_bte, routing.logit_bte, atol=2e-4)


def test_the_bias_selects_but_never_enters_the_weight():
    """Sigmoid scores 0.9, 0.8, 0.5, 0.1; a bias of 1 brings in the last, with a weight of 0.1."""
    logit_bte = _logit([[[0.9, 0.8, 0.5, 0.1]]])
    for router in ("sigmoid_bias", "quantile"):
        config = _config(router, num_experts=4, normalize_weights=False)
        plain = _of_logits(logit_bte, config, state={"bias": np.zeros(4, np.float32)})
        np.testing.assert_array_equal(plain.expert_bts, [[[0, 1]]])
        bias_e = np.array([0, 0, 0, 1], np.float32)
        biased = _of_logits(logit_bte, config, state={"bias": bias_e})
        np.testing.assert_array_equal(biased.expert_bts, [[[3, 0]]])
        np.testing.assert_allclose(biased.weight_bts, [[[0.1, 0.9]]], rtol=1e-5)
        np.testing.assert_array_equal(biased.probability_bte, plain.probability_bte)
        np.testing.assert_allclose(biased.probability_bte.sum(), 1, rtol=1e-6)
        np.testing.assert_array_equal(biased.logit_bte, plain.logit_bte)


def test_the_bias_gets_no_gradient():
    config, x_btd = _config("sigmoid_bias"), _random(B, T, D)

    def loss(bias_e):
        routing = route(x_btd, _weights(config), {"bias": bias_e}, _inputs(), config)
        return jnp.sum(routing.weight_bts**2) + jnp.sum(routing.probability_bte**2)

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(jnp.linspace(-1, 1, E)), np.zeros(E))


def test_quantile_level_is_the_distance_to_the_kth_of_the_others():
    """Of s + b = 0.9, 0.7, 0.5 + 0.1, 0.1 with k = 2 the others' second is 0.6, 0.6, 0.7, 0.7."""
    config = _config("quantile", num_experts=4)
    state = {"bias": np.array([0, 0, 0.1, 0], np.float32)}
    routing = _of_logits(_logit([[[0.9, 0.7, 0.5, 0.1]]]), config, state=state)
    np.testing.assert_allclose(routing.level_bte, [[[0.3, 0.1, -0.2, -0.6]]], atol=1e-6)


# Group limit


def test_group_limit_by_hand():
    """Two groups of 0.4 + 0.4 and 0.6 + 0.1: the first is better, though 0.6 is the best expert."""
    score_bte = jnp.array([[[0.4, 0.4, 0.6, 0.1]]])
    limited = limit_groups(score_bte, groups=2, kept=1)
    np.testing.assert_allclose(limited, [[[0.4, 0.4, -np.inf, -np.inf]]])
    single = limit_groups(score_bte, groups=4, kept=2)  # groups of one expert: their own score
    np.testing.assert_allclose(single, [[[0.4, -np.inf, 0.6, -np.inf]]])


def test_the_bias_counts_in_the_group_scores():
    """Sigmoid scores 0.8, 0.7 | 0.6, 0.5; a bias of 0.3 on expert 3 turns the groups round."""
    config = _config("sigmoid_bias", num_experts=4, expert_groups=2, groups_per_token=1)
    logit_bte = _logit([[[0.8, 0.7, 0.6, 0.5]]])
    for bias, expected in ((0.3, [0, 1]), (0.5, [3, 2])):
        state = {"bias": np.array([0, 0, 0, bias], np.float32)}
        routing = _of_logits(logit_bte, config, state=state)
        np.testing.assert_array_equal(routing.expert_bts, [[expected]])


def test_negative_scores_of_kept_groups_beat_closed_groups():
    """A bias that puts all s + b below 0 must not open other groups (their mask is -inf, not 0)."""
    config = _config("sigmoid_bias", num_experts=4, expert_groups=2, groups_per_token=1)
    state = {"bias": np.full(4, -5, np.float32)}
    routing = _of_logits(_logit([[[0.9, 0.1, 0.6, 0.5]]]), config, state=state)
    assert set(np.ravel(routing.expert_bts)) == {2, 3}


def test_a_token_reaches_groups_per_token_groups():
    """8 of 64 experts: 5.25 of 8 groups without a limit (claim 0.11), 4 with the limit of V3."""
    logit_bte = _random(4, 512, 64)
    limited = _config("sigmoid", num_experts=64, top_k=8, expert_groups=8, groups_per_token=4)
    free = _config("sigmoid", num_experts=64, top_k=8)

    def groups(config):
        expert_bts = np.asarray(_of_logits(logit_bte, config).expert_bts)
        return np.array([len(set(e // 8)) for e in expert_bts.reshape(-1, 8)])

    assert groups(limited).max() <= 4
    # 8 * (1 - C(56, 8) / C(64, 8)) distinct groups without replacement; 5.25 with it
    expected = 8 * (1 - math.comb(56, 8) / math.comb(64, 8))
    np.testing.assert_allclose(groups(free).mean(), expected, atol=0.06)


# Noisy, GShard


def test_noisy_without_noise_is_a_softmax_over_the_top_k():
    logit_bte = _random(2, 3, E)
    routing = _of_logits(logit_bte, _config("noisy"), router_noise=np.ones((E, E), np.float32))
    expected = _softmax(-np.sort(-logit_bte, axis=-1)[..., :2])
    np.testing.assert_allclose(routing.weight_bts, expected, rtol=1e-5)
    assert routing.load_bte is None


def test_kth_excluding_by_hand():
    """Of 5, 3, 4, 1 with k = 2: without 5 the second is 3; without 4 it is 3; else it is 4."""
    bound = kth_excluding(jnp.array([[[5.0, 3.0, 4.0, 1.0]]]), 2)
    np.testing.assert_array_equal(bound, [[[3, 4, 3, 4]]])


def test_load_is_how_often_the_expert_is_selected():
    """The mean of P(x, e) over draws is the frequency of selection (Shazeer et al., app. A).

    The plain k-th logit in its place, as in some trainers, is off by more than the tolerance.
    """
    draws, config = 20_000, _config("noisy", num_experts=4)
    logit_1e = _random(1, 4, scale=0.7)
    noise_ee = _random(4, 4, seed=1)
    x_btd = np.broadcast_to(logit_1e[None], (draws, 1, 4))
    weights = {"router_noise": noise_ee, "key_b": _keys(draws)}
    routing = _of_logits(x_btd, config, **weights)
    frequency = np.stack([(routing.expert_bts == e).any(-1).mean() for e in range(4)])
    assert 0.1 < frequency.min() < frequency.max() < 0.95
    np.testing.assert_allclose(routing.load_bte.mean((0, 1)), frequency, atol=0.01)
    np.testing.assert_allclose(frequency.sum(), 2)
    deviation = np.log1p(np.exp(logit_1e @ noise_ee))
    noisy = logit_1e + deviation * np.random.default_rng(0).normal(size=(draws, 4))
    kth = np.sort(noisy, axis=-1)[:, 2:3]
    plain = np.vectorize(math.erf)((logit_1e - kth) / deviation / 2**0.5).mean(0) / 2 + 0.5
    assert np.abs(plain - frequency).max() > 0.02


def test_load_is_1_where_every_expert_is_selected():
    config = _config("noisy", num_experts=2)
    routing = _of_logits(
        _random(1, 3, 2), config, router_noise=np.ones((2, 2), np.float32), key_b=_keys(1)
    )
    np.testing.assert_array_equal(routing.load_bte, np.ones((1, 3, 2)))


def test_gshard_keeps_the_second_with_twice_its_share():
    """Probabilities 0.6, 0.2, ...: the pair's shares are 0.75 and 0.25; kept half of the time."""
    p = np.array([0.6, 0.2, 0.1, 0.1], np.float32)
    logit_bte = np.broadcast_to(np.log(p), (2, 4000, 4))
    config = _config("gshard", num_experts=4)
    training = _of_logits(logit_bte, config, key_b=_keys(2))
    second = np.asarray(training.expert_bts)[..., 1]
    assert set(second.ravel()) == {1, 4}
    np.testing.assert_allclose((second == 1).mean(), 2 * 0.25, atol=0.03)
    np.testing.assert_allclose(training.weight_bts[..., 0], 0.75, rtol=1e-5)
    np.testing.assert_allclose(training.weight_bts[..., 1], np.where(second == 1, 0.25, 0))
    evaluation = _of_logits(logit_bte, config)
    np.testing.assert_array_equal(np.unique(evaluation.expert_bts[..., 1]), [1])


# Routers over a group of tokens


def test_expert_choice_by_hand():
    """4 tokens, 2 experts, k = 1: each expert takes 2 tokens; token 0 gets both, token 3 none."""
    p0 = np.array([0.9, 0.8, 0.3, 0.4])  # of expert 0; expert 1 has the rest
    logit_bte = np.log(np.stack([p0, 1 - p0], -1))[None]
    config = _config("expert_choice", num_experts=2, top_k=1)
    routing = _of_logits(logit_bte, config)
    np.testing.assert_array_equal(routing.expert_bts, [[[0, 2], [0, 2], [2, 1], [2, 1]]])
    np.testing.assert_allclose(
        routing.weight_bts, [[[0.9, 0], [0.8, 0], [0, 0.7], [0, 0.6]]], rtol=1e-5
    )


@pytest.mark.parametrize("k", [1, 2])
def test_expert_choice_leaves_out_e_to_the_minus_k_of_random_tokens(k):
    """Every expert takes k T / E tokens exactly; 36.8% or 13.5% get none (claim 0.10).

    That is for independent scores, which a softmax gives for small logits of many experts only.
    """
    logit_bte = _random(2, 1024, 256, scale=0.01)
    routing = _of_logits(logit_bte, _config("expert_choice", num_experts=256, top_k=k))
    taken_bte = np.asarray(routing.expert_bts) < 256
    np.testing.assert_array_equal(taken_bte.sum(1), np.full((2, 256), k * 1024 // 256))
    np.testing.assert_allclose((~taken_bte.any(-1)).mean(), math.exp(-k), atol=0.02)


def test_expert_choice_follows_the_real_tokens_of_a_group():
    """Two sequences a group, 3 + 1 real tokens, k = 1, E = 2: each expert takes 2 of the 4."""
    mask_bt = np.array([[True, True, True, False], [True, False, False, False]])
    config = _config("expert_choice", num_experts=2, top_k=1, group_sequences=2)
    routing = _of_logits(_random(2, 4, 2), config, mask_bt=mask_bt)
    np.testing.assert_array_equal((np.asarray(routing.expert_bts) < 2).sum((0, 1)), [2, 2])
    assert (np.asarray(routing.expert_bts)[~mask_bt] == 2).all()


def test_top_tokens_never_picks_minus_infinity():
    score_gte = jnp.array([[[1.0, -jnp.inf], [2.0, -jnp.inf], [2.0, 0.0]]])
    picked = top_tokens(score_gte, jnp.array([2]), 3)
    np.testing.assert_array_equal(picked, [[[False, False], [True, False], [True, True]]])


def test_sinkhorn_balances_skewed_logits():
    """Column sums are exact, and the argmax is balanced where that of the logits is not."""
    logit_gte = _random(1, 2048, 8) + 3 * np.linspace(-1, 1, 8, dtype=np.float32)[None, None]
    plan = np.exp(jax.jit(sinkhorn)(logit_gte, np.ones((1, 2048), bool)))
    np.testing.assert_allclose(plan.sum(1), np.full((1, 8), 256), rtol=1e-5)
    np.testing.assert_allclose(plan.sum(-1), np.ones((1, 2048)), rtol=1e-4)

    def violation(score):
        return np.bincount(score.argmax(-1).ravel(), minlength=8).max() / 256 - 1

    assert violation(logit_gte) > 2
    assert violation(plan) < 0.1


def test_sinkhorn_does_not_overflow_and_skips_padding():
    """exp(89) is infinite in float32. The padding's logits would pull the plan of real tokens."""
    logit_gte = _random(1, 6, 4) + np.array([189, 0, 0, 0], np.float32)[None, None]
    mask_gt = np.array([[True] * 4 + [False] * 2])
    plan = jax.jit(sinkhorn)(logit_gte, mask_gt)
    assert np.isfinite(plan).all()
    np.testing.assert_allclose(np.exp(plan[0, :4]).sum(0), np.ones(4), rtol=1e-4)
    alone = jax.jit(sinkhorn)(logit_gte[:, :4], np.ones((1, 4), bool))
    np.testing.assert_allclose(plan[:, :4], alone, atol=1e-3)


def test_sinkhorn_balances_in_training_and_weighs_by_the_raw_sigmoid():
    config = _config("sinkhorn", num_experts=4, top_k=1)
    logit_bte = _random(1, 64, 4) + 2 * np.arange(4, dtype=np.float32)[None, None]
    training = _of_logits(logit_bte, config, key_b=_keys(1))
    count_e = np.bincount(np.ravel(training.expert_bts), minlength=4)
    assert count_e.max() <= 20
    picked = np.take_along_axis(logit_bte, np.asarray(training.expert_bts), -1)
    np.testing.assert_allclose(training.weight_bts, _sigmoid(picked), rtol=1e-5)
    evaluation = _of_logits(logit_bte, config)
    np.testing.assert_array_equal(evaluation.expert_bts[..., 0], logit_bte.argmax(-1))
    assert np.bincount(np.ravel(evaluation.expert_bts), minlength=4).max() > 40


def _soft_by_numpy(x_td, slot_dep, scale):
    """Soft MoE of one group, after its algorithm 2 (arXiv:2308.00951)."""
    unit_x = x_td / np.linalg.norm(x_td, axis=-1, keepdims=True)
    unit_slot = slot_dep / np.linalg.norm(slot_dep, axis=0, keepdims=True)
    logit = scale * np.einsum("td,dep->tep", unit_x, unit_slot)
    dispatch = _softmax(np.moveaxis(logit, 0, -1))
    combine = _softmax(logit.reshape(len(x_td), -1)).reshape(logit.shape)
    return np.moveaxis(dispatch, -1, 0), combine


def test_soft_mixing_is_the_papers_algorithm_over_real_tokens():
    config = _config("soft", soft_slots=2, group_sequences=2)
    x_btd, weights = _random(2, 3, D), _weights(config) | {"router_scale": np.float32(4)}
    mask_bt = np.array([[True, True, True], [True, True, False]])
    x_btd[1, 2] = np.nan
    mixing = jax.jit(soft_mixing, static_argnums=3)(x_btd, weights, mask_bt, config)
    slot_dep = weights["router"].reshape(D, E, 2)
    dispatch, combine = _soft_by_numpy(x_btd.reshape(6, D)[:5], slot_dep, 4)
    np.testing.assert_allclose(mixing.dispatch_gtep[0, :5], dispatch, rtol=2e-4)
    np.testing.assert_allclose(mixing.combine_gtep[0, :5], combine, rtol=2e-4)
    np.testing.assert_allclose(mixing.dispatch_gtep.sum(1), 1, rtol=1e-5)
    assert (np.asarray(mixing.dispatch_gtep)[0, 5] == 0).all()
    assert (np.asarray(mixing.combine_gtep)[0, 5] == 0).all()
    routing = _route(x_btd, weights, {}, _inputs(mask_bt), config)
    mass_te = combine.sum(-1)
    np.testing.assert_allclose(
        routing.probability_bte.reshape(6, E)[:5], mass_te, rtol=2e-4, atol=1e-6
    )
    np.testing.assert_array_equal(routing.expert_bts.ravel(), [*mass_te.argmax(-1), E])
    np.testing.assert_allclose(routing.weight_bts.ravel()[:5], mass_te.max(-1), rtol=2e-4)


def test_soft_mixing_of_padding_alone_is_0_with_a_finite_gradient():
    config = _config("soft")
    weights, mask_bt = _weights(config), np.zeros((1, 3), bool)

    def total(x_btd, weights):
        mixing = soft_mixing(x_btd, weights, mask_bt, config)
        return mixing.dispatch_gtep.sum() + mixing.combine_gtep.sum()

    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(
        np.full((1, 3, D), np.nan, np.float32), weights
    )
    assert value == 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_mixture_of_depths_computes_the_best_part_of_each_sequence():
    """Half of 5 and of 3 real tokens, rounded up: 3 and 2, those with the largest depth score."""
    config = _config("mixture_of_depths", depth_fraction=0.5)
    weights, x_btd = _weights(config), _random(2, 5, D)
    mask_bt = np.array([[True] * 5, [True, False, True, True, False]])
    routing = _route(x_btd, weights, {}, _inputs(mask_bt), config)
    depth_bt = np.where(mask_bt, x_btd @ weights["router_depth"], -np.inf)
    for row, count in enumerate([3, 2]):
        computed = np.flatnonzero((routing.expert_bts[row] < E).all(-1))
        assert set(computed) == set(np.argsort(-depth_bt[row])[:count])
        skipped = np.setdiff1d(np.arange(5), computed)
        assert (np.asarray(routing.expert_bts)[row, skipped] == E).all()
        assert (np.asarray(routing.weight_bts)[row, skipped] == 0).all()
        best = -np.sort(-(x_btd[row] @ weights["router"]), axis=-1)[computed, :2]
        expected = _softmax(best) * _sigmoid(depth_bt[row, computed])[:, None]
        np.testing.assert_allclose(routing.weight_bts[row, computed], expected, rtol=1e-4)


# Routers without logits


def test_hash_looks_the_token_up():
    config, state = _config("hash"), _state(_config("hash"))
    inputs = _inputs()
    routing = _route(_random(B, T, D), {}, state, inputs, config)
    np.testing.assert_array_equal(routing.expert_bts, np.asarray(state["table"])[inputs.token_bt])
    np.testing.assert_array_equal(routing.weight_bts, np.full((B, T, 2), 0.5))
    np.testing.assert_allclose(routing.probability_bte.max(-1), 0.5)


def test_random_selects_distinct_experts_equally_often():
    config = _config("random", top_k=3)
    inputs = _inputs(np.ones((2, 2000), bool), key_b=_keys(2))
    routing = _route(_random(2, 2000, 1), {}, {}, inputs, config)
    expert = np.sort(np.asarray(routing.expert_bts), axis=-1)
    assert (np.diff(expert, axis=-1) > 0).all()
    np.testing.assert_allclose(np.bincount(expert.ravel()) / 4000, 3 / 8, atol=0.03)
    np.testing.assert_allclose(routing.weight_bts, 1 / 3, rtol=1e-6)
    assert (expert[0] != expert[1]).any()


def test_balanced_gives_every_expert_the_same_count():
    """8 real tokens of top 3 over 8 experts: 3 each, wherever padding stands."""
    config = _config("balanced", top_k=3)
    mask_bt = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 1, 1, 1, 1, 1]], bool)
    routing = _route(_random(2, 10, 1), {}, {}, _inputs(mask_bt), config)
    for row in np.asarray(routing.expert_bts):
        np.testing.assert_array_equal(np.bincount(row.ravel(), minlength=9)[:8], np.full(8, 3))
        assert all(len(set(token)) == 3 for token in row if token[0] < 8)


# All experts, any number of experts


def test_dense_weighs_all_experts_by_softmax_with_a_bias():
    config, logit_bte = _config("dense"), _random(2, 3, E)
    bias_e = np.linspace(-1, 1, E, dtype=np.float32)
    routing = _of_logits(logit_bte, config, router_bias=bias_e)
    np.testing.assert_array_equal(routing.expert_bts, np.broadcast_to(np.arange(E), (2, 3, E)))
    np.testing.assert_allclose(routing.weight_bts, _softmax(logit_bte + bias_e), rtol=1e-5)


def test_gate_dropout_closes_gates_and_never_all():
    logit_bte = _random(2, 500, E)
    bias_e = np.zeros(E, np.float32)
    for rate in (0.3, 0.99):
        config = _config("dense", gate_dropout=rate)
        routing = _of_logits(logit_bte, config, router_bias=bias_e, key_b=_keys(2))
        open_bte = np.asarray(routing.expert_bts) < E
        assert open_bte.any(-1).all()
        expected = 1 - rate + rate**E / E  # one is kept where all would close
        np.testing.assert_allclose(open_bte.mean(), expected, atol=0.02)
        expected = _softmax(np.where(open_bte, logit_bte, -np.inf))
        np.testing.assert_allclose(routing.weight_bts, expected, rtol=1e-4)
        evaluation = _of_logits(logit_bte, config, router_bias=bias_e)
        assert (np.asarray(evaluation.expert_bts) < E).all()


@pytest.mark.parametrize("router", ["elementwise", "elementwise_input"])
def test_elementwise_routers_weigh_all_experts_alike(router):
    routing = _route(_random(B, T, D), {}, {}, _inputs(), _config(router))
    np.testing.assert_array_equal(routing.expert_bts, np.broadcast_to(np.arange(E), (B, T, E)))
    np.testing.assert_allclose(routing.weight_bts, E**-0.5, rtol=1e-6)
    np.testing.assert_allclose(routing.probability_bte, 1 / E, rtol=1e-6)


def test_relu_takes_the_experts_with_a_positive_logit():
    routing = _of_logits(
        [[[1.5, -2.0, 0.0, 0.25], [-1, -1, -1, -1]]], _config("relu", num_experts=4)
    )
    np.testing.assert_array_equal(routing.expert_bts, [[[0, 4, 4, 3], [4, 4, 4, 4]]])
    np.testing.assert_array_equal(routing.weight_bts, [[[1.5, 0, 0, 0.25], [0, 0, 0, 0]]])
    np.testing.assert_array_equal(routing.probability_bte, routing.weight_bts)


def test_threshold_takes_the_experts_whose_score_exceeds_it():
    """0.5 does not exceed 0.5; a token that exceeds none goes nowhere."""
    config = _config("threshold", num_experts=4)
    state = {"threshold": np.array([0.5, 0.5, 0.3, 0.9], np.float32)}
    score = np.array([[[0.6, 0.5, 0.4, 0.8], [0.1, 0.1, 0.1, 0.1]]])
    routing = _of_logits(_logit(score), config, state=state)
    np.testing.assert_array_equal(routing.expert_bts, [[[0, 4, 2, 4], [4, 4, 4, 4]]])
    np.testing.assert_allclose(routing.weight_bts, [[[0.6, 0, 0.4, 0], [0, 0, 0, 0]]], rtol=1e-5)
    np.testing.assert_allclose(routing.level_bte, score, rtol=1e-5)
    np.testing.assert_allclose(routing.probability_bte.sum(-1), 1, rtol=1e-5)


# Knobs


def test_logit_cap_bends_logits_into_its_range():
    logit_bte = _random(1, 2, E, scale=20)
    routing = _of_logits(logit_bte, _config(logit_cap=5.0))
    np.testing.assert_allclose(routing.logit_bte, 5 * np.tanh(logit_bte / 5), rtol=1e-5)


def test_jitter_moves_every_logit_within_its_range_in_training_alone():
    """With the identity as router a logit is its own input: times U[0.9, 1.1], for each element."""
    config, logit_bte = _config(jitter=0.1), 1 + np.abs(_random(2, 50, E))
    ratio = np.asarray(_of_logits(logit_bte, config, key_b=_keys(2)).logit_bte) / logit_bte
    assert 0.9 <= ratio.min() < 0.91
    assert 1.09 < ratio.max() <= 1.1
    assert len(np.unique(ratio)) > 700
    np.testing.assert_array_equal(_of_logits(logit_bte, config).logit_bte, logit_bte)


def test_expert_dropout_closes_an_expert_to_a_whole_sequence():
    """At 0.5, half of the experts of a sequence get no probability; the z-loss sees all logits."""
    config = _config("softmax", expert_dropout=0.5)
    logit_bte = _random(64, 5, E)
    routing = _of_logits(logit_bte, config, key_b=_keys(64))
    closed_bte = np.asarray(routing.probability_bte) == 0
    assert (closed_bte == closed_bte[:, :1]).all()
    assert 0.4 < closed_bte.mean() < 0.55
    assert (~closed_bte).sum(-1).min() >= 2
    assert len(np.unique(closed_bte[:, 0], axis=0)) > 20
    assert not np.take_along_axis(closed_bte, np.asarray(routing.expert_bts), -1).any()
    np.testing.assert_array_equal(routing.logit_bte, logit_bte)
    evaluation = _of_logits(logit_bte, config)
    assert (evaluation.probability_bte > 0).all()


def test_expert_dropout_leaves_enough_experts_in_any_groups():
    config = _config(
        "sigmoid", num_experts=12, top_k=3, expert_groups=4, groups_per_token=2, expert_dropout=0.95
    )
    routing = _of_logits(_random(64, 5, 12), config, key_b=_keys(64))
    assert (np.asarray(routing.expert_bts) < 12).all()
    assert (routing.weight_bts > 0).all()


@pytest.mark.parametrize("router", ["softmax", "relu", "hash", "soft", "mixture_of_depths"])
def test_weight_scale_multiplies_every_weight(router):
    config = _config(router)
    arguments = _random(B, T, D), _weights(config), _state(config), _inputs()
    plain = _route(*arguments, config)
    scaled = _route(*arguments, _config(router, weight_scale=2.5))
    if router != "soft":  # its statistics have the mass; what is scaled is combine
        np.testing.assert_allclose(scaled.weight_bts, 2.5 * plain.weight_bts, rtol=1e-6)
    np.testing.assert_allclose(scaled.probability_bte, plain.probability_bte, rtol=1e-6)


def test_soft_combine_is_scaled():
    x_btd, mask_bt = _random(1, 3, D), np.ones((1, 3), bool)
    config = _config("soft", weight_scale=2.5)
    mixing = jax.jit(soft_mixing, static_argnums=3)(x_btd, _weights(config), mask_bt, config)
    np.testing.assert_allclose(mixing.combine_gtep.sum((2, 3)), 2.5, rtol=1e-5)
    np.testing.assert_allclose(mixing.dispatch_gtep.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("router", SCORED)
def test_free_experts_are_more_choices(router):
    config = _config(router, num_experts=4, zero_experts=1, copy_experts=1, constant_experts=2)
    routing = _route(
        _random(B, 50, D), _weights(config), _state(config), _inputs(np.ones((B, 50), bool)), config
    )
    assert routing.probability_bte.shape == (B, 50, 8)
    assert set(np.ravel(routing.expert_bts)) == set(range(8))


def test_256_experts():
    routing = _of_logits(_random(1, 4, 256), _config("sigmoid", num_experts=256, top_k=8))
    assert np.asarray(routing.expert_bts).max() < 256
    np.testing.assert_allclose(routing.weight_bts.sum(-1), 1, rtol=1e-5)


def test_router_matmul_of_bfloat16_is_summed_in_float32():
    """256 + 1 is 256 in bfloat16: a bfloat16 sum over D would tie experts 0 and 1."""
    x_btd = jnp.array([[[256.0, 1.0]]], jnp.bfloat16)
    logit_bte = router_matmul(x_btd, jnp.array([[1.0, 1.0], [1.0, 0.0]]))
    assert logit_bte.dtype == jnp.float32
    np.testing.assert_array_equal(logit_bte, [[[257.0, 256.0]]])


@pytest.mark.parametrize("router", ROUTERS)
def test_bfloat16_tokens_give_float32_results(router):
    config = _config(router)
    x_btd = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)
    arguments = x_btd, _weights(config), _state(config), _inputs(key_b=_keys())
    routing = jax.eval_shape(functools.partial(route, config=config), *arguments)
    assert routing.expert_bts.dtype == jnp.int32
    assert routing.expert_bts.shape == (B, T, config.slots_per_token)
    floats = [leaf for leaf in jax.tree.leaves(routing[1:]) if leaf is not None]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}
    assert {leaf.shape for leaf in routing[2:4]} == {(B, T, config.choices)}


# What holds for every router


def test_router_gets_a_task_gradient_from_top_1_only_without_normalization():
    """If all experts give 1, y is the sum of weights: constant when normalised (claim 0.7)."""
    logit_bte = _random(3, 5, E)

    def gradient(**changes):
        def y(logit_bte):
            inputs = RouterInputs(np.ones((3, 5), bool))
            return route(
                logit_bte, {"router": jnp.eye(E)}, {}, inputs, _config(**changes)
            ).weight_bts.sum()

        return np.abs(jax.jit(jax.grad(y))(logit_bte)).max()

    assert gradient(top_k=1, normalize_weights=False) > 0.05
    assert gradient(top_k=2, normalize_weights=False) > 0.05
    assert gradient(top_k=2, normalize_weights=True) < 1e-6


@pytest.mark.parametrize("router", ROUTERS)
def test_padding_selects_nothing_and_influences_nothing(router):
    """Real tokens route alike, in value and gradient, with NaN in the padding and without it.

    Nor does heavy dropout of experts give a NaN anywhere.

    Sequences: 4 + 2 of padding; no token at all; padding in front and inside; no padding.
    """
    config = _full_config(router)
    weights, state = _weights(config), _state(config)
    mask_bt = np.array([[1, 1, 1, 1, 0, 0], [0] * 6, [0, 1, 0, 1, 1, 1], [1] * 6], bool)
    x_btd = _random(B, T, D)
    inputs = _inputs(mask_bt, key_b=_keys())
    clean = _probe(np.where(mask_bt[..., None], x_btd, 0.5), weights, state, inputs, config)
    poison = np.where(mask_bt[..., None], x_btd, np.nan)
    wild = inputs._replace(token_bt=np.where(mask_bt, inputs.token_bt, 10**6))
    poisoned = _probe(poison, weights, state, wild, config)
    _assert_equal(poisoned[0], clean[0])
    for a, e in zip(jax.tree.leaves(poisoned[1:]), jax.tree.leaves(clean[1:]), strict=True):
        np.testing.assert_array_equal(a, e)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(poisoned))
    routing = poisoned[0]
    assert (np.asarray(routing.expert_bts)[~mask_bt] == config.choices).all()
    for value in routing[1:]:
        assert value is None or (np.asarray(value)[~mask_bt] == 0).all()
    if router not in ("relu", "threshold", "expert_choice", "mixture_of_depths"):
        assert (np.asarray(routing.expert_bts)[mask_bt] < config.choices).any(-1).all()
    whole = _probe(x_btd, weights, state, _inputs(key_b=_keys()), config)[0]
    _assert_equal(routing, whole, np.s_[3], rtol=1e-6)  # whatever is in the other sequences


@pytest.mark.parametrize("router", ROUTERS)
def test_earlier_tokens_depend_on_later_ones_in_the_named_routers_alone(router):
    """By gradient and by change: both are exactly 0 for the others, whatever the tokens are."""
    config = _full_config(router)
    weights, state, x_btd = _weights(config), _state(config), _random(B, T, D)
    inputs = _inputs(key_b=_keys())
    routing, x_gradient, _ = _probe(x_btd, weights, state, inputs, config)
    changed = []
    for seed in range(4):
        later = x_btd.copy()
        later[:, CUT:] = 3 * _random(B, T - CUT, D, seed=seed + 20)
        tokens = inputs.token_bt.copy()
        tokens[:, CUT:] = seed
        other, *_ = _probe(later, weights, state, inputs._replace(token_bt=tokens), config)
        changed.append(not np.array_equal(other.expert_bts[:, :CUT], routing.expert_bts[:, :CUT]))
        if router not in NOT_CAUSAL:
            _assert_equal(other, routing, np.s_[:, :CUT], rtol=0)
    if router == "soft":
        return  # its statistics look at a token alone; its mixing has its own test
    assert any(changed) == (router in NOT_CAUSAL)
    np.testing.assert_array_equal(x_gradient[:, CUT:], np.zeros((B, T - CUT, D)))
    if "router" in weights:
        assert np.abs(x_gradient[:, :CUT]).max() > 0.01


def test_soft_mixing_depends_on_later_tokens():
    config, x_btd = _config("soft"), _random(1, 4, D)

    def first(x_btd):
        mixing = soft_mixing(x_btd, _weights(config), np.ones((1, 4), bool), config)
        return jnp.sum(mixing.dispatch_gtep[:, 0] ** 2)

    gradient = jax.jit(jax.grad(first))(x_btd)
    assert np.abs(gradient[0, 3]).max() > 1e-4


@pytest.mark.parametrize("router", REPLAYED)
def test_replay_of_its_own_choices_changes_nothing(router):
    """Random draws included; the gradient flows through the weights as it did."""
    config = _full_config(router)
    weights, state, x_btd = _weights(config), _state(config), _random(B, T, D)
    inputs = _inputs(key_b=_keys())
    recorded = _probe(x_btd, weights, state, inputs, config)
    choice_bts = recorded[0].expert_bts
    replayed = _probe(x_btd, weights, state, inputs._replace(choice_bts=choice_bts), config)
    _assert_equal(replayed[0], recorded[0], rtol=1e-6, atol=1e-7)
    for a, e in zip(jax.tree.leaves(replayed[1:]), jax.tree.leaves(recorded[1:]), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy", "gshard"])
def test_replay_of_experts_that_dropout_closed_gives_no_nan(router):
    """Choices of an inference engine know nothing of dropout: closed ones have weight 0."""
    config = _full_config(router)
    weights, x_btd = _weights(config), _random(B, T, D)
    first, *_ = _probe(x_btd, weights, {}, _inputs(key_b=_keys()), config)
    closed_be = np.asarray(first.probability_bte[:, 0]) == 0
    assert (closed_be.sum(-1) >= 2).all()
    choice_bs = np.argsort(~closed_be, axis=-1, stable=True)[:, :2].astype(np.int32)
    choice_bts = np.broadcast_to(choice_bs[:, None], (B, T, 2))
    inputs = _inputs(key_b=_keys(), choice_bts=choice_bts)
    probed = _probe(x_btd, weights, {}, inputs, config)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(probed))
    assert (probed[0].weight_bts == 0).all()


def test_replay_weighs_the_given_experts_by_the_scores_of_today():
    """Two worse experts are given; an id that does not exist is no assignment; padding has none."""
    p = np.broadcast_to(PROBABILITY, (1, 3, 4))
    choice_bts = np.array([[[0, 3], [3, 9], [1, 2]]], np.int32)
    mask_bt = np.array([[True, True, False]])
    config = _config(num_experts=4)
    routing = _of_logits(np.log(p), config, choice_bts=choice_bts, mask_bt=mask_bt)
    np.testing.assert_array_equal(routing.expert_bts, [[[0, 3], [3, 4], [4, 4]]])
    np.testing.assert_allclose(routing.weight_bts, [[[1 / 3, 2 / 3], [1, 0], [0, 0]]], rtol=1e-6)


@pytest.mark.parametrize("router", LEARNED)
def test_a_permutation_of_experts_permutes_the_choices(router):
    config = _config(router)
    weights, state, x_btd = _weights(config), _state(config), _random(B, T, D)
    order = np.random.default_rng(1).permutation(E)
    per_expert = ("router", "router_noise", "router_bias")
    moved = {n: w[..., order] if n in per_expert else w for n, w in weights.items()}
    moved_state = {n: v[order] if n in ("bias", "threshold") else v for n, v in state.items()}
    key = {} if router in ("noisy", "gshard") else {"key_b": _keys()}  # noise is not permuted
    plain = _route(x_btd, weights, state, _inputs(**key), config)
    other = _route(x_btd, moved, moved_state, _inputs(**key), config)
    np.testing.assert_allclose(
        other.probability_bte, plain.probability_bte[..., order], rtol=1e-4, atol=1e-6
    )
    dense, permuted = (_dense_weights(routing) for routing in (plain, other))
    np.testing.assert_allclose(permuted, dense[..., order], rtol=1e-3, atol=1e-6)
    assert np.abs(permuted - dense).max() > 0.1


def _dense_weights(routing):
    """Returns [B, T, E]: the weight of each expert, 0 where it is not selected."""
    dense = np.zeros((B, T, E + 1), np.float32)
    np.put_along_axis(dense, np.asarray(routing.expert_bts), np.asarray(routing.weight_bts), -1)
    return dense[..., :E]


@pytest.mark.parametrize("router", ROUTERS)
def test_nothing_is_random_in_evaluation(router):
    """The program without keys draws no number, and has nothing of the knobs of training."""
    knobs = _knobs(router)

    def program(config, key_b):
        run = functools.partial(route, config=config)
        arguments = _random(B, T, D), _weights(config), _state(config), _inputs(key_b=key_b)
        return str(jax.make_jaxpr(run)(*arguments))

    plain = program(_config(router), None)
    assert program(_config(router, **knobs), None) == plain
    if router != "random":  # from one fixed key in evaluation
        assert "random" not in plain
        assert "threefry" not in plain
    if knobs or router in ("noisy", "gshard"):
        assert "random_bits" in program(_config(router, **knobs), _keys())


def test_random_routing_of_evaluation_is_the_same_for_all_sequences():
    inputs = _inputs(np.ones((2, 50), bool))
    expert_bts = _route(_random(2, 50, 1), {}, {}, inputs, _config("random")).expert_bts
    np.testing.assert_array_equal(expert_bts[0], expert_bts[1])
    assert len(np.unique(expert_bts)) == E


def test_results_do_not_depend_on_the_layout():
    """Sequences split over 2 devices, all routers in one program, against one device."""
    configs = [_full_config(router) for router in ROUTERS]
    mask_bt = np.array([[1, 1, 1, 1, 0, 0], [0] * 6, [0, 1, 0, 1, 1, 1], [1] * 6], bool)
    x_btd, inputs = _random(B, T, D), _inputs(mask_bt, key_b=_keys())
    weights, states = [_weights(c) for c in configs], [_state(c) for c in configs]

    def run(x_btd, weights, states, inputs):
        weights, states = jax.tree.map(lambda w: vary_like(w, x_btd)[0], (weights, states))
        return [
            route(x_btd, w, s, inputs, c) for w, s, c in zip(weights, states, configs, strict=True)
        ]

    mesh = jax.make_mesh(
        (2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,)
    )
    split = jax.shard_map(
        run, mesh=mesh, in_specs=(P("data"), P(), P(), P("data")), out_specs=P("data")
    )
    routings = jax.jit(split)(x_btd, weights, states, inputs)
    for config, w, s, actual in zip(configs, weights, states, routings, strict=True):
        expected, *_ = _probe(x_btd, w, s, inputs, config)
        np.testing.assert_array_equal(actual.expert_bts, expected.expert_bts, err_msg=config.router)
        _assert_equal(actual, expected, err_msg=config.router, rtol=1e-5, atol=1e-6)


def test_draws_do_not_depend_on_the_length_of_the_row():
    """Appended padding leaves the noise of real tokens as it was."""
    config = _config("noisy", jitter=0.1, expert_dropout=0.2)
    weights, x_btd, key_b = _weights(config), _random(1, 9, D), _keys(1)
    short, long = (
        _route(x_btd[:, :n], weights, {}, _inputs(np.arange(n)[None] < 5, key_b=key_b), config)
        for n in (6, 9)
    )
    np.testing.assert_array_equal(short.expert_bts[:, :5], long.expert_bts[:, :5])
    np.testing.assert_allclose(short.weight_bts[:, :5], long.weight_bts[:, :5], rtol=1e-6)


def test_all_experts_are_a_column_each():
    for router in ALL_EXPERTS:
        assert _config(router).slots_per_token == E
