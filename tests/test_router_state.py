"""Router state: where it starts, and what a step of known counts and levels makes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe_config import MoEConfig
from moejax.router_state import hash_table, initial_router_state, update_router_state
from moejax.router_stats import LEVEL_BINS, RouterStats, router_stats
from moejax.routing import RouterInputs, route

E, K, V = 8, 2, 40
STATES = {
    "sigmoid_bias": {"bias": (3, E)},
    "quantile": {"bias": (3, E)},
    "threshold": {"threshold": (3, E)},
    "relu": {"l1": (3,)},
    "hash": {"table": (3, V, K)},
    "softmax": {},
}


def _config(router, **changes) -> MoEConfig:
    defaults = {"num_experts": E, "top_k": K, "expert_hidden": 4, "capacity_factor": None}
    return MoEConfig(**{"router": router, **defaults, **changes})


def _stats(count_le, tokens, level_leb=None) -> RouterStats:
    """Returns the stats of L layers that saw `tokens` each; what updates do not read is None."""
    count_le = jnp.asarray(count_le, jnp.int32)
    if level_leb is None:
        level_leb = np.zeros((*count_le.shape, LEVEL_BINS), np.int32)
    fields: dict = dict.fromkeys(RouterStats._fields)
    return RouterStats(
        **fields
        | {
            "count_e": count_le,
            "tokens": jnp.full(len(count_le), tokens, jnp.int32),
            "level_eb": jnp.asarray(level_leb, jnp.int32),
        }
    )


@pytest.mark.parametrize("router", STATES)
def test_initial_state(router):
    """The shapes are known without a device, and the arrays can be born in a jitted function."""
    make = functools.partial(initial_router_state, _config(router), 3, V, np.arange(V))
    assert {name: leaf.shape for name, leaf in jax.eval_shape(make).items()} == STATES[router]
    state = jax.jit(make)()
    assert all(np.isfinite(leaf).all() for leaf in state.values())
    dtype = jnp.int32 if router == "hash" else jnp.float32
    assert all(leaf.dtype == dtype for leaf in state.values())


@pytest.mark.parametrize("router", STATES)
def test_a_step_without_tokens_changes_nothing(router):
    config = _config(router, **({"num_experts": E}))
    state = {
        name: leaf + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape) / 10
        if leaf.dtype == jnp.float32
        else leaf
        for name, leaf in initial_router_state(config, 3, V).items()
    }
    after = update_router_state(state, _stats(np.zeros((3, E)), 0), config)
    assert after.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(after[name], state[name])


# Selection bias


def test_bias_update_raises_what_has_too_little_load_and_recentres():
    """Loads 10, 2, 4, 0 around a mean of 4: signs -1, +1, 0, +1, whose mean 1/4 is taken off."""
    config = _config("sigmoid_bias", num_experts=4, bias_update_rate=0.01)
    state = initial_router_state(config, 2, V)
    np.testing.assert_array_equal(state["bias"], np.zeros((2, 4)))
    stats = _stats([[10, 2, 4, 0], [4, 4, 4, 4]], 8)
    state = update_router_state(state, stats, config)
    moved = 0.01 * (np.array([-1, 1, 0, 1]) - 0.25)
    np.testing.assert_allclose(state["bias"], [moved, np.zeros(4)], atol=1e-8)
    for _ in range(20):
        state = update_router_state(state, stats, config)
    np.testing.assert_allclose(state["bias"].sum(-1), 0, atol=1e-6)
    assert state["bias"][0, 0] < state["bias"][0, 2] < state["bias"][0, 3]


# Quantiles


def _histogram(*bins):
    """Returns counts [1, experts, LEVEL_BINS] of `{bin: count}` for each expert."""
    counts = np.zeros((1, len(bins), LEVEL_BINS), np.int32)
    for expert, of_expert in enumerate(bins):
        for index, count in of_expert.items():
            counts[0, expert, index] = count
    return counts


def _level(position):
    """Returns the level at a position counted in bins: 0 is -1, LEVEL_BINS is 1."""
    return 2 * position / LEVEL_BINS - 1


def test_threshold_moves_to_the_level_that_k_of_e_tokens_exceed():
    """k / E = 1/4 of 8 tokens: 2 tokens lie above the level sought, 6 below it.

    Expert 0 has 4 + 4 tokens in bins 300 and 400: half-way through the second. Expert 1 has all
    tokens in one bin: three quarters of it. Expert 2 has 6 tokens in bin 10 and 2 in bin 500: the
    end of the first. Expert 3 has one token in each of 8 bins: the end of the sixth.
    """
    config = _config("threshold", num_experts=4, top_k=1, quantile_decay=0.0)
    levels = _histogram({300: 4, 400: 4}, {350: 8}, {10: 6, 500: 2}, dict.fromkeys(range(8), 1))
    state = {"threshold": jnp.zeros((1, 4))}
    after = update_router_state(state, _stats(np.zeros((1, 4)), 8, levels), config)
    expected = [[_level(400.5), _level(350.75), _level(11), _level(6)]]
    np.testing.assert_allclose(after["threshold"], expected, atol=1e-6)
    slow = _config("threshold", num_experts=4, top_k=1, quantile_decay=0.9)
    after = update_router_state(state, _stats(np.zeros((1, 4)), 8, levels), slow)
    np.testing.assert_allclose(after["threshold"], 0.1 * np.array(expected), atol=1e-6)


def test_quantile_bias_is_minus_the_level_recentred():
    config = _config(
        "quantile", num_experts=2, top_k=1, normalize_weights=False, quantile_decay=0.0
    )
    levels = _histogram({300: 4, 400: 4}, {200: 8})
    after = update_router_state(
        {"bias": jnp.zeros((1, 2))}, _stats(np.zeros((1, 2)), 8, levels), config
    )
    bias = -np.array([_level(301), _level(200.5)])  # half of the tokens: k / E = 1/2
    np.testing.assert_allclose(after["bias"], [bias - bias.mean()], atol=1e-6)


# Simulations: fixed tokens, and only the state moves


def _loads(router, steps, spread=0.05, skew=0.1, **changes):
    """Returns load / balanced load [steps, E] of 4,096 tokens whose sigmoid scores are skewed."""
    config = _config(router, **changes)
    random = np.random.default_rng(0)
    score = 0.5 + spread * random.normal(size=(2, 2048, E)) + skew * np.linspace(-1, 1, E)
    logit_bte = np.log(score / (1 - score)).astype(np.float32)
    mask_bt = np.ones((2, 2048), bool)
    inputs = RouterInputs(mask_bt)

    @jax.jit
    def step(state):
        layer = {name: value[0] for name, value in state.items()}
        routing = route(logit_bte, {"router": jnp.eye(E)}, layer, inputs, config)
        stats = router_stats(routing, routing.expert_bts, mask_bt, config)
        stats = jax.tree.map(lambda leaf: leaf[None], stats)
        return update_router_state(state, stats, config), stats.count_e[0]

    state, loads = initial_router_state(config, 1, V), []
    for _ in range(steps):
        state, count_e = step(state)
        loads.append(np.asarray(count_e) / (4096 * K / E))
    return np.array(loads), state


def test_quantile_balances_skewed_scores_in_a_few_steps():
    """MaxVio above 2 at the start; after 40 steps below 0.05, with score differences kept."""
    loads, state = _loads("quantile", 40)
    assert loads[0].max() > 3
    assert np.abs(loads[-1] - 1).max() < 0.05
    assert (np.diff(state["bias"][0]) < 0).all()  # the better the scores, the lower the bias


def test_quantile_needs_fewer_steps_than_the_sign():
    by_sign, _ = _loads("sigmoid_bias", 40)
    by_quantile, _ = _loads("quantile", 40)
    assert by_quantile[-1].max() < by_sign[-1].max() - 0.5


def test_the_sign_balances_when_given_time():
    """0.2 of skew at 0.01 a step: 40 steps suffice, and the load never runs away."""
    loads, _ = _loads("sigmoid_bias", 60, bias_update_rate=0.005)
    assert loads[0].max() > 3
    assert np.abs(loads[-1] - 1).max() < 0.15


def test_thresholds_balance_skewed_scores():
    loads, _ = _loads("threshold", 60)
    assert loads[0].max() > 2
    np.testing.assert_allclose(loads[-1], np.ones(E), atol=0.08)


def test_threshold_starts_with_top_k_experts_of_a_fresh_router():
    """Logits of deviation 0.1, as parameters.py draws them for tokens of unit RMS."""
    config = _config("threshold")
    logit_bte = np.random.default_rng(0).normal(scale=0.1, size=(1, 4000, E)).astype(np.float32)
    state = {"threshold": initial_router_state(config, 1, V)["threshold"][0]}
    inputs = RouterInputs(np.ones((1, 4000), bool))
    routing = jax.jit(route, static_argnums=4)(
        logit_bte, {"router": np.eye(E, dtype=np.float32)}, state, inputs, config
    )
    np.testing.assert_allclose((routing.expert_bts < E).sum(-1).mean(), K, atol=0.1)


def test_threshold_of_all_experts_is_0():
    state = initial_router_state(_config("threshold", top_k=E), 1, V)
    np.testing.assert_array_equal(state["threshold"], np.zeros((1, E)))


# The L1 coefficient of relu


@pytest.mark.parametrize(("open_gates", "factor"), [(300, 1.2), (100, 1 / 1.2), (200, 1.0)])
def test_l1_grows_while_too_many_gates_are_open(open_gates, factor):
    """100 tokens, k = 2: 200 open gates are wanted, on average over two layers."""
    counts = np.zeros((2, E), np.int32)
    counts[0, 0], counts[1, 0] = open_gates + 50, open_gates - 50
    config = _config("relu", l1_coefficient=1e-3)
    after = update_router_state(initial_router_state(config, 2, V), _stats(counts, 100), config)
    np.testing.assert_allclose(after["l1"], np.full(2, 1e-3 * factor), rtol=1e-6)


def test_l1_stays_finite():
    state = {"l1": jnp.array([9e29], jnp.float32)}
    config = _config("relu")
    for _ in range(3):
        state = update_router_state(state, _stats(np.full((1, E), 100), 100), config)
    assert state["l1"] == np.float32(1e30)


def test_relu_reaches_the_wanted_sparsity():
    """Gates relu(logit + shift_e) under gradient descent on the L1 loss and a pull upwards.

    From half of the gates open to k / E = 1/4 of them, around which it swings.
    """
    config = _config("relu", l1_coefficient=1e-8)
    logit_te = np.random.default_rng(0).normal(size=(512, E)).astype(np.float32)

    def gate(shift_e):
        return jax.nn.relu(logit_te + shift_e[None])

    def loss(shift_e, l1):
        gate_te = gate(shift_e)
        count_e = jax.lax.stop_gradient((gate_te > 0).sum(0).astype(jnp.float32))
        return l1 * E * jnp.sum(count_e / (512 * K) * gate_te.mean(0)) - 0.02 * gate_te.mean()

    @jax.jit
    def step(shift_e, state):
        count_e = (gate(shift_e) > 0).sum(0)
        new = update_router_state(state, _stats(count_e[None], 512), config)
        return shift_e - 5 * jax.grad(loss)(shift_e, state["l1"][0]), new, count_e.sum()

    shift_e, state = jnp.zeros(E), initial_router_state(config, 1, V)
    shares = []
    for _ in range(300):
        shift_e, state, count = step(shift_e, state)
        shares.append(int(count) / (512 * E))
    assert shares[0] > 0.45
    assert max(np.abs(np.array(shares[-100:]) - K / E)) < 0.1
    np.testing.assert_allclose(np.mean(shares[-100:]), K / E, atol=0.02)


# Hash tables


def test_hash_table_balances_the_corpus():
    """Greedy: no expert is over the least loaded one by more than the last token that it got."""
    weights = tuple(int(1000 / (rank + 1)) + 1 for rank in range(500))
    table_vs = hash_table(weights, _config("hash"), 0)
    assert all(len(set(row)) == K for row in table_vs)
    load_e = np.bincount(table_vs.ravel(), np.repeat(weights, K), minlength=E)
    assert load_e.max() / load_e.mean() < 1.01
    by_order = np.arange(500 * K).reshape(500, K) % E
    worse_e = np.bincount(by_order.ravel(), np.repeat(weights, K), minlength=E)
    assert worse_e.max() / worse_e.mean() > 1.2


def test_hash_tables_differ_by_layer_and_are_the_same_every_time():
    config = _config("hash")
    first, again = (initial_router_state(config, 3, V)["table"] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any()
    assert (first[1] != first[2]).any()
    hash_table.cache_clear()
    np.testing.assert_array_equal(initial_router_state(config, 3, V)["table"], first)


def test_tokens_that_the_corpus_lacks_are_spread():
    counts = np.zeros(V, int)
    counts[0] = 10**6
    table_vs = initial_router_state(_config("hash", top_k=1), 1, V, counts)["table"][0]
    others = np.bincount(table_vs[1:, 0], minlength=E)
    assert others[table_vs[0, 0]] == 0
    assert np.sort(others)[1:].min() >= 5
