"""The contract, in part: each way to the experts once, and the mutations that it must notice.

`make contract` checks every case in every way. Here every dispatch and transport meets every mesh
that splits the experts, each time with another case.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import contract, exchange, moe, reference, router_stats, routing
from moejax.config import MeshConfig
from moejax.errors import ConfigError
from moejax.mesh import make_mesh, single_device_mesh
from moejax.moe_config import MoEConfig, Router

MESHES = contract.meshes(8)


def _cells() -> list[tuple[str, str, str, MeshConfig]]:
    """Returns one (case, dispatch, transport, mesh) for each way, going round the cases."""
    names = list(contract.CASES)
    found, left = [], [names[7 * i % len(names)] for i in range(len(names))]
    for mesh, (dispatch, transport) in itertools.product(MESHES[1:], contract.DISPATCH):
        fits = (n for n in left if contract.case_config(n, dispatch, transport) is not None)
        name = next(fits)
        left.remove(name)
        found.append((name, dispatch, transport, mesh))
    return found


def _id(cell) -> str:
    name, dispatch, transport, _ = cell
    return f"{name} {dispatch} {transport}".replace(" ", "_").replace(",", "")


def _slow_unless_quick(cell):
    """The mesh with experts over four of eight devices waits for `make test-slow`."""
    marks = [pytest.mark.slow] if cell[3].expert == 4 else []
    return pytest.param(cell, marks=marks, id=_id(cell))


@pytest.mark.parametrize("cell", [_slow_unless_quick(cell) for cell in _cells()])
def test_a_case_is_the_oracle_in_value_and_every_gradient(cell):
    name, dispatch, transport, sizes = cell
    config = contract.case_config(name, dispatch, transport)
    layer = contract.make_layer(config)
    oracle = contract.run_layer(layer, None)
    ours = contract.run_layer(layer, make_mesh(sizes, jax.devices()[: sizes.num_devices]))
    worst, where = contract.difference(ours, oracle)
    assert worst <= contract.TOLERANCE, where
    assert np.abs(oracle["y"]).max() > 0
    assert oracle["dropped_e"].sum() > 0 or dispatch == "dropless" or name.startswith("mixture")


@pytest.mark.parametrize(
    ("name", "dispatch", "transport", "sizes"),
    [
        ("sigmoid_bias", "dropless", "ragged", (1, 1, 4, 2, 1)),
        ("softmax, all losses", "capacity", "all_to_all", (1, 2, 2, 2, 1)),
        ("softmax, gated shared expert", "capacity", "gather", (1, 1, 2, 2, 2)),
        pytest.param(
            "expert_choice", "dropless", "all_to_all", (2, 1, 2, 2, 1), marks=pytest.mark.slow
        ),
        pytest.param(
            "softmax, free experts", "capacity", "ragged", (1, 1, 1, 2, 1), marks=pytest.mark.slow
        ),
        pytest.param("noisy", "dropless", "gather", (1, 1, 2, 3, 1), marks=pytest.mark.slow),
    ],
)
def test_parts_of_sequences_are_the_oracle(name, dispatch, transport, sizes):
    """Over the context axis; routing is of whole sequences, of 6 tokens on 2 or 3 devices."""
    config = contract.case_config(name, dispatch, transport)
    layer = contract.make_layer(config)
    sizes = MeshConfig(*sizes)
    ours = contract.run_layer(layer, make_mesh(sizes, jax.devices()[: sizes.num_devices]))
    worst, where = contract.difference(ours, contract.run_layer(layer, None))
    assert worst <= contract.TOLERANCE, where


@pytest.mark.parametrize(
    "sizes",
    [
        MeshConfig(data=1, expert_fsdp=4, expert=2),
        pytest.param(MeshConfig(data=1, fsdp=2, expert_fsdp=4), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, expert_fsdp=2, expert=2), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, expert_fsdp=4, context=2), marks=pytest.mark.slow),
    ],
    ids=contract._mesh_name,
)
@pytest.mark.parametrize(
    ("dispatch", "transport"),
    [
        pytest.param(*way, marks=[pytest.mark.slow] if i % 3 else [])  # quick: by the all-to-all
        for i, way in enumerate(contract.DISPATCH)
    ],
)
def test_experts_over_both_axes_are_the_oracle(dispatch, transport, sizes):
    layer = contract.make_layer(contract.case_config("sigmoid_bias", dispatch, transport))
    ours = contract.run_layer(layer, make_mesh(sizes, jax.devices()[: sizes.num_devices]))
    worst, where = contract.difference(ours, contract.run_layer(layer, None))
    assert worst <= contract.TOLERANCE, where


def test_experts_in_another_order_than_their_weights_fail(monkeypatch):
    """Places counted along `expert` first: device 1 would take the tokens of another's expert."""

    def swapped():
        inner, outer = (jax.lax.axis_index(axis) for axis in ("expert_fsdp", "expert"))
        return outer * jax.lax.axis_size("expert_fsdp") + inner

    layer = contract.make_layer(contract.case_config("softmax", "dropless", "gather"))
    oracle = contract.run_layer(layer, None)
    monkeypatch.setattr(exchange, "_expert_index", swapped)
    ours = contract.run_layer(layer, make_mesh(MeshConfig(data=1, expert_fsdp=4, expert=2)))
    assert contract.difference(ours, oracle)[0] > 0.1


def test_every_router_is_a_case_and_every_way_is_here():
    cells = _cells()
    assert len({cell[0] for cell in cells}) == len(cells) == 18
    assert {cell[1:3] for cell in cells} == set(contract.DISPATCH)
    assert {sizes.expert for sizes in MESHES} == {1, 2, 4, 8}
    routers = {changes.get("router", "softmax") for changes in contract.CASES.values()}
    assert routers == set(Router.__args__)


@pytest.mark.parametrize(
    "name",
    [
        "sigmoid_bias",
        pytest.param("softmax, free experts", marks=pytest.mark.slow),
        pytest.param("threshold", marks=pytest.mark.slow),
        pytest.param("relu", marks=pytest.mark.slow),
        pytest.param("soft", marks=pytest.mark.slow),
    ],
)
def test_properties_hold(name):
    cells = list(contract.check_properties(name))
    assert [cell for cell in cells if not cell.passed] == []
    assert {"padding", "replay", "remat", "causality"} <= {cell.column for cell in cells}


# Mutations: each is a bug that a trainer has shipped, and makes a cell fail.


def _worst(name: str, column: str) -> float:
    layer = contract.make_layer(contract.case_config(name, "dropless", "gather"), training=False)
    plain = contract.run_layer(layer, single_device_mesh())
    return contract.PROPERTIES[column](layer, plain)


def test_a_flipped_bias_sign_fails(monkeypatch):
    right = contract.update_router_state

    def flipped(state, stats, config):
        moved = right(state, stats, config)
        return {"bias": 2 * state["bias"] - moved["bias"]}

    assert _worst("sigmoid_bias", "state") == 0
    monkeypatch.setattr(contract, "update_router_state", flipped)
    assert _worst("sigmoid_bias", "state") == math.inf


def test_a_bias_in_the_weight_fails(monkeypatch):
    right = routing.route

    def leaking(x_btd, weights, state, inputs, config):
        found = right(x_btd, weights, state, inputs, config)
        leak = jnp.take(state["bias"], found.expert_bts, mode="fill", fill_value=0)
        return found._replace(weight_bts=found.weight_bts + 0.01 * leak)

    assert _worst("sigmoid_bias", "weights") <= contract.TOLERANCE
    monkeypatch.setattr(contract, "route", leaking)
    assert _worst("sigmoid_bias", "weights") > 100 * contract.TOLERANCE


def test_a_dropped_renormalisation_fails(monkeypatch):
    right = routing.route

    def unnormalized(x_btd, weights, state, inputs, config):
        return right(
            x_btd,
            weights,
            state,
            inputs,
            contract.dataclasses.replace(config, normalize_weights=False),
        )

    monkeypatch.setattr(contract, "route", unnormalized)
    assert _worst("softmax", "weights") > 0.1


def test_counted_padding_fails(monkeypatch):
    right = router_stats.router_stats

    def counting(found, kept_bts, mask_bt, config):
        stats = right(found, kept_bts, mask_bt, config)
        return stats._replace(tokens=stats.tokens + stats.padding)

    monkeypatch.setattr(moe, "router_stats", counting)
    assert _worst("softmax", "padding") > 0.1


def test_a_missing_sum_over_tensor_fails(monkeypatch):
    """What varies over tensor may not leave `shard_map` as if it did not."""
    monkeypatch.setattr(exchange, "sum_tensor", lambda y: y)
    layer = contract.make_layer(contract.case_config("softmax", "dropless", "gather"))
    with pytest.raises(ValueError):  # noqa: PT011 - JAX's own, while tracing
        contract.run_layer(layer, make_mesh(MeshConfig(1, 2, 2, 1, 2)))


def test_a_reduce_scatter_that_does_not_sum_fails(monkeypatch):
    def first_part(y_td_global):
        degree = exchange.expert_degree()
        parts = y_td_global.reshape(degree, -1, *y_td_global.shape[1:])
        return parts[jax.lax.axis_index("expert")]

    layer = contract.make_layer(contract.case_config("softmax", "dropless", "gather"))
    oracle = contract.run_layer(layer, None)
    monkeypatch.setattr(exchange, "scatter_results", first_part)
    ours = contract.run_layer(layer, make_mesh(MeshConfig(2, 1, 4, 1, 1)))
    assert contract.difference(ours, oracle)[0] > 0.1


# What belongs to the layer beside the matrix


def test_replay_of_another_shape_is_refused():
    layer = contract.make_layer(contract.case_config("softmax", "dropless", "gather"))
    wrong = layer.inputs._replace(choice_bts=jnp.zeros((16, 6, 3), jnp.int32))
    for apply in (moe.apply_moe,):
        with pytest.raises(ConfigError, match=r"\(16, 6, 3\) and this layer needs .* \(16, 6, 2\)"):
            apply(
                layer.weights,
                layer.x_btd,
                wrong,
                {},
                config=layer.config,
                mesh=single_device_mesh(),
            )


def test_overflow_takes_rounds_and_drops_nothing():
    """Every token to experts 0 and 1 of eight devices: seven more rounds over the buffer."""
    for transport in ("all_to_all", "ragged", "gather"):
        config = MoEConfig(
            num_experts=8,
            expert_hidden=8,
            capacity_factor=None,
            transport=transport,
            buffer_factor=1.0,
        )
        layer = contract.make_layer(config)
        x_btd = layer.x_btd.copy()
        x_btd[..., 0] = 1
        router = np.zeros((8, 8), np.float32)
        router[0, :2] = 40, 30
        skewed = contract.dataclasses.replace(
            layer, x_btd=x_btd, weights={**layer.weights, "router": router}
        )
        oracle = contract.run_layer(skewed, None)
        ours = contract.run_layer(skewed, make_mesh(MeshConfig(1, 1, 8, 1, 1)))
        assert contract.difference(ours, oracle)[0] <= contract.TOLERANCE
        tokens = int(layer.inputs.mask_bt.sum())
        assert ours["count_e"].tolist() == [tokens, tokens, 0, 0, 0, 0, 0, 0]
        # A device gets `tokens` rows and holds 24; a part of the padded exchange holds 3.
        assert int(ours["overflow_rounds"]) == {"all_to_all": 3}.get(
            transport, -(-tokens // 24) - 1
        )


def test_fewer_rounds_with_a_larger_buffer():
    rounds = {}
    for factor in (1.0, 8.0):
        config = MoEConfig(
            num_experts=8,
            expert_hidden=8,
            capacity_factor=None,
            transport="all_to_all",
            buffer_factor=factor,
        )
        ours = contract.run_layer(contract.make_layer(config), make_mesh(MeshConfig(1, 1, 8, 1, 1)))
        rounds[factor] = int(ours["overflow_rounds"])
    assert rounds[1.0] > rounds[8.0] == 0


def test_reference_is_a_transport_too():
    layer = contract.make_layer(MoEConfig(num_experts=8, expert_hidden=8, transport="reference"))
    oracle = contract.run_layer(layer, None)
    ours = contract.run_layer(layer, single_device_mesh())
    assert contract.difference(ours, oracle)[0] == 0
    assert reference.ACTIVATIONS.keys() == {"swiglu", "geglu", "gelu", "relu", "squared_relu"}
