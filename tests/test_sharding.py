"""The sharding table, and batches that are placed in the order in which they were asked for."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.config import (
    EXPERT_AXES,
    FSDP_AXES,
    Config,
    ConfigError,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
)
from moejax.mesh import make_mesh, mesh_config, single_device_mesh
from moejax.optim import make_optimizer
from moejax.sharding import (
    PARAMETER_SPECS,
    gathered_axes,
    parameter_spec,
    path_name,
    place_batch,
)
from moejax.state import abstract_state, initial_state
from moejax.step import parameter_group

CONFIG = Config(
    model=ModelConfig(
        num_layers=3,
        d_model=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        dense_hidden=24,
        vocab_size=24,
    ),
    moe=MoEConfig(num_experts=4, expert_hidden=12, first_dense=1, router="sigmoid_bias"),
)


@pytest.fixture(scope="module")
def state(mesh_of):
    """Shapes and shardings on fsdp 2, expert 2, tensor 2."""
    optimizer = make_optimizer(CONFIG.optim, 10)
    return abstract_state(CONFIG, mesh_of(1, 2, 2, 2), optimizer)


def _named(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# Layers that have, together, every parameter there is.
LAYERS = {
    "shared experts": {"shared_experts": 2, "shared_gate": "sigmoid"},
    "free experts": {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2},
    "cosine": {"router": "cosine"},
    "noisy": {"router": "noisy"},
    "dense": {"router": "dense", "capacity_factor": None},
    "elementwise": {"router": "elementwise", "capacity_factor": None},
    "elementwise input": {"router": "elementwise_input", "capacity_factor": None},
    "mixture of depths": {"router": "mixture_of_depths", "allow_noncausal": True},
    "soft": {"router": "soft", "capacity_factor": None, "allow_noncausal": True},
}
ATTENTION = {
    "latent": {"attention": "latent", "num_kv_heads": 2, "head_dim": 32},
    "biases and sinks": {"attention_bias": True, "attention_sinks": True},
}


@pytest.fixture(scope="module")
def layers(state, mesh_of):
    """Parameters by name of the config above and of every kind of layer."""
    found = {"plain": _named(state.params)}
    for name, changes in LAYERS.items():
        moe = dataclasses.replace(CONFIG.moe, **{"router": "softmax", **changes})
        config = dataclasses.replace(CONFIG, moe=moe)
        optimizer = make_optimizer(config.optim, 10)
        found[name] = _named(abstract_state(config, mesh_of(1, 2, 2, 2), optimizer).params)
    for name, changes in ATTENTION.items():
        config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **changes))
        optimizer = make_optimizer(config.optim, 10)
        found[name] = _named(abstract_state(config, mesh_of(1, 2, 2, 2), optimizer).params)
    return found


def test_every_parameter_is_in_the_table(layers):
    """The default is to replicate, silently: only routers may fall to it, and no entry is idle."""
    used = set()
    for kind, params in layers.items():
        for name in params:
            matches = [s for s in PARAMETER_SPECS if name == s or name.endswith("/" + s)]
            assert len(matches) == (parameter_group(name) != "router"), (kind, name, matches)
            used.update(matches)
    assert used == set(PARAMETER_SPECS)


def test_every_matrix_is_split_over_fsdp_and_tensor(layers):
    """A device holds a quarter of a matrix, an eighth of an expert stack, all of the rest.

    Of what scales the outputs of experts it holds half, for half of the experts; of biases and
    sinks half, for half of the heads.
    """
    parts = {"router": 8, "norms": 8, "experts": 1}
    for params in layers.values():
        for name, leaf in params.items():
            held = np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 / leaf.size
            expected = parts.get(parameter_group(name), 2)
            halved = ("output_scale", "scale_out", "attention/sinks")
            halved += tuple(f"attention/{of}_bias" for of in ("query", "key", "value"))
            if name.endswith(halved):
                expected = 4
            if name.endswith("attention/output_bias"):
                expected = 8
            assert held == expected, name


def test_over_expert_fsdp_experts_are_split_by_expert_and_all_else_by_width(mesh_of):
    """[L, E, D, F] of 4 experts over 2 x 2 devices, a query [L, D, H, K] over 2 of them."""
    mesh = mesh_of(1, 1, 2, 2, expert_fsdp=2)
    params = _named(abstract_state(CONFIG, mesh, make_optimizer(CONFIG.optim, 10)).params)
    gate, query = (params[f"runs/layer_0/{name}"] for name in ("moe/gate", "attention/query"))
    assert gate.sharding.shard_shape((2, 4, 16, 12)) == (2, 1, 16, 6)
    assert query.sharding.shard_shape((2, 16, 4, 4)) == (2, 8, 2, 4)
    assert gathered_axes(gate.sharding.spec) == ("fsdp",)
    assert gathered_axes(query.sharding.spec) == ("fsdp", "expert_fsdp")
    assert gathered_axes(params["runs/layer_0/moe/router"].sharding.spec) == ()


def test_stacked_layers_are_never_split(layers):
    for params in layers.values():
        for name, leaf in params.items():
            if name.startswith(("runs", "prefix")):
                assert tuple(leaf.sharding.spec)[:1] in ((), (None,)), name


def test_moments_lie_where_their_parameters_do(state):
    params = _named(state.params)
    moments = 0
    for name, leaf in _named(state.opt_state).items():
        for parameter, shape in params.items():
            if name.endswith(("mu/" + parameter, "nu/" + parameter)):
                assert leaf.sharding == shape.sharding, name
                moments += 1
    assert moments == 2 * len(params)
    assert state.router_state["bias"].sharding.spec == P()


def _state_specs(mesh, **changes):
    """Returns the spec of every array of the optimizer's state, without its path's first parts."""
    optimizer = make_optimizer(OptimConfig(**changes), 10)
    named = _named(abstract_state(CONFIG, mesh, optimizer).opt_state)
    return {name: (leaf.ndim, leaf.sharding.spec) for name, leaf in named.items()}


@pytest.mark.parametrize("changes", [{}, {"state_dtype": "bfloat16"}, {"name": "lion"}])
def test_every_moment_of_every_optimizer_lies_with_its_parameter(state, mesh_of, changes):
    expected = {name: leaf.sharding.spec for name, leaf in _named(state.params).items()}
    found = _state_specs(mesh_of(1, 2, 2, 2), **changes)
    moments = {name: spec for name, (ndim, spec) in found.items() if ndim}
    assert len(moments) == len(expected) * (1 if "name" in changes else 2)
    for name, spec in moments.items():
        assert spec == expected[name.split("/mu/")[-1].split("/nu/")[-1]], name


def test_muon_keeps_one_moment_of_a_matrix_and_two_of_the_rest(state, mesh_of):
    expected = {name: leaf.sharding.spec for name, leaf in _named(state.params).items()}
    found = _state_specs(mesh_of(1, 2, 2, 2), name="muon")
    for name, spec in expected.items():
        own = [s for key, (_, s) in found.items() if key.endswith(("/mu/" + name, "/nu/" + name))]
        hidden = parameter_group(name) in ("attention", "dense", "experts")
        assert own == [spec] * (1 if hidden else 2), name


def test_factored_statistics_have_the_axes_of_the_dims_that_they_keep(mesh_of):
    """Written by hand: [L, E, D, F], [L, D, H, K] and [L, H, K, D] without columns or rows."""
    found = _state_specs(mesh_of(1, 2, 2, 2), name="adafactor")
    layer, factors = "runs/layer_0", {}
    for name, (ndim, spec) in found.items():
        for kind in ("of_rows", "of_columns"):
            if f"/{kind}/" in name:
                factors[kind, name.split(f"/{kind}/")[1]] = (ndim, spec)
    expected = {
        f"{layer}/moe/gate": (P(None, EXPERT_AXES, "fsdp"), P(None, EXPERT_AXES, "tensor")),
        f"{layer}/moe/down": (P(None, EXPERT_AXES, "tensor"), P(None, EXPERT_AXES, "fsdp")),
        f"{layer}/attention/query": (P(None, FSDP_AXES), P(None, "tensor", None)),
        f"{layer}/attention/output": (P(None, "tensor", None), P(None, FSDP_AXES)),
        "embedding": (P("tensor"), P(FSDP_AXES)),
        "unembedding": (P(FSDP_AXES), P("tensor")),
    }
    for name, (rows, columns) in expected.items():
        assert factors["of_rows", name] == (len(rows), rows), name
        assert factors["of_columns", name] == (len(columns), columns), name
    assert len(factors) == 2 * (2 * 4 + 3 + 3 + 2)  # attention twice, dense, experts, embeddings
    router = "others/inner_state/nu/runs/layer_0/moe/router"
    assert [spec for name, (_, spec) in found.items() if name.endswith(router)] == [P()]


def test_names_are_matched_by_whole_parts():
    assert parameter_spec("runs/layer_0/moe/gate", 4) == P(None, EXPERT_AXES, "fsdp", "tensor")
    assert parameter_spec("prefix/layer_0/ffn/gate", 3) == P(None, FSDP_AXES, "tensor")
    assert parameter_spec("my_embedding", 2) == P()
    assert parameter_spec("0/mu/embedding", 2) == P("tensor", FSDP_AXES)
    assert parameter_spec("0/count", 0) == P()


def test_parameters_are_the_same_on_every_mesh(mesh_of):
    """Drawn on eight devices or on one: resuming a seed elsewhere starts from the same weights."""
    model = dataclasses.replace(CONFIG.model, num_layers=1)
    moe = dataclasses.replace(CONFIG.moe, first_dense=0)
    config = dataclasses.replace(CONFIG, seed=3, model=model, moe=moe)
    optimizer = make_optimizer(config.optim, 10)
    one, eight = (
        initial_state(config, mesh_of(*shape), optimizer).params
        for shape in ((1, 1, 1, 1), (1, 2, 2, 2))
    )
    for (path, expected), actual in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(eight), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, err_msg=path_name(path))
        assert np.abs(expected).max() > 0


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (1, 1, 4, 2)])
def test_batches_keep_the_order_of_their_rows(mesh_of, accumulation, shape):
    """Microbatch a holds rows a * B to (a + 1) * B; every row is asked for once."""
    asked = []

    def rows(start, stop):
        asked.append(stop - start)
        return {"tokens": np.arange(start * 3, stop * 3, dtype=np.int32).reshape(-1, 3)}

    batch = place_batch(mesh_of(*shape), rows, 16, accumulation)["tokens"]
    expected = np.arange(48).reshape(accumulation, 16 // accumulation, 3)
    np.testing.assert_array_equal(batch, expected)
    shards = np.prod(shape[:3])
    assert {s.data.shape for s in batch.addressable_shards} == {
        (accumulation, 16 // accumulation // shards, 3)
    }
    assert sum(asked) == 16 + 1  # every row once, and the template


def test_meshes_have_all_axes(mesh_of):
    names = ("data", "fsdp", "expert_fsdp", "expert", "context", "tensor")
    assert single_device_mesh().axis_names == names
    assert mesh_config(mesh_of(1, 2, 4, 1)) == MeshConfig(1, 2, 4, 1, 1)
    assert mesh_config(make_mesh(MeshConfig(data=2, expert=None))) == MeshConfig(2, 1, 4, 1, 1)


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"needs 16 devices \(available: 8\).*--cpu_devices 16"):
        make_mesh(MeshConfig(data=1, expert=16))
