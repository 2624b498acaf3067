"""The dense oracle against the layer in plain Python, token by token, in float64."""

import functools

import jax
import numpy as np
import pytest

from moejax import moe, reference
from moejax.moe_config import MoEConfig
from moejax.routing import RouterInputs

B, T, D, F, E = 4, 6, 5, 3, 4
RANDOM = np.random.default_rng(0)
X_BTD = RANDOM.normal(size=(B, T, D)).astype(np.float32)
SHAPES = {"router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
WEIGHTS = {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
BIAS_E = np.array([0.3, -0.2, 0.0, 0.1], np.float32)
MASK_BT = np.arange(T) < np.array([6, 3, 0, 5])[:, None]


def _token_by_token(config: MoEConfig):
    """Returns y, counts and drops of the layer, as the documentation says it in words."""
    x = X_BTD.astype(np.float64)
    router, gate, up, down = (np.asarray(w, np.float64) for w in WEIGHTS.values())
    y, count, dropped = np.zeros_like(x), np.zeros(E, int), np.zeros(E, int)
    for first_row in range(0, B, config.group_sequences):
        rows = range(first_row, first_row + config.group_sequences)
        tokens = [(b, t) for b in rows for t in range(T) if MASK_BT[b, t]]
        choices = {}
        for b, t in tokens:
            logit = x[b, t] @ router
            if config.router == "softmax":
                score = np.exp(logit) / np.exp(logit).sum()
                order = np.argsort(-score)
            else:
                score = 1 / (1 + np.exp(-logit))
                order = np.argsort(-(score + BIAS_E))
            selected = order[: config.top_k]
            weight = score[selected]
            if config.normalize_weights:
                weight = weight / weight.sum()
            choices[b, t] = list(zip(selected, weight, strict=True))
        queue = [(token, choice) for token in tokens for choice in choices[token]]
        if config.priority == "rank":
            queue = [(token, choices[token][s]) for s in range(config.top_k) for token in tokens]
        room = [10**9] * E
        if config.capacity_factor is not None:
            slots = np.ceil(config.capacity_factor * config.top_k * len(tokens) / E)
            room = [max(1, int(slots))] * E
        for (b, t), (e, w) in queue:
            count[e] += 1
            if room[e] == 0:
                dropped[e] += 1
                continue
            room[e] -= 1
            hidden = x[b, t] @ gate[e]
            hidden = hidden / (1 + np.exp(-hidden)) * (x[b, t] @ up[e])
            y[b, t] += w * (hidden @ down[e])
    return y, count, dropped


CONFIGS = {
    "dropless": {"capacity_factor": None},
    "not normalised": {"capacity_factor": 1.0, "normalize_weights": False},
    "token priority": {"capacity_factor": 0.5},
    "rank priority": {"capacity_factor": 0.5, "priority": "rank"},
    "groups of two": {"capacity_factor": 0.5, "group_sequences": 2},
    "sigmoid with bias": {"capacity_factor": 1.0, "router": "sigmoid_bias"},
}


def _config(**changes) -> MoEConfig:
    return MoEConfig(num_experts=E, top_k=2, expert_hidden=F, **changes)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_the_oracle_is_the_layer_token_by_token(changes):
    config = _config(**changes)
    state = {"bias": BIAS_E} if config.router == "sigmoid_bias" else {}
    apply = jax.jit(functools.partial(reference.apply_moe, config=config))
    y_btd, stats, _ = apply(WEIGHTS, X_BTD, RouterInputs(MASK_BT), state)
    y, count, dropped = _token_by_token(config)
    np.testing.assert_allclose(y_btd, y, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stats.count_e, count)
    np.testing.assert_array_equal(stats.dropped_e, dropped)
    if config.capacity_factor is not None:
        assert 0 < dropped.sum() < count.sum()


def test_the_rules_differ_on_this_input():
    """Otherwise the test above could not tell one rule from another."""
    drops = {name: tuple(_token_by_token(_config(**c))[2]) for name, c in CONFIGS.items()}
    assert len(set(drops.values())) >= 5, drops
    by_token, by_rank = (
        _token_by_token(_config(capacity_factor=0.5, priority=p))[0] for p in ("token", "rank")
    )
    assert np.abs(by_token - by_rank).max() > 0.1


def test_a_config_can_ask_for_the_oracle(mesh):
    def jaxpr(transport):
        config = _config(capacity_factor=None, transport=transport)
        apply = functools.partial(moe.apply_moe, config=config, mesh=mesh)
        return str(jax.make_jaxpr(apply)(WEIGHTS, X_BTD, RouterInputs(MASK_BT), {}))

    assert "shard_map" not in jaxpr("reference")
    assert "shard_map" in jaxpr("gather")
