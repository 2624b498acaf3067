"""The train step: equal for every accumulation and layout, with the promised collectives."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.attention import packed_tokens
from moejax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimConfig, TrainConfig
from moejax.data import Batch
from moejax.optim import make_optimizer
from moejax.router_state import initial_router_state
from moejax.sharding import path_name, place_batch
from moejax.state import abstract_state, model_graph
from moejax.step import (
    GROUPS,
    Microbatch,
    global_norm,
    gradients,
    make_train_step,
    parameter_group,
    sequence_keys,
    train_step,
)

B, T, V = 16, 8, 24
CONFIG = Config(
    model=ModelConfig(
        num_layers=2,
        d_model=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        dense_hidden=24,
        vocab_size=V,
    ),
    moe=MoEConfig(
        num_experts=8,
        top_k=2,
        expert_hidden=12,
        capacity_factor=1.0,
        balance_loss_weight=0.1,
        router_z_loss_weight=0.01,
    ),
    data=DataConfig(sequence_length=T),
    optim=OptimConfig(learning_rate=0.01, warmup_steps=2),
    train=TrainConfig(steps=10, batch_size=B),
)


def _with(moe) -> Config:
    return dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, **moe))


def _rows() -> Batch:
    """Packed documents; the last quarter of the rows is mostly padding, and one row all padding.

    So microbatches have very different numbers of real tokens and targets.
    """
    random = np.random.default_rng(0)
    stream = random.integers(V, size=(B, T + 1)).astype(np.int32)
    segments = np.sort(random.integers(1, 4, size=(B, T)), axis=1).astype(np.int32)
    segments[12:, 2:] = 0
    segments[13] = 0
    following = np.pad(segments[:, 1:], ((0, 0), (0, 1)))
    mask = (segments > 0) & (segments == following)
    return Batch(stream[:, :-1], stream[:, 1:], segments, mask, np.zeros_like(segments))


ROWS = _rows()


def _split(accumulation: int, rows: Batch = ROWS) -> Batch:
    return Batch(*(np.reshape(a, (accumulation, -1, T)) for a in rows))


def _place(mesh):
    def rows(start, stop):
        return Batch(*(a[start:stop] for a in ROWS))

    return place_batch(mesh, rows, B, 1)


@pytest.fixture(scope="module")
def state_of(params_of):
    """Returns `(config, mesh) -> state` before the first step, the same values on every mesh."""

    def make(config, mesh):
        abstract = abstract_state(config, mesh, make_optimizer(config.optim, config.train.steps))
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), abstract)
        state = dataclasses.replace(zeros, params=params_of(config, mesh))
        return jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), state, abstract)

    return make


@functools.cache
def _gradients(config, mesh):
    return jax.jit(functools.partial(gradients, config, model_graph(config, mesh)))


@functools.cache
def _step(config, mesh):
    return make_train_step(config, mesh)


def _assert_trees_close(actual, expected, rtol=2e-5):
    for (path, value), other in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True
    ):
        value, other, name = np.asarray(value), np.asarray(other), path_name(path)
        if np.issubdtype(value.dtype, np.inexact):
            atol = rtol * np.abs(value).max()
            np.testing.assert_allclose(other, value, atol=atol, rtol=0, err_msg=name)
        else:
            np.testing.assert_array_equal(other, value, err_msg=name)


def _microbatches(accumulation: int, rows: Batch = ROWS) -> Microbatch:
    batch = _split(accumulation, rows)
    keys = sequence_keys(jnp.array([3, 5], jnp.uint32), jnp.int32(7), batch.tokens.shape[:2])
    return Microbatch(batch, keys, None)


EVERY_LOSS = {
    "sequence_balance_loss_weight": 0.02,
    "importance_loss_weight": 0.03,
    "mutual_information_loss_weight": 0.05,
    "device_balance_loss_weight": 0.04,
    "device_groups": 4,
}
# What a step's losses are made of, and the numbers of microbatches that are compared.
MIXES = {
    # Not linear in the step's sums: a forward pass ahead gives each microbatch the slopes.
    "every loss": (EVERY_LOSS, (1, 2, 4, 8)),
    # Linear: no forward pass ahead.
    "by sequence": (
        {"balance_loss_weight": 0.0, "sequence_balance_loss_weight": 0.1},
        (1, 4),
    ),
    # Noise is drawn for each sequence, and is the same in whichever microbatch it is.
    "noisy": ({"router": "noisy", "load_loss_weight": 0.1, "importance_loss_weight": 0.1}, (1, 4)),
    # The coefficient of the state weighs the loss.
    "relu": (
        {
            "router": "relu",
            "l1_coefficient": 0.05,
            "balance_loss_weight": 0.0,
            "router_z_loss_weight": 0.0,
        },
        (1, 4),
    ),
}


MIX_PARAMETERS = [
    pytest.param(*mix, id=name, marks=[pytest.mark.slow] if name != "every loss" else [])
    for name, mix in MIXES.items()
]


@pytest.mark.parametrize(("moe", "accumulations"), MIX_PARAMETERS)
def test_accumulation_changes_neither_losses_nor_gradients_nor_counts(
    mesh, state_of, moe, accumulations
):
    """Microbatches of very different numbers of real tokens; then the auxiliary losses alone.

    Without targets the cross-entropy is 0 and the gradient is that of the auxiliary losses, which
    must not shrink with the number of microbatches or of tokens.
    """
    config = _with(moe)
    state = state_of(config, mesh)
    router_state = initial_router_state(config.moe, config.num_moe_layers, V)
    auxiliary_rows = ROWS._replace(loss_mask=np.zeros_like(ROWS.loss_mask))
    expected = {}
    for accumulation in accumulations:
        run = _gradients(config, mesh)
        for name, rows in (("all", ROWS), ("auxiliary", auxiliary_rows)):
            result = run(state.params, router_state, _microbatches(accumulation, rows))
            _assert_trees_close(result, expected.setdefault(name, result))
    grads, losses, stats, total, _ = expected["auxiliary"]
    assert losses.loss == 0
    assert losses.total > 0.01
    for name, value_l in losses.terms.items():
        assert (np.abs(value_l) > 1e-3).all(), name
    router = np.asarray(grads["runs"]["layer_0"]["moe"]["router"])
    assert np.abs(router).max() > 1e-4
    assert int(total.tokens) == (ROWS.segments > 0).sum()
    if config.moe.slots_per_token == 2:
        np.testing.assert_array_equal(stats.count_e.sum(-1), 2 * int(total.tokens))
    assert stats.dropped_e.sum() > 0


def test_the_reported_loss_is_the_cross_entropy_alone(mesh, state_of):
    state = state_of(CONFIG, mesh)
    _, losses, stats, *_ = _gradients(CONFIG, mesh)(state.params, {}, _microbatches(1))
    balance, z = (losses.terms[name].sum() for name in ("balance", "z"))
    np.testing.assert_allclose(losses.total, losses.loss + 0.1 * balance + 0.01 * z, rtol=1e-6)
    assert losses.total > losses.loss + 0.2  # 1 for each layer at least
    assert stats.count_e.shape == (2, 8)
    untargeted = ROWS._replace(loss_mask=np.zeros_like(ROWS.loss_mask))
    _, losses, *_ = _gradients(CONFIG, mesh)(state.params, {}, _microbatches(1, untargeted))
    assert losses.loss == 0 < losses.total


def test_the_gradient_norm_of_narrow_parameters_is_a_float32_sum():
    """257 ones; in bfloat16 a sum of 256 and 1 is 256."""
    norm = global_norm({"a": jnp.ones(256, jnp.bfloat16), "b": jnp.ones(1, jnp.bfloat16)})
    np.testing.assert_allclose(norm, 257**0.5, rtol=1e-6)
    assert norm.dtype == jnp.float32


def test_the_microbatch_balance_loss_of_one_microbatch_is_that_of_the_step(mesh, state_of):
    """In value and gradient; with more microbatches it is another loss, by its definition."""
    config = _with({"balance_loss_weight": 0.0, "microbatch_balance_loss_weight": 0.1})
    state = state_of(config, mesh)
    grads, losses, *_ = _gradients(CONFIG, mesh)(state.params, {}, _microbatches(1))
    run = _gradients(config, mesh)
    other_grads, other, *_ = run(state.params, {}, _microbatches(1))
    _assert_trees_close(other_grads, grads)
    np.testing.assert_allclose(other.total, losses.total, rtol=1e-6)
    np.testing.assert_allclose(other.terms["microbatch_balance"], losses.terms["balance"], 1e-6)
    of_four = run(state.params, {}, _microbatches(4))[1]
    assert (of_four.terms["microbatch_balance"] > 1.005 * losses.terms["balance"]).all()
    np.testing.assert_allclose(of_four.terms["balance"], losses.terms["balance"], rtol=1e-5)


def test_keys_of_sequences_are_a_function_of_seed_step_and_row():
    """Not of how rows are split into microbatches, and no two are alike."""
    rng, step = jnp.array([3, 5], jnp.uint32), jnp.int32(7)
    keys = np.asarray(sequence_keys(rng, step, (1, 16)))
    assert keys.shape == (1, 16, 2)
    for accumulation in (2, 4, 16):
        split = sequence_keys(rng, step, (accumulation, 16 // accumulation))
        np.testing.assert_array_equal(np.reshape(split, (16, 2)), keys[0])
    # A larger batch begins with the same rows.
    np.testing.assert_array_equal(sequence_keys(rng, step, (1, 20))[0, :16], keys[0])
    others = [
        sequence_keys(rng, step + 1, (1, 16)),
        sequence_keys(jnp.array([3, 6], jnp.uint32), step, (1, 16)),
    ]
    every = np.concatenate([keys, *others]).reshape(-1, 2)
    assert len(np.unique(every, axis=0)) == 3 * 16


def test_a_replayed_step_uses_the_given_choices_and_leaves_the_router_state(mesh, state_of):
    config = dataclasses.replace(
        _with(SIGMOID), model=dataclasses.replace(CONFIG.model, num_layers=1)
    )
    optimizer = make_optimizer(config.optim, config.train.steps)
    step = jax.jit(train_step(config, mesh, optimizer, model_graph(config, mesh)))
    state = state_of(config, mesh)
    choices = np.broadcast_to(np.array([6, 7], np.int32), (1, 1, B, T, 2))
    after, metrics, _ = step(state, _split(1), choices)
    np.testing.assert_array_equal(metrics.stats.count_e[0, :6], 0)
    assert (metrics.stats.count_e[0, 6:] == (ROWS.segments > 0).sum()).all()
    np.testing.assert_array_equal(after.router_state["bias"], state.router_state["bias"])
    np.testing.assert_array_equal(metrics.router_state["bias"], state.router_state["bias"])
    assert int(after.step) == 1


SIGMOID = {"router": "sigmoid_bias", "bias_update_rate": 0.01}


def _two_steps(config, mesh, state_of):
    """Returns the state and the metrics after two steps, and the arrays of the first state."""
    step, _ = _step(config, mesh)
    first = state = state_of(config, mesh)
    for _ in range(2):
        state, metrics = step(state, _place(mesh))
    return first, state, metrics


@pytest.fixture(scope="module")
def one_device(mesh, state_of):
    return _two_steps(_with(SIGMOID), mesh, state_of)


@pytest.fixture(scope="module")
def eight_devices(mesh_of, state_of):
    return _two_steps(_with(SIGMOID), mesh_of(2, 2, 2, 1), state_of)


def test_eight_devices_train_as_one_does(one_device, eight_devices):
    """Data, fsdp and expert axes of 2 against one device.

    Gradient norm and clipping see every expert once; the selection bias moves by the whole step's
    counts.
    """
    _, state, metrics = one_device
    _, other_state, other_metrics = eight_devices
    _assert_trees_close(other_metrics, metrics, rtol=1e-4)
    _assert_trees_close(other_state.params, state.params, rtol=2e-3)  # Adam's sign near 0
    np.testing.assert_allclose(
        other_state.router_state["bias"], state.router_state["bias"], atol=1e-6
    )
    assert np.abs(state.router_state["bias"]).max() > 0.005
    assert metrics.grad_norm > CONFIG.optim.clip_norm


def test_what_is_replicated_is_equal_bit_for_bit_on_every_device(eight_devices):
    _, state, metrics = eight_devices
    replicated = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path((state, metrics)):
        by_index = {}
        for shard in leaf.addressable_shards:
            same = by_index.setdefault(str(shard.index), np.asarray(shard.data))
            np.testing.assert_array_equal(np.asarray(shard.data), same, err_msg=path_name(path))
        replicated += len(by_index) == 1
    assert replicated > 20  # all metrics, routers, norms


def test_the_state_keeps_its_shardings_and_is_donated(eight_devices, mesh_of):
    first, state, _ = eight_devices
    _, abstract = _step(_with(SIGMOID), mesh_of(2, 2, 2, 1))
    for (path, leaf), shape in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(abstract), strict=True
    ):
        assert leaf.sharding == shape.sharding, path_name(path)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.opt_state))


def test_the_step_counts_and_follows_the_schedule(one_device):
    _, state, metrics = one_device
    assert int(state.step) == 2
    np.testing.assert_allclose(metrics.learning_rate, 0.01)  # the second of two warmup steps
    assert all(metrics.finite.values())
    assert list(metrics.finite) == [
        "router logits of MoE layer 0",
        "router logits of MoE layer 1",
        "loss",
        "total_loss",
        *(f"gradient of {group}" for group in GROUPS if group not in ("dense", "shared")),
        "grad_norm",
        "parameters after the step",
    ]


# A weight that is NaN, and what is not finite first.
CULPRITS = {
    "embedding": "router logits of MoE layer 0",
    "runs/layer_0/moe/router": "router logits of MoE layer 1",
    "unembedding": "loss",
}


@pytest.mark.parametrize(("name", "expected"), CULPRITS.items(), ids=CULPRITS)
def test_the_first_quantity_that_is_not_finite_is_named(mesh, state_of, name, expected):
    """The router's NaN is in the second MoE layer alone."""
    config = _with(SIGMOID)
    step, _ = _step(config, mesh)

    def poison(path, leaf):
        if path_name(path) != name:
            return leaf
        value = np.array(leaf)
        value[-1] = np.nan
        return jax.device_put(value, leaf.sharding)

    state = state_of(config, mesh)
    params = jax.tree_util.tree_map_with_path(poison, state.params)
    rows = ROWS.tokens.copy()
    rows[0, 0] = V - 1  # the token whose embedding is poisoned is there
    batch = Batch(*(a[None] for a in ROWS._replace(tokens=rows)))
    _, metrics = step(dataclasses.replace(state, params=params), batch)
    broken = [quantity for quantity, finite in metrics.finite.items() if not finite]
    assert broken[0] == expected


def test_every_parameter_has_a_group(mesh):
    config = _with({"first_dense": 1, "shared_experts": 1, "shared_gate": "sigmoid"})
    shapes = abstract_state(config, mesh, make_optimizer(config.optim, 10))
    groups = {
        path_name(path): parameter_group(path_name(path))
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes.params)
    }
    assert set(groups.values()) == set(GROUPS)
    assert groups["runs/layer_0/moe/down"] == "experts"
    assert groups["runs/layer_0/moe/shared_down"] == "shared"
    assert groups["runs/layer_0/moe/shared_router"] == "router"
    assert groups["runs/layer_0/attention/query_norm/scale"] == "norms"
    assert groups["prefix/layer_0/ffn/gate"] == "dense"
    assert {n for n, g in groups.items() if g == "embeddings"} == {"embedding", "unembedding"}


def _compiled_text(function, *arguments) -> str:
    return function.lower(*arguments).compile().as_text()


def _shapes_of(text: str, operation: str) -> list[str]:
    """Returns the result type of each HLO instruction of this kind that crosses devices."""
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) {operation}(?:-start)?\(", line)
        alone = re.search(r"replica_groups=\{\{\d+\}(,\{\d+\})*\}", line)
        if match and not alone:
            found.append(match.group(1))
    return found


@pytest.fixture(scope="module", params=[1, 4], ids=["expert", "expert_fsdp_4"])
def expert_only(mesh_of, request):
    """The compiled text of a forward pass and of the train step of one MoE layer on 8 devices."""
    mesh = mesh_of(1, 1, 8 // request.param, 1, expert_fsdp=request.param)
    config = dataclasses.replace(
        _with({"first_dense": 0}), model=dataclasses.replace(CONFIG.model, num_layers=1)
    )
    step, abstract = make_train_step(config, mesh)
    batch = _place(mesh)
    graph = model_graph(config, mesh)

    @jax.jit
    def forward(params, batch):
        tokens, segments = batch.tokens[0], batch.segments[0]
        return nnx.merge(graph, params)(tokens, packed_tokens(segments), {})[:2]

    return _compiled_text(forward, abstract.params, batch), _compiled_text(step, abstract, batch)


def test_compiled_forward_has_three_all_to_alls_and_the_step_six(expert_only):
    """Slots and their weights go out and slots come back, and so do gradients the other way.

    The compiler's partitioner adds nothing.
    """
    forward, step = expert_only
    assert len(_shapes_of(forward, "all-to-all")) == 3, _shapes_of(forward, "all-to-all")
    assert len(_shapes_of(step, "all-to-all")) == 6, _shapes_of(step, "all-to-all")


def test_expert_weights_never_leave_their_device(expert_only):
    """Each holds [1, D, F] of [8, D, F]: no collective of such a shape, of weights or gradients."""
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
    expert = re.compile(r"\[(\d+,)*(16,12|12,16)\]")
    for text in expert_only:
        shapes = [shape for kind in kinds for shape in _shapes_of(text, kind)]
        assert len(shapes) > 2
        assert not [shape for shape in shapes if expert.search(shape)]
        assert expert.search(text)  # they are there, by this name
