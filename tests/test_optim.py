"""The optimizers: each matrix of a stack by itself, what decays, the schedule, and clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.checkpoint import Checkpoints
from moejax.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
)
from moejax.data import Batch
from moejax.describe import placements
from moejax.optim import decays, learning_rate, make_optimizer, orthogonalize
from moejax.parameters import moe_parameters
from moejax.sharding import batch_sharding, matrix_dims, path_name, stacked_dims
from moejax.state import initial_state, split_model
from moejax.step import make_train_step, parameter_group


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
    fraction = {} if schedule == "constant" else {"final_fraction": 0.2}
    config = OptimConfig(learning_rate=1.0, warmup_steps=warmup, schedule=schedule, **fraction)
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


# Each matrix of a stack by itself

SETTINGS = {
    "adamw": {},
    "adafactor": {"learning_rate": 0.05},
    "lion": {"b2": 0.98},
    "muon": {"momentum": 0.9},
}
STEPS = 4


def _alone(config: OptimConfig, *, matrix: bool, hidden: bool, decay: float):
    """Returns Optax's own optimizer for one parameter of one layer and expert."""
    rate = config.learning_rate
    if config.name == "lion":
        return optax.lion(rate, config.b1, config.b2, weight_decay=decay)
    if config.name == "adafactor":
        # Optax takes the decay without the rate, and factors only where it is told to
        return optax.adafactor(
            rate, min_dim_size_to_factor=1, factored=matrix, weight_decay_rate=rate * decay
        )
    if config.name == "muon" and hidden:
        return optax.contrib.muon(
            rate, beta=config.momentum, eps=config.eps, weight_decay=decay, consistent_rms=0.2
        )
    return optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=decay)


def _run(optimizer, params, grads):
    """Returns the parameters after as many steps as `grads` has entries."""

    @jax.jit
    def run(params, grads):
        def step(carry, grad):
            params, state = carry
            updates, state = optimizer.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), grads)[0][0]

    return run(params, grads)


def _expected(config: OptimConfig, name: str, param, grads, decays: bool):
    """Runs `_alone` on every layer's and expert's part of a parameter, one after the other."""
    group = parameter_group(name)
    stacked = ("layer_" in name) + (group == "experts")  # [L, E, ...], [L, ...] or [...]
    rows, columns = {"query": (1, 2), "key": (1, 2), "value": (1, 2), "output": (2, 1)}.get(
        name.rpartition("/")[2], (1, 1)
    )
    matrix = group not in ("norms", "router")
    optimizer = _alone(
        config,
        matrix=matrix,
        hidden=matrix and group != "embeddings",
        decay=config.weight_decay if decays else 0.0,
    )
    result = np.array(param)
    for index in np.ndindex(param.shape[:stacked]):
        one, grad = param[index], grads[(slice(None), *index)]
        flat = one.shape
        if matrix:
            assert one.ndim == rows + columns, name
            flat = (int(np.prod(one.shape[:rows])), int(np.prod(one.shape[rows:])))
        found = _run(optimizer, one.reshape(flat), grad.reshape(STEPS, *flat))
        result[index] = np.reshape(found, one.shape)
    return result


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stack_is_optimized_as_each_matrix_alone(shapes, name):
    config = OptimConfig(
        name=name, **{"learning_rate": 0.01} | SETTINGS[name], warmup_steps=0,
        schedule="constant", clip_norm=None,
    )  # fmt: skip
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32), shapes)

    def draw(path, leaf):
        # layers and experts of different scale: what mixed them would show
        stacked = stacked_dims(path_name(path))
        scale = 10.0 ** random.uniform(-2, 2, (STEPS, *leaf.shape[:stacked]))
        noise = random.normal(size=(STEPS, *leaf.shape))
        return (noise * scale.reshape(*scale.shape, *(1,) * (leaf.ndim - stacked))).astype("f4")

    grads = jax.tree_util.tree_map_with_path(draw, params)
    found = _run(make_optimizer(config, 10), params, grads)
    masks = jax.tree.leaves(decays(params))
    with jax.numpy_dtype_promotion("standard"):
        for (path, leaf), param, grad, decay in zip(
            jax.tree_util.tree_leaves_with_path(found),
            jax.tree.leaves(params),
            jax.tree.leaves(grads),
            masks,
            strict=True,
        ):
            expected = _expected(config, path_name(path), param, grad, decay)
            assert np.abs(expected - param).max() > 1e-3
            np.testing.assert_allclose(
                leaf, expected, rtol=2e-5, atol=2e-5, err_msg=path_name(path)
            )


def test_every_matrix_of_a_network_is_known_as_one(shapes):
    """What the table of matrices forgot would be left to AdamW, and not be factored, silently."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = path_name(path)
        dims = matrix_dims(name)
        assert (dims is None) == (parameter_group(name) in ("norms", "router")), name
        if dims is not None:
            assert sum(dims) + stacked_dims(name) == leaf.ndim, name


def test_orthogonalized_matrices_have_singular_values_near_1():
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 2, 8, 5)) * np.array([1e-3, 1, 1e3]).reshape(3, 1, 1, 1)
    found = np.linalg.svd(orthogonalize(jnp.asarray(x, jnp.float32), 1e-8), compute_uv=False)
    assert found.shape == (3, 2, 5)
    assert found.min() > 0.65
    assert found.max() < 1.25


# The state


def _state(config: OptimConfig, shapes):
    state = jax.eval_shape(make_optimizer(config, 10).init, shapes)
    return {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("lion", 1), ("muon", 1)])
def test_moments_have_the_dtype_that_is_asked_for(shapes, name, moments, state_dtype, param_dtype):
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, param_dtype), shapes)
    state = _state(OptimConfig(name=name, state_dtype=state_dtype), params)
    kept = [leaf for key, leaf in state.items() if "/mu/" in key or "/nu/" in key]
    assert {leaf.dtype for leaf in kept} == {jnp.dtype(state_dtype)}
    of_gate = [key for key in state if key.endswith("moe/gate")]
    assert len(of_gate) == moments


def test_narrow_parameters_are_optimized_in_float32():
    """Clipping and moments of gradients in bfloat16 are those of the same numbers in float32."""
    drawn = jnp.asarray(np.random.default_rng(0).normal(size=(16, 24)), jnp.bfloat16)
    optimizer = make_optimizer(OptimConfig(), 10)

    def state(dtype):
        tree = {"ffn": {"gate": drawn.astype(dtype)}}
        return optimizer.update(tree, optimizer.init(tree), tree)[1]

    for narrow, wide in zip(
        *map(jax.tree.leaves, map(state, ("bfloat16", "float32"))), strict=True
    ):
        assert narrow.dtype == wide.dtype
        np.testing.assert_allclose(narrow, wide, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])  # a sign, of lion, is the same or not
def test_half_of_the_state_moves_nearly_as_the_whole(shapes, name):
    """Not the same: the moments are rounded. Nor computed in bfloat16, which would be far off."""
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32), shapes)
    grads = jax.tree.map(
        lambda s: random.normal(size=(STEPS, *s.shape), loc=1.0).astype(np.float32), shapes
    )
    config = OptimConfig(name=name, warmup_steps=0, b2=0.95)
    whole = _run(make_optimizer(config, 10), params, grads)
    half = _run(
        make_optimizer(dataclasses.replace(config, state_dtype="bfloat16"), 10), params, grads
    )
    for param, a, b in zip(*map(jax.tree.leaves, (params, whole, half)), strict=True):
        moved = np.linalg.norm(a - param)
        assert 0 < np.linalg.norm(a - b) < 0.02 * moved


def test_bytes_of_the_state_by_hand():
    """The matrices of 32 experts have 3 * 32 * 64 * 48 numbers; all else is small beside them."""
    config = Config(
        model=ModelConfig(num_layers=1, d_model=64),
        moe=MoEConfig(num_experts=32, expert_hidden=48),
    )

    def state_bytes(**changes):
        optim = OptimConfig(**changes)
        rows = placements(dataclasses.replace(config, optim=optim), MeshConfig(1, 2, 2, 1, 2))
        experts = [r for r in rows["optimizer state"] if r.name.endswith(("gate", "up", "down"))]
        assert all(row.total == 8 * row.per_device for row in experts if "of_" not in row.name)
        return sum(row.total for row in experts)

    numbers = 3 * 32 * 64 * 48
    assert state_bytes() == 2 * 4 * numbers
    assert state_bytes(state_dtype="bfloat16") == 2 * 2 * numbers
    assert state_bytes(name="lion") == state_bytes(name="muon") == 4 * numbers
    assert state_bytes(name="muon", state_dtype="bfloat16") == 2 * numbers
    assert state_bytes(name="adafactor") == 3 * 4 * 32 * (64 + 48)


# The same on every mesh

TRAINED = Config(
    model=ModelConfig(
        num_layers=1, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, vocab_size=32
    ),
    moe=MoEConfig(num_experts=4, expert_hidden=8, capacity_factor=None, shared_experts=1),
    train=TrainConfig(batch_size=8, steps=10),
)


def _step(config, mesh, state, number):
    random = np.random.default_rng(number)
    token_abt = random.integers(0, 32, (1, 8, 12), np.int32)
    ones = np.ones_like(token_abt)
    batch = Batch(
        tokens=token_abt, targets=token_abt[..., ::-1].copy(), loss_mask=ones > 0,
        segments=ones, domains=0 * ones,
    )  # fmt: skip
    return make_train_step(config, mesh)[0](state, jax.device_put(batch, batch_sharding(mesh)))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_three_steps_are_the_same_on_other_meshes_and_over_a_checkpoint(mesh_of, tmp_path, name):
    """Two steps on one mesh of eight devices, saved, and one on another, against one device."""
    optim = OptimConfig(name=name, warmup_steps=0, **SETTINGS[name])
    config = dataclasses.replace(TRAINED, optim=optim)
    optimizer = make_optimizer(optim, config.train.steps)
    one, first, second = mesh_of(1, 1, 1, 1), mesh_of(1, 2, 2, 2), mesh_of(2, 1, 4, 1)
    start = jax.device_get(initial_state(config, one, optimizer))
    expected = initial_state(config, one, optimizer)
    for number in range(3):
        expected = _step(config, one, expected, number)
    state = initial_state(config, first, optimizer)
    for number in range(2):
        state = _step(config, first, state, number)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(state, {}, None)
        checkpoints.wait()
        resumed = checkpoints.resume(make_train_step(config, second)[1])
        assert resumed is not None
        assert resumed.step == 2
        state = resumed.state
    state = _step(config, second, state, 2)
    for (path, a), b, c in zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(expected.params)),
        jax.tree.leaves(jax.device_get(state.params)),
        jax.tree.leaves(start.params),
        strict=True,
    ):
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a - c), path_name(path)


# What is refused


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"name": "lion", "eps": 1e-6}, r"optim.eps=1e-06 is not read by optim.name='lion'.*muon"),
        ({"momentum": 0.9}, r"optim.momentum=0.9 is not read by optim.name='adamw'; .* use muon"),
        (
            {"name": "adafactor", "state_dtype": "bfloat16"},
            r"optim.state_dtype=bfloat16 is not read by optim.name='adafactor'; leave it at float",
        ),
        ({"name": "adafactor", "b1": 0.0}, r"optim.b1=0.0 is not read"),
        (
            {"b2": 0.999, "state_dtype": "bfloat16"},
            r"optim.b2=0.999 with optim.state_dtype='bfloat16'.*never change; use at most 0.98",
        ),
        ({"name": "muon", "momentum": 1.0}, r"optim.momentum=1.0 is outside"),
        (
            {"schedule": "constant", "final_fraction": 0.0},
            r"optim.final_fraction=0.0 is not read by optim.schedule='constant'; leave it at 0.1, ",
        ),
    ],
)
def test_what_an_optimizer_would_ignore_or_lose_is_refused(changes, error):
    with pytest.raises(ConfigError, match=error):
        OptimConfig(**changes)


def test_a_moment_in_bfloat16_follows_where_it_is_allowed():
    """A moment of 1 and squares of 1.3: allowed rates reach 1.2 at least, refused ones stay."""

    def after(rate):
        moment = jnp.bfloat16(1)
        for _ in range(200):
            moment = (rate * moment.astype(jnp.float32) + (1 - rate) * 1.3).astype(jnp.bfloat16)
        return float(moment)

    OptimConfig(state_dtype="bfloat16", b2=0.98)
    assert after(0.98) > 1.1
    assert after(0.99) == 1
