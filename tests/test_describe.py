"""`moejax describe` against real arrays and arithmetic by hand."""

import dataclasses
import io
import math

import jax
import numpy as np
import pytest
from rich.console import Console

from moejax import describe as describe_module
from moejax.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig, MoEConfig
from moejax.describe import (
    describe,
    gathered_weight_bytes,
    layer_kinds,
    placements,
    resolve_mesh,
)
from moejax.flops import total_parameters
from moejax.mesh import make_mesh, mesh_config
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


def test_gradients_of_layers_have_the_compute_dtype_but_where_they_are_added_up():
    def gradients(**changes):
        model = dataclasses.replace(CONFIG.model, dtype="bfloat16")
        train = dataclasses.replace(CONFIG.train, **changes)
        config = dataclasses.replace(CONFIG, model=model, train=train)
        rows = placements(config, CONFIG.mesh)
        pairs = zip(rows["gradients"], rows["parameters"], strict=True)
        return {p.name: g.total / p.total for g, p in pairs}

    ratios = gradients()
    assert ratios["runs/layer_1/moe/up"] == ratios["prefix/layer_0/attention/query"] == 0.5
    assert ratios["runs/layer_1/moe/router"] == ratios["embedding"] == 1
    assert set(gradients(accumulation=2).values()) == {1}


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


def test_gathered_weights_by_hand():
    # Gate, up and down of 8 / 2 experts on a device, whole over fsdp, half of the hidden width.
    assert gathered_weight_bytes(CONFIG, CONFIG.mesh) == 4 * 3 * (8 // 2) * 16 * (12 // 2)
    # Without a gate matrix; with a scale [E, D] of every expert's output.
    plain = _moe(activation="gelu", router="elementwise", capacity_factor=None)
    assert gathered_weight_bytes(plain, CONFIG.mesh) == 4 * (2 * 4 * 16 * 6 + 4 * 16)
    # A router and shared experts are no part of it, and the oracle gathers nothing.
    shared = _moe(shared_experts=2)
    assert gathered_weight_bytes(shared, CONFIG.mesh) == 4 * 3 * 4 * 16 * 6
    assert gathered_weight_bytes(_moe(transport="reference"), CONFIG.mesh) == 0


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
        "P(None, ('expert_fsdp', 'expert'), 'fsdp', 'tensor')",
    ):
        assert word in text, word


def test_over_expert_fsdp_a_device_has_its_experts_whole():
    """[E, D, F] of 8 experts over 4 devices, F over 2; a query [D, H, K] over 2 and 2."""
    sizes = MeshConfig(data=1, expert_fsdp=2, expert=2, tensor=2)
    config = dataclasses.replace(CONFIG, mesh=sizes)
    rows = {row.name: row for row in placements(config, sizes)["parameters"]}
    assert rows["runs/layer_1/moe/gate"].per_device == 4 * 2 * 16 * 6
    assert gathered_weight_bytes(config, sizes) == 3 * 4 * 2 * 16 * 6
    assert rows["runs/layer_1/attention/query"].per_device == 4 * 8 * 2 * 4
    text = _shown(config)
    assert "all_to_all over expert_fsdp=2 x expert=2" in text
    assert "splits sequences, experts, and every matrix outside of them" in text


def test_a_dense_model_and_a_dropless_one_are_described():
    assert "MoE" not in _shown(_moe(every=None))
    assert "dropless" in _shown(_moe(capacity_factor=None))


def _rows(text: str, title: str) -> list[list[str]]:
    """Returns the cells of the table under a title."""
    lines = text.partition(title)[2].partition("\n\n")[0].splitlines()
    bar = str.maketrans("│┃", "||")
    cells = [line.translate(bar).split("|")[1:-1] for line in lines]
    return [[cell.strip() for cell in row] for row in cells if row]


def test_every_transport_is_priced_and_the_own_one_marked():
    rows = _rows(_shown(_moe(capacity_factor=None)), "transports, bytes")
    assert [row[0] for row in rows[1:]] == ["all_to_all", "ragged", "gather *"]
    # 2 * 16 * 4 + 8 * 2 bytes for each of 80 tokens; buffers of 2 * 80 + 240 rows of 16 * 4 bytes.
    assert rows[3] == [
        "gather *",
        "144",
        "11.2 KiB",
        "25.0 KiB",
        "(2 * D * b + 8 * S) * (Z - 1)",
    ]
    text = _shown(_moe(transport="reference"))
    assert [row[0] for row in _rows(text, "transports, bytes")[1:]] == ["reference *"]
    soft = _moe(router="soft", capacity_factor=None, allow_noncausal=True)
    assert [row[0] for row in _rows(_shown(soft), "transports, bytes")[1:]] == ["all_to_all *"]


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({}, {"router": "sigmoid_bias, 2 of 8 experts a token"}),
        (
            {"router": "dense", "capacity_factor": None},
            {"router": "dense, 8 of 8 experts a token on average", "capacity": "dropless"},
        ),
        (
            {"router": "relu", "capacity_factor": None},
            {"router": "relu, 2 of 8 experts a token on average"},
        ),
        (
            # Networks are 8 * 3/4 parts of 8 * 3/4 + 6.
            {"zero_experts": 1, "copy_experts": 2, "constant_experts": 3},
            {
                "router": "sigmoid_bias, 1 of 8 experts a token on average",
                "experts without a network": "1 zero, 2 copy, 3 constant",
            },
        ),
        (
            {"shared_experts": 2, "shared_gate": "sigmoid"},
            {"shared experts": "2, gate sigmoid"},
        ),
        (
            {"capacity_by_expert": (1.0,) * 7 + (2.0,)},
            {
                "capacity": "up to 13 slots per expert and group of 1 x 20 tokens: "
                "ceil(1.25 * 2 * 2 * 20 / 8), at most 20",
                "capacity in the second evaluation": "up to 20 slots per expert and group of 1 x "
                "20 tokens: ceil(2 * 2 * 2 * 20 / 8), at most 20",
            },
        ),
    ],
)
def test_facts_of_a_layer(changes, facts):
    shown = {row[0]: row[1] for row in _rows(_shown(_moe(**changes)), "MoE layers")}
    assert facts.items() <= shown.items()
    optional = {"experts without a network", "shared experts"}
    assert optional & set(shown) == optional & set(facts)
    has_second = "capacity in the second evaluation" in shown
    assert has_second == (changes.get("router") != "dense")


def test_a_free_axis_takes_what_is_left():
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=None, expert=2))
    assert resolve_mesh(config, None) == MeshConfig(data=1, fsdp=1, expert=2, tensor=1)
    assert resolve_mesh(config, 8) == MeshConfig(data=4, fsdp=1, expert=2, tensor=1)


@pytest.mark.parametrize(
    ("config", "num_devices", "message"),
    [
        (CONFIG, 4, "needs 8 devices (available: 4)"),
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
