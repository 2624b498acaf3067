"""`moejax describe` against real arrays, traced collectives and arithmetic by hand."""

import dataclasses
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from rich.console import Console

from moejax import describe as describe_module
from moejax.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig, MoEConfig
from moejax.describe import (
    buffer_rows,
    describe,
    exchange_bytes,
    gathered_weight_bytes,
    layer_kinds,
    local_tokens,
    placements,
    resolve_mesh,
    slots,
    transport,
)
from moejax.experts import MoEWeights
from moejax.flops import total_parameters
from moejax.mesh import make_mesh, mesh_config
from moejax.moe import apply_moe
from moejax.optim import make_optimizer
from moejax.state import abstract_state

CONFIG = Config(
    model=ModelConfig(num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4),
    moe=MoEConfig(
        router="sigmoid_bias", num_experts=8, top_k=2, expert_hidden=12, every=2, first_dense=1
    ),
    data=DataConfig(sequence_length=20),
    mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
)
POD = MeshConfig(data=8, fsdp=4, expert=8, tensor=2)


def _moe(config: Config = CONFIG, **changes) -> Config:
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))


def _shown(config: Config, num_devices: int | None = None) -> str:
    file = io.StringIO()
    describe(config, num_devices, Console(file=file, width=160, force_terminal=False))
    return file.getvalue()


# Memory


def test_bytes_are_those_of_the_arrays_of_a_training():
    mesh = make_mesh(CONFIG.mesh)
    shapes = abstract_state(CONFIG, mesh, make_optimizer(CONFIG.optim, CONFIG.train.steps))
    state = jax.tree.map(lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), shapes)
    described = placements(CONFIG, mesh_config(mesh))
    parts = {
        "parameters": state.params,
        "optimizer state": state.opt_state,
        "router state": state.router_state,
        "step and rng": (state.step, state.rng),
    }
    for kind, tree in parts.items():
        leaves = jax.tree.leaves(tree)
        assert sum(row.total for row in described[kind]) == sum(leaf.nbytes for leaf in leaves)
        for device in mesh.devices.flat:
            shards = [s for leaf in leaves for s in leaf.addressable_shards if s.device == device]
            local = sum(shard.data.nbytes for shard in shards)
            assert sum(row.per_device for row in described[kind]) == local, kind
    assert described["gradients"] == described["parameters"]


def test_one_matrix_by_hand():
    # One run of a dense and a MoE layer; [L, E, D, F] = [1, 8, 16, 12], float32.
    rows = {row.name: row for row in placements(CONFIG, CONFIG.mesh)["parameters"]}
    gate = rows["runs/layer_1/moe/gate"]
    assert gate.shape == (1, 8, 16, 12)
    assert gate.total == 4 * 8 * 16 * 12
    assert gate.per_device == 4 * (8 // 2) * (16 // 2) * (12 // 2)
    router = rows["runs/layer_1/moe/router"]
    assert router.per_device == router.total == 4 * 16 * 8  # on every device


def test_parameters_are_counted_as_in_flops():
    rows = placements(CONFIG, CONFIG.mesh)["parameters"]
    assert sum(math.prod(row.shape) for row in rows) == total_parameters(CONFIG)


def test_a_pod_needs_no_devices():
    # 512 devices; fewer experts than that share a device, so the bytes per device are a fraction.
    config = dataclasses.replace(
        CONFIG, mesh=POD, train=dataclasses.replace(CONFIG.train, batch_size=256)
    )
    assert resolve_mesh(config, 512) == POD
    rows = {row.name: row for row in placements(config, POD)["parameters"]}
    gate = rows["runs/layer_1/moe/gate"]
    assert gate.per_device * 8 * 4 * 2 == gate.total
    assert len(jax.devices()) < 512


# MoE layers


def test_layer_kinds_are_those_of_the_model():
    # A dense layer, then a run of a dense and a MoE layer.
    assert layer_kinds(CONFIG) == ["dense", "dense", "MoE"]
    assert layer_kinds(_moe(every=None)) == ["dense"] * 3
    assert layer_kinds(_moe(every=1)) == ["dense", "MoE", "MoE"]
    names = [row.name for row in placements(CONFIG, CONFIG.mesh)["parameters"]]
    assert "prefix/layer_0/ffn/gate" in names
    assert "runs/layer_0/ffn/gate" in names
    assert "runs/layer_1/moe/gate" in names


def test_slots_by_hand():
    # ceil(1.25 * 2 * 20 / 8) = ceil(6.25), and for groups of two sequences ceil(12.5).
    assert slots(CONFIG, 1.25) == 7
    assert slots(_moe(group_sequences=2), 1.25) == 13
    assert slots(CONFIG, 100.0) == 20  # a token selects an expert once


def test_exchange_bytes_by_hand():
    # 2 ways * 16 numbers * 4 bytes * (8 experts * 7 slots / 20 tokens) * 1/2 leave the device.
    assert exchange_bytes(CONFIG, CONFIG.mesh) == 2 * 16 * 4 * (8 * 7 / 20) / 2
    # 16 numbers each way, and an expert and a weight for each of 2 selections, to 1 other device.
    dropless = _moe(capacity_factor=None)
    assert exchange_bytes(dropless, CONFIG.mesh) == 2 * 16 * 4 + 2 * 8
    alone = MeshConfig(data=4, fsdp=1, expert=1, tensor=2)
    assert exchange_bytes(CONFIG, alone) == exchange_bytes(dropless, alone) == 0


def test_transport_is_what_auto_stands_for():
    assert transport(CONFIG) == "all_to_all"
    assert transport(_moe(capacity_factor=None)) == "gather"
    assert transport(_moe(transport="gather")) == "gather"
    assert transport(_moe(transport="reference")) == "reference"


@pytest.mark.parametrize("capacity_factor", [1.25, None])
@pytest.mark.parametrize("degree", [2, 4])
def test_exchange_bytes_are_those_of_the_traced_collectives(capacity_factor, degree):
    config = _moe(capacity_factor=capacity_factor)
    mesh = make_mesh(MeshConfig(data=8 // degree, fsdp=1, expert=degree, tensor=1))
    sizes = mesh_config(mesh)
    received = sum(_received(equation, degree) for equation in _equations(_trace(config, mesh)))
    assert received > 0
    assert received == pytest.approx(exchange_bytes(config, sizes) * local_tokens(config, sizes))


@pytest.mark.parametrize("capacity_factor", [1.25, None])
def test_buffers_are_those_of_the_traced_layer(capacity_factor):
    config = _moe(capacity_factor=capacity_factor)
    mesh = make_mesh(CONFIG.mesh)
    sizes = mesh_config(mesh)
    equations = list(_equations(_trace(config, mesh)))
    if capacity_factor is None:
        rows = [e.outvars[0].aval.shape for e in equations if e.primitive.name == "gather"]
        gathered = local_tokens(config, sizes) * 2
        assert (buffer_rows(config, sizes) - gathered, 16) in rows
    else:
        shapes = [e.outvars[0].aval.shape for e in equations if e.primitive.name == "all_to_all"]
        # [experts of a device, slots of every group of both devices, D], and the way back
        assert buffer_rows(config, sizes) == 4 * 8 * 7
        assert shapes == [(4, 2 * 4 * 7, 16), (8, 4 * 7, 16)]
    assert gathered_weight_bytes(config, sizes) == 3 * 4 * (8 // 2) * 16 * (12 // 2)


def _trace(config: Config, mesh):
    """The jaxpr of one MoE layer on a whole microbatch."""
    d, f, e = config.model.d_model, config.moe.expert_hidden, config.moe.num_experts
    shapes = MoEWeights((d, e), (e, d, f), (e, d, f), (e, f, d))
    weights = MoEWeights(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    batch, tokens = config.train.batch_size, config.data.sequence_length
    return jax.make_jaxpr(
        lambda w, x, mask, bias: apply_moe(w, x, mask, bias, config=config.moe, mesh=mesh)
    )(
        weights,
        jax.ShapeDtypeStruct((batch, tokens, d), jnp.float32),
        jax.ShapeDtypeStruct((batch, tokens), bool),
        jax.ShapeDtypeStruct((e,), jnp.float32),
    ).jaxpr


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def _received(equation, degree: int) -> float:
    """Bytes that one device gets from the others of its expert group."""
    name = equation.primitive.name
    sizes = [v.aval.size * v.aval.dtype.itemsize for v in equation.outvars]
    if name == "all_to_all":
        return sum(sizes) * (degree - 1) / degree
    if name in ("all_gather", "all_gather_invariant"):
        return sum(sizes) * (degree - 1) / degree
    if name == "reduce_scatter":
        return sum(sizes) * (degree - 1)
    return 0.0


# What is printed


def test_it_prints_the_numbers_plainly():
    text = _shown(CONFIG)
    assert "\x1b" not in text
    for word in (
        f"{total_parameters(CONFIG):,}",
        "arXiv:2204.02311",
        "320 = 16 sequences x 20",
        "1: 2",  # the MoE layer
        "2: 0-1",  # the dense ones
        "7 slots per expert and group of 1 x 20 tokens: ceil(1.25 * 2 * 20 / 8)",
        "all_to_all over expert=2",
        "runs/layer_1/moe/gate",
        "P(None, 'expert', 'fsdp', 'tensor')",
    ):
        assert word in text, word


def test_a_dense_model_and_a_dropless_one_are_described():
    assert "MoE" not in _shown(_moe(every=None))
    assert "dropless" in _shown(_moe(capacity_factor=None))


def test_a_free_axis_takes_what_is_left():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=None, expert=2))
    assert resolve_mesh(config, None) == MeshConfig(data=1, fsdp=1, expert=2, tensor=1)
    assert resolve_mesh(config, 8) == MeshConfig(data=4, fsdp=1, expert=2, tensor=1)


@pytest.mark.parametrize(
    ("config", "num_devices", "message"),
    [
        (CONFIG, 4, "needs 8 devices and 4 are there"),
        (CONFIG, 12, "sizes must multiply to 12"),
        (
            dataclasses.replace(CONFIG, mesh=MeshConfig(expert=16)),
            16,
            "moe.num_experts=8 is not divisible by the expert axis (16)",
        ),
        (
            dataclasses.replace(CONFIG, mesh=MeshConfig(data=64)),
            None,
            "not a multiple of 64 = data 64",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, num_devices, message):
    with pytest.raises(ConfigError) as error:
        describe(config, num_devices)
    assert message in str(error.value)


def test_ranges_of_layers():
    ranges = describe_module._ranges
    assert ranges([]) == "none"
    assert ranges([3]) == "1: 3"
    assert ranges([0, 1, 2]) == "3: 0-2"
    assert ranges([1, 3, 5]) == "3: 1-5 in steps of 2"
    assert ranges([0, 1, 3, 5]) == "4: 0, 1, 3, 5"
