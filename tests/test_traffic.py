"""What transports move and hold: the formulas against arithmetic by hand and the traced layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from moejax.config import (
    EXPERT_AXES,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    TrainConfig,
)
from moejax.describe import gathered_weight_bytes
from moejax.dispatch import expert_capacity
from moejax.exchange import ragged_window
from moejax.mesh import make_mesh, mesh_config
from moejax.moe import apply_moe
from moejax.parameters import moe_parameters
from moejax.router_state import initial_router_state
from moejax.routing import RouterInputs
from moejax.traffic import (
    FORMULAS,
    TRANSPORTS,
    buffer_rows,
    exchange_bytes,
    formula,
    local_tokens,
    part_rows,
    slots,
)

CONFIG = Config(
    model=ModelConfig(num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4),
    moe=MoEConfig(num_experts=8, top_k=2, expert_hidden=12, every=2, first_dense=1),
    data=DataConfig(sequence_length=20),
    train=TrainConfig(batch_size=16),
)
# 4 sequences of 20 tokens on each of 4 x 2 devices; 2 devices split the experts.
MESH = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
ALONE = MeshConfig(data=4, fsdp=1, expert=1, tensor=2)


def _moe(config: Config = CONFIG, **changes) -> Config:
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **changes))


DROPLESS = _moe(capacity_factor=None)
SOFT = _moe(capacity_factor=None, router="soft", soft_slots=3, allow_noncausal=True)


# By hand


def test_slots_by_hand():
    # ceil(1.25 * 2 * 20 / 8) = ceil(6.25), and for groups of two sequences ceil(12.5).
    assert slots(CONFIG, 1.25) == 7
    assert slots(_moe(group_sequences=2), 1.25) == 13
    assert slots(CONFIG, 100.0) == 20  # a token selects an expert once
    # Buffers have the rows of the largest: ceil(1.1 * 6.25), ceil(2 * 6.25), ceil(6.25 / 2).
    assert slots(_moe(capacity_by_expert=(0.5, *(1.0,) * 6, 1.1)), 1.25) == 7
    assert slots(_moe(capacity_by_expert=(0.5, *(1.0,) * 6, 2.0)), 1.25) == 13
    assert slots(_moe(capacity_by_expert=(0.5,) * 8), 1.25) == 4


def test_slots_are_exact_in_the_decimals_that_the_user_wrote():
    # 1.1 * 1.1 * 2 * 2000 / 8 is 605 in decimals, and a little more in floating point.
    config = _moe(capacity_by_expert=(1.1,) * 8)
    config = dataclasses.replace(config, data=DataConfig(sequence_length=2000))
    assert 1.1 * 1.1 * 2 * 2000 / 8 > 605
    assert slots(config, 1.1) == 605
    assert expert_capacity(2000, 8, 2, 1.1 * 1.1) == 606


def test_exchange_bytes_by_hand():
    # 2 ways * 16 numbers * 4 bytes, and a weight for each slot; of what is sent to 2 devices half
    # leaves the device.
    both_ways = 2 * 16 * 4
    assert exchange_bytes(CONFIG, MESH, "all_to_all") == (both_ways + 4) * (8 * 7 / 20) / 2
    # 16 numbers each way, and an expert and a weight for each of 2 selections, to 1 other device.
    assert exchange_bytes(DROPLESS, MESH, "gather") == both_ways + 2 * 8
    # Every selection once, and its weight to 1 other device.
    assert exchange_bytes(DROPLESS, MESH, "ragged") == both_ways * 2 / 2 + 2 * 4
    # 80 tokens * 2 * 1.5 = 240 rows, 120 for each device; 8 bytes are a row's expert and weight.
    assert exchange_bytes(DROPLESS, MESH, "all_to_all") == (both_ways + 8) * (240 / 80) / 2
    assert exchange_bytes(SOFT, MESH, "all_to_all") == both_ways * (8 * 3 / 20) / 2
    assert exchange_bytes(CONFIG, MESH, "reference") == 0


@pytest.mark.parametrize("how", TRANSPORTS)
def test_one_device_of_experts_sends_nothing(how):
    assert exchange_bytes(CONFIG, ALONE, how) == exchange_bytes(DROPLESS, ALONE, how) == 0


def test_half_the_width_of_a_number_is_half_of_what_vectors_cost():
    model = dataclasses.replace(CONFIG.model, dtype="bfloat16")
    half = dataclasses.replace(DROPLESS, model=model)
    assert exchange_bytes(half, MESH, "gather") == 2 * 16 * 2 + 2 * 8


def test_part_of_a_device_is_rounded_up_and_holds_at_most_every_assignment():
    mesh = MeshConfig(data=1, fsdp=1, expert=8, tensor=1)
    # 40 tokens * 2 * 1.3 = 104 rows over 8 devices; and 40 * 2 in all are sent.
    assert local_tokens(CONFIG, mesh) == 40
    assert part_rows(_moe(DROPLESS, buffer_factor=1.3), mesh) == 13
    assert part_rows(_moe(DROPLESS, buffer_factor=1.35), mesh) == 14
    assert part_rows(_moe(DROPLESS, buffer_factor=100.0), mesh) == 80


def test_buffers_by_hand():
    assert buffer_rows(CONFIG, MESH, "all_to_all") == 4 * 8 * 7
    assert buffer_rows(SOFT, MESH, "all_to_all") == 4 * 8 * 3
    assert buffer_rows(DROPLESS, MESH, "all_to_all") == 240 + 240  # sent and received
    assert buffer_rows(DROPLESS, MESH, "ragged") == 160 + 240
    assert buffer_rows(DROPLESS, MESH, "gather") == 2 * 80 + 240  # tokens, then rows
    assert buffer_rows(DROPLESS, MESH, "reference") == 0
    assert [buffer_rows(DROPLESS, ALONE, how) for how in TRANSPORTS] == [160] * 3  # all there is
    assert [buffer_rows(CONFIG, ALONE, how) for how in TRANSPORTS] == [160] * 3
    assert buffer_rows(SOFT, ALONE, "all_to_all") == 4 * 8 * 3
    # No more is received than there is: 2 * 80 tokens to all of 4 local experts.
    roomy = _moe(DROPLESS, buffer_factor=100.0)
    assert buffer_rows(roomy, MESH, "gather") == 2 * 80 + 2 * 160


def test_every_transport_of_every_dispatch_has_a_formula():
    assert formula(CONFIG, ALONE, "all_to_all") == "slots"
    assert formula(DROPLESS, ALONE, "all_to_all") == "padded"
    assert formula(SOFT, ALONE, "all_to_all") == "soft"
    for how in (*TRANSPORTS, "reference"):
        for config in (CONFIG, DROPLESS, SOFT):
            assert formula(config, ALONE, how) in FORMULAS


# Against the layer that is traced

TRACED = {
    "slots": CONFIG,
    "slots of unequal experts": _moe(capacity_by_expert=(2.0, *(1.0,) * 7)),
    "soft": SOFT,
    "padded": _moe(DROPLESS, transport="all_to_all"),
    "padded, no room": _moe(DROPLESS, transport="all_to_all", buffer_factor=1.0),
    "gather": _moe(DROPLESS, transport="gather"),
    "gather with capacity": _moe(transport="gather"),
}


def _trace(config: Config, mesh):
    """One MoE layer, traced on a whole microbatch."""
    moe, d = config.moe, config.model.d_model
    weights = {
        name: jax.ShapeDtypeStruct(parameter.shape, jnp.float32)
        for name, parameter in moe_parameters(moe, d).items()
    }
    layers = initial_router_state(moe, 1, config.model.vocab_size)
    state = {name: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for name, v in layers.items()}
    batch, tokens = config.train.batch_size, config.data.sequence_length

    def layer(weights, x_btd, mask_bt, state):
        return apply_moe(weights, x_btd, RouterInputs(mask_bt), state, config=moe, mesh=mesh)

    return jax.jit(layer).trace(
        weights,
        jax.ShapeDtypeStruct((batch, tokens, d), jnp.float32),
        jax.ShapeDtypeStruct((batch, tokens), bool),
        state,
    )


def _first_round(jaxpr):
    """Yields the equations that routing within the buffer runs: further rounds are in a loop."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "while":
            for inner in jaxprs_in_params(equation.params):
                yield from _first_round(inner)


def _received(equation, degree: int) -> float:
    """Bytes that one device gets from the others of its expert group."""
    if not set(EXPERT_AXES) & set(equation.params.get("axis_name") or ()):
        return 0.0  # sums over data
    name = equation.primitive.name
    sizes = [v.aval.size * v.aval.dtype.itemsize for v in equation.outvars]
    if name in ("all_to_all", "all_gather", "all_gather_invariant"):
        return sum(sizes) * (degree - 1) / degree
    if name == "reduce_scatter":
        return sum(sizes) * (degree - 1)
    return 0.0


@pytest.mark.parametrize("config", TRACED.values(), ids=TRACED)
@pytest.mark.parametrize("both", [1, 2], ids=["expert", "expert_fsdp_2"])
@pytest.mark.parametrize("degree", [2, 4])
def test_exchange_bytes_are_those_of_the_traced_collectives(config, degree, both):
    mesh = make_mesh(MeshConfig(data=8 // degree, expert_fsdp=both, expert=degree // both))
    sizes, how = mesh_config(mesh), config.moe.transport_over(degree)
    jaxpr = _trace(config, mesh).jaxpr.jaxpr
    received = sum(_received(equation, degree) for equation in _first_round(jaxpr))
    assert received > 0
    expected = exchange_bytes(config, sizes, how) * local_tokens(config, sizes)
    assert received == pytest.approx(expected)


@pytest.mark.parametrize("degree", [2, 4])
def test_bytes_of_the_ragged_exchange(degree):
    """How many rows are sent depends on the routing; a row's bytes are in the trace.

    Balanced: of a device's T * k rows each device gets an equal part, and keeps its own.
    """
    config = _moe(DROPLESS, transport="ragged")
    mesh = make_mesh(MeshConfig(data=8 // degree, fsdp=1, expert=degree, tensor=1))
    sizes = mesh_config(mesh)
    tokens = local_tokens(config, sizes)
    row_bytes, gathered = 0, 0.0
    for equation in _first_round(_trace(config, mesh).jaxpr.jaxpr):
        made = equation.outvars[0].aval if equation.outvars else None
        if equation.primitive.name == "all_gather" and made.shape == (degree, tokens * 2):
            gathered += _received(equation, degree)
        if equation.primitive.name == "ragged_all_to_all":
            row = equation.outvars[0].aval
            row_bytes += row.size // row.shape[0] * row.dtype.itemsize
    assert row_bytes == 2 * 16 * 4  # the vector there and back
    assert gathered == tokens * 2 * 4 * (degree - 1)  # weights
    count_zz = jnp.full((degree, degree), tokens * 2 // degree, jnp.int32)
    size_zz = np.asarray(ragged_window(count_zz, 0, int(1.5 * 2 * tokens)).size)
    away = size_zz.sum(1) - np.diag(size_zz)
    expected = exchange_bytes(config, sizes, "ragged") * tokens
    np.testing.assert_allclose(away * row_bytes + gathered, expected)


def test_ragged_is_native_on_a_tpu_and_emulated_on_a_cpu():
    """The same traced layer, lowered for both: no all-gather of rows is left on a TPU."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=1, expert=2, tensor=1))
    traced = _trace(_moe(DROPLESS, transport="ragged"), mesh)
    text = {how: traced.lower(lowering_platforms=(how,)).as_text() for how in ("tpu", "cpu")}
    # Vectors, and the way back: in the first round and in the loop of further ones.
    assert text["tpu"].count("custom_call @ragged_all_to_all") == 4
    assert text["tpu"].count('"stablehlo.all_gather"') == 1 + 2  # the counts [Z], weights [T * k]
    assert "ragged_all_to_all" not in text["cpu"]
    assert text["cpu"].count('"stablehlo.all_gather"') == 1 + 2 + 4


def _shapes(equations, name: str) -> list[tuple[int, ...]]:
    return [e.outvars[0].aval.shape for e in equations if e.primitive.name == name]


@pytest.mark.parametrize("config", TRACED.values(), ids=TRACED)
def test_buffers_are_those_of_the_traced_layer(config):
    mesh = make_mesh(MESH)
    sizes = mesh_config(mesh)
    how = config.moe.transport_over(sizes.expert)
    equations = list(_first_round(_trace(config, mesh).jaxpr.jaxpr))
    held = buffer_rows(config, sizes, how)
    if how == "gather":
        gathered = local_tokens(config, sizes) * 2
        assert (gathered, 16) in _shapes(equations, "all_gather")
        assert (held - gathered, 16) in _shapes(equations, "gather")
    elif config.moe.capacity_factor is None and config.moe.router != "soft":
        exchanged = [s for s in _shapes(equations, "all_to_all") if len(s) == 2]
        assert exchanged == [(held // 2, 16)] * 2  # and the experts of rows [R]
    else:
        # [all experts, slots of every group of a device, D], there and back
        exchanged = [s for s in _shapes(equations, "all_to_all") if len(s) == 3]
        assert exchanged == [(8, held // 8, 16)] * 2
    assert gathered_weight_bytes(config, sizes) == 3 * 4 * (8 // 2) * 16 * (12 // 2)


@pytest.mark.parametrize("how", TRANSPORTS)
def test_where_one_device_holds_all_experts_no_slot_is_empty(how):
    """With capacity too: 4 sequences * 20 tokens * 2, and not 4 * 8 experts * 7 slots."""
    config = _moe(transport=how)
    mesh = make_mesh(ALONE)
    equations = list(_first_round(_trace(config, mesh).jaxpr.jaxpr))
    assert buffer_rows(config, mesh_config(mesh), how) == 160
    rows = {s[0] for s in _shapes(equations, "gather") if len(s) == 2 and s[1] == 16}
    assert max(rows) == 160
    names = {e.primitive.name for e in equations}
    assert not names & {"all_to_all", "ragged_all_to_all", "all_gather", "reduce_scatter"}


def test_buffers_of_the_ragged_exchange_are_those_of_the_traced_layer():
    config = _moe(DROPLESS, transport="ragged")
    mesh = make_mesh(MESH)
    equations = list(_first_round(_trace(config, mesh).jaxpr.jaxpr))
    shapes = [s for s in _shapes(equations, "ragged_all_to_all") if len(s) == 2]
    assert shapes == [(240, 16), (160, 16)]  # received, and back where they were sent from
    assert buffer_rows(config, mesh_config(mesh), "ragged") == 240 + 160
