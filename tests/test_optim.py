"""The optimizer: what decays, the schedule by hand, and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.config import Config, ModelConfig, MoEConfig, OptimConfig
from moejax.optim import decays, learning_rate, make_optimizer
from moejax.parameters import moe_parameters
from moejax.sharding import path_name
from moejax.state import split_model


@pytest.fixture(scope="module")
def shapes(mesh):
    config = Config(
        model=ModelConfig(num_layers=3, d_model=8, vocab_size=16, dense_hidden=8),
        moe=MoEConfig(num_experts=4, expert_hidden=8, first_dense=1),
    )
    return jax.eval_shape(lambda: split_model(config, mesh, jax.random.key(0))[1])


def test_all_but_norms_and_routers_decay(shapes):
    """Stacked norms have two dims and stacked routers three: a rule by dims would decay them."""
    kept = {path_name(p) for p, d in jax.tree_util.tree_leaves_with_path(decays(shapes)) if not d}
    layers = [f"{stack}/layer_0" for stack in ("prefix", "runs")]
    norms = ("attention_norm", "ffn_norm", "attention/query_norm", "attention/key_norm")
    expected = {f"{layer}/{norm}/scale" for layer in layers for norm in norms}
    assert kept == expected | {"final_norm/scale", "runs/layer_0/moe/router"}
    decayed = {path_name(p) for p, d in jax.tree_util.tree_leaves_with_path(decays(shapes)) if d}
    assert {"embedding", "unembedding", "runs/layer_0/moe/gate"} <= decayed


def test_biases_and_sinks_of_attention_do_not_decay():
    names = ("query", "query_bias", "key_bias", "value_bias", "output_bias", "sinks", "query_down")
    found = decays({"runs": {"layer_0": {"attention": dict.fromkeys(names, 0.0)}}})
    decayed = {name for name, yes in found["runs"]["layer_0"]["attention"].items() if yes}
    assert decayed == {"query", "query_down"}


# Parameters of an MoE layer that decay, by router and kind of expert: matrices of networks.
DECAYS = {
    "shared experts": (
        {"shared_experts": 1, "shared_gate": "sigmoid"},
        {"shared_gate", "shared_up", "shared_down"},
    ),
    "free experts": ({"zero_experts": 1, "copy_experts": 1, "constant_experts": 1}, set()),
    "cosine": ({"router": "cosine"}, set()),
    "noisy": ({"router": "noisy"}, set()),
    "dense": ({"router": "dense", "capacity_factor": None}, set()),
    # What scales an output starts at 1 and is no matrix; the matrix of a gate is one.
    "elementwise": ({"router": "elementwise", "capacity_factor": None}, set()),
    "elementwise input": (
        {"router": "elementwise_input", "capacity_factor": None},
        {"scale_out"},
    ),
    "soft": ({"router": "soft", "capacity_factor": None}, set()),
}


@pytest.mark.parametrize(("changes", "expected"), DECAYS.values(), ids=DECAYS)
def test_matrices_of_experts_decay_and_nothing_of_a_router(changes, expected):
    names = moe_parameters(MoEConfig(num_experts=4, expert_hidden=8, **changes), 8)
    tree = {"runs": {"layer_0": {"moe": dict.fromkeys(names, 0.0)}}}
    found = decays(tree)["runs"]["layer_0"]["moe"]
    assert {name for name, decay in found.items() if decay} == {"gate", "up", "down"} | expected
    assert set(found) > {"gate", "up", "down"} | expected


def test_a_step_without_gradient_only_decays(shapes):
    """Weights of 1 become 1 - rate * decay where they decay, and stay 1 elsewhere."""
    optimizer = make_optimizer(
        OptimConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.1, schedule="constant"), 10
    )

    @jax.jit
    def step():
        ones = jax.tree.map(lambda s: jnp.ones(s.shape), shapes)
        zeros = jax.tree.map(jnp.zeros_like, ones)
        return optax.apply_updates(ones, optimizer.update(zeros, optimizer.init(ones), ones)[0])

    for (path, leaf), decayed in zip(
        jax.tree_util.tree_leaves_with_path(step()), jax.tree.leaves(decays(shapes)), strict=True
    ):
        np.testing.assert_allclose(leaf, 0.95 if decayed else 1, rtol=1e-6, err_msg=path_name(path))


def _rates(schedule, warmup, steps=10):
    config = OptimConfig(
        learning_rate=1.0, warmup_steps=warmup, schedule=schedule, final_fraction=0.2
    )
    rate = learning_rate(config, steps)
    return [round(float(rate(step)), 5) for step in range(steps + 1)]


def test_schedules_by_hand():
    """The first step already moves; after the warmup the rate falls to a fifth at step 10."""
    warm = [0.25, 0.5, 0.75, 1.0]
    assert _rates("constant", 4) == [*warm, *[1.0] * 7]
    linear = [round(1 - 0.8 * i / 6, 5) for i in range(7)]
    assert _rates("linear", 4) == [*warm, *linear]
    cosine = [round(0.2 + 0.4 * (1 + np.cos(np.pi * i / 6)), 5) for i in range(7)]
    assert _rates("cosine", 4) == [*warm, *cosine]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup_of_0_or_1_starts_at_the_peak(schedule):
    assert _rates(schedule, 0)[0] == _rates(schedule, 1)[0] == _rates(schedule, 1)[1] == 1


@pytest.mark.parametrize(("clip_norm", "expected"), [(1.0, 1.0), (100.0, 13.0), (None, 13.0)])
def test_gradients_are_clipped_by_their_global_norm(clip_norm, expected):
    """Norms 5 and 12 in two leaves make 13.

    Adam's first moment holds a tenth of what it was given.
    """
    optimizer = make_optimizer(OptimConfig(clip_norm=clip_norm, b1=0.9), 10)
    params = {"embedding": jnp.zeros(2), "final_norm": {"scale": jnp.zeros(1)}}
    gradients = {"embedding": jnp.array([3.0, 4.0]), "final_norm": {"scale": jnp.array([12.0])}}
    _, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    first_moment = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(optax.tree.norm(first_moment) * 10, expected, rtol=1e-5)
