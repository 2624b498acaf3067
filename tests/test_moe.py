"""The MoE layer: equal to the dense oracle on every layout, and what must not change its result."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from moejax import exchange, moe, reference
from moejax.errors import ConfigError
from moejax.mesh import single_device_mesh
from moejax.moe_config import MoEConfig
from moejax.parameters import moe_parameters
from moejax.routing import RouterInputs

B, T, D, F, E = 16, 6, 8, 8, 8
RANDOM = np.random.default_rng(0)
X_BTD = RANDOM.normal(size=(B, T, D)).astype(np.float32)
Y_WEIGHT_BTD = RANDOM.normal(size=(B, T, D)).astype(np.float32)
SHAPES = {"router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
WEIGHTS = {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
# Ragged padding; row 4 is padding as a whole.
MASK_BT = np.arange(T) < np.array([6, 6, 3, 6, 0, 6, 6, 5, 6, 6, 6, 1, 2, 6, 6, 4])[:, None]


def _config(**changes) -> MoEConfig:
    return MoEConfig(**{"num_experts": E, "top_k": 2, "expert_hidden": F, **changes})


CONFIGS = {
    "dropless": _config(capacity_factor=None),
    "dropless, gather": _config(capacity_factor=None, transport="gather"),
    "token": _config(capacity_factor=1.0),
    "rank": _config(capacity_factor=0.5, priority="rank"),
    "gather": _config(capacity_factor=1.0, transport="gather", group_sequences=2),
}


@functools.cache
def _compiled(apply, name, mesh):
    """Returns the layer's value and gradients (weights, x) as one compiled function.

    Its objective reads the output, and the statistics that losses are made of.
    """

    def objective(weights, x_btd, mask_bt):
        y_btd, stats = apply(
            weights, x_btd, RouterInputs(mask_bt), {}, config=CONFIGS[name], mesh=mesh
        )[:2]
        value = jnp.sum(y_btd * Y_WEIGHT_BTD) + stats.z + stats.sequence_balance
        return value + jnp.sum(stats.probability_e**2), (y_btd, stats)

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))


def _named(result):
    """Returns what `_compiled` gives as NumPy arrays by name."""
    (_, (y_btd, stats)), (by_weights, by_x) = jax.tree.map(np.asarray, result)
    gradients = {f"gradient of {n}": g for n, g in by_weights.items()}
    sums = {n: v for n, v in stats._asdict().items() if n != "overflow_rounds"}
    return {"y": y_btd, **sums, **gradients, "gradient of x": by_x}


@functools.cache
def _oracle(name):
    return _named(_compiled(reference.apply_moe, name, None)(WEIGHTS, X_BTD, MASK_BT))


def _assert_equal(actual, expected):
    """Whole numbers are equal; the rest is within 2e-5 of the largest entry."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if np.issubdtype(value.dtype, np.integer):
            np.testing.assert_array_equal(actual[name], value, err_msg=name)
        else:
            scale = np.abs(value).max()
            np.testing.assert_allclose(actual[name], value, atol=2e-5 * scale, err_msg=name)


# Every axis of the mesh (data, fsdp, expert, tensor) is split; test_contract.py has more of them.
LAYOUTS = [
    ((1, 1, 1, 1), "dropless"),
    ((1, 1, 8, 1), "dropless"),
    ((1, 1, 8, 1), "token"),
    ((2, 2, 2, 1), "rank"),
    ((1, 2, 2, 2), "gather"),
    ((1, 1, 1, 8), "rank"),
    ((2, 1, 4, 1), "gather"),
]


@pytest.mark.parametrize(("shape", "name"), LAYOUTS)
def test_the_layer_is_the_oracle_in_value_and_gradients(mesh_of, shape, name):
    actual = _named(_compiled(moe.apply_moe, name, mesh_of(*shape))(WEIGHTS, X_BTD, MASK_BT))
    _assert_equal(actual, _oracle(name))
    assert actual["count_e"].sum() == 2 * MASK_BT.sum()
    assert actual["dropped_e"].sum() > 0 or name == "dropless"
    assert all(np.abs(v).max() > 0 for k, v in actual.items() if "gradient" in k)


def test_a_wrong_factor_is_noticed():
    """Expert gradients times the degree, a lost psum, one more drop, an output off by 0.01 %."""
    expected = _oracle("token")
    wrong = {
        "gradient of gate": expected["gradient of gate"] * 8,
        "z": expected["z"] / 8,
        "dropped_e": expected["dropped_e"] + np.eye(E, dtype=np.int32)[0],
        "y": expected["y"] * 1.0001,
    }
    for name, value in wrong.items():
        with pytest.raises(AssertionError, match=name):
            _assert_equal({**expected, name: value}, expected)


def test_statistics_are_the_same_on_every_device(mesh_of):
    """A sum that is replicated by name only would hold another value on each device."""
    _, stats = _compiled(moe.apply_moe, "rank", mesh_of(2, 2, 2, 1))(WEIGHTS, X_BTD, MASK_BT)[0][1]
    for name, value in stats._asdict().items():
        shards = [np.asarray(s.data) for s in value.addressable_shards]
        assert len(shards) == 8
        for shard in shards:
            np.testing.assert_array_equal(shard, shards[0], err_msg=name)


def test_experts_without_tokens_have_gradient_0(mesh_of):
    """Every token goes to experts 0 and 1, so six of eight devices have no work; nothing is NaN."""
    x_btd = X_BTD.copy()
    x_btd[..., 0] = 1
    router = np.zeros((D, E), np.float32)
    router[0, :2] = 40, 30
    weights = {**WEIGHTS, "router": router}
    for name in ("dropless", "token"):
        run = _compiled(moe.apply_moe, name, mesh_of(1, 1, 8, 1))
        result = _named(run(weights, x_btd, MASK_BT))
        np.testing.assert_array_equal(result["count_e"], [MASK_BT.sum()] * 2 + [0] * 6)
        for weight in ("gate", "up", "down"):
            gradient = result[f"gradient of {weight}"]
            assert np.isfinite(gradient).all()
            assert np.abs(gradient[:2]).max() > 0
            np.testing.assert_array_equal(gradient[2:], 0)


@pytest.mark.parametrize(
    ("shape", "batch", "group", "message"),
    [
        ((1, 1, 1, 1), 3, 2, r"a batch of 3 sequences is not a multiple of 2: .*sequences=2; fill"),
        (
            (2, 1, 4, 1),
            12,
            1,
            r"a batch of 12 sequences is not a multiple of 8: the mesh .* over 8",
        ),
        ((2, 1, 4, 1), 1, 2, r"a batch of 1 sequences is not a multiple of 2: .* over 1 devices"),
    ],
)
def test_a_batch_must_be_whole_groups_on_every_device(mesh_of, shape, batch, group, message):
    x_btd, mask_bt = np.zeros((batch, T, D), np.float32), np.ones((batch, T), bool)
    config = _config(capacity_factor=None, group_sequences=group)
    with pytest.raises(ConfigError, match=message):
        moe.apply_moe(
            WEIGHTS, x_btd, RouterInputs(mask_bt), {}, config=config, mesh=mesh_of(*shape)
        )


def test_a_batch_of_padding_gives_zeros(mesh_of):
    for name in ("dropless", "token"):
        run = _compiled(moe.apply_moe, name, mesh_of(1, 1, 8, 1))
        result = _named(run(WEIGHTS, X_BTD, np.zeros_like(MASK_BT)))
        assert result.pop("padding") == B * T
        for key, value in result.items():
            np.testing.assert_array_equal(value, 0, err_msg=key)


@functools.cache
def _layer(config):
    """Returns the layer on one device, compiled: (weights, x, mask) -> (y, stats) in NumPy."""
    run = jax.jit(functools.partial(moe.apply_moe, config=config, mesh=single_device_mesh()))

    def numpy_run(weights, x_btd, mask_bt):
        y_btd, stats, _ = run(weights, x_btd, RouterInputs(mask_bt), {})
        return jax.tree.map(np.asarray, (y_btd, stats))

    return numpy_run


@pytest.mark.parametrize("name", ["dropless", "token"])
def test_appended_padding_changes_nothing_on_real_tokens(name):
    """Three masked tokens and two rows of NaN: they take no slot, add to no sum, give 0."""
    layer = _layer(CONFIGS[name])
    y_btd, stats = layer(WEIGHTS, X_BTD, MASK_BT)
    widths = ((0, 2), (0, 3))
    x_btd = np.pad(X_BTD, (*widths, (0, 0)), constant_values=np.nan)
    more_btd, more_stats = layer(WEIGHTS, x_btd, np.pad(MASK_BT, widths))
    np.testing.assert_allclose(more_btd[:B, :T], y_btd, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(more_btd[B:], 0)
    np.testing.assert_array_equal(more_btd[:, T:], 0)
    assert more_stats.padding - stats.padding == (B + 2) * (T + 3) - B * T
    for field, before, after in zip(stats._fields, stats, more_stats, strict=True):
        if field != "padding":
            np.testing.assert_allclose(after, before, rtol=1e-6, err_msg=field)


@pytest.mark.parametrize("name", ["dropless", "token"])
def test_permuting_the_experts_permutes_only_the_counts(name):
    order = np.array([3, 0, 7, 1, 6, 2, 5, 4])
    permuted = {n: w[:, order] if n == "router" else w[order] for n, w in WEIGHTS.items()}
    y_btd, stats = _layer(CONFIGS[name])(WEIGHTS, X_BTD, MASK_BT)
    other_btd, other_stats = _layer(CONFIGS[name])(permuted, X_BTD, MASK_BT)
    np.testing.assert_allclose(other_btd, y_btd, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(other_stats.count_e, stats.count_e[order])
    np.testing.assert_array_equal(other_stats.dropped_e, stats.dropped_e[order])
    np.testing.assert_allclose(other_stats.sequence_balance, stats.sequence_balance, rtol=1e-5)


def test_permuting_tokens_permutes_the_result_where_nothing_is_dropped():
    """With capacity the order decides who is served, so there it must not hold (claim 0.14)."""
    order = np.array([4, 2, 0, 5, 1, 3])
    full_bt = np.ones_like(MASK_BT)

    def largest_difference(name):
        y_btd, _ = _layer(CONFIGS[name])(WEIGHTS, X_BTD, full_bt)
        other_btd, _ = _layer(CONFIGS[name])(WEIGHTS, X_BTD[:, order], full_bt)
        return np.abs(other_btd - y_btd[:, order]).max()

    assert largest_difference("dropless") < 1e-5
    assert largest_difference("token") > 0.1


# One sequence of two tokens whose vectors are their logits over experts A, B, C, D; one slot each.
CAUSAL = {p: _config(num_experts=4, capacity_factor=1.0, priority=p) for p in ("token", "rank")}


@pytest.mark.parametrize(("priority", "is_causal"), [("token", True), ("rank", False)])
def test_only_token_priority_is_causal(priority, is_causal):
    """Token 0 wants A and B.

    Token 1 wants C and D, or B and C; in the order of ranks that takes B away.
    """
    weights = {n: WEIGHTS[n][:4, :4] for n in ("gate", "up")}
    weights |= {"router": np.eye(4, dtype=np.float32), "down": WEIGHTS["down"][:4, :, :4]}
    earlier = [2.0, 1.0, 0.0, 0.0]
    y = {}
    for later in ((0.0, 0.0, 2.0, 1.0), (0.0, 2.0, 1.0, 0.0)):
        x_btd = np.array([[earlier, later]], np.float32)
        y[later], _ = _layer(CAUSAL[priority])(weights, x_btd, np.ones((1, 2), bool))
    first, second = (value[0, 0] for value in y.values())
    assert np.array_equal(first, second) == is_causal
    assert is_causal or np.abs(first - second).max() > 0.01


def test_a_sequence_that_is_its_own_group_depends_on_no_other():
    """Another row 0 leaves rows 1 to 15 as they were; in groups of two row 1 competes with it."""
    x_btd = X_BTD.copy()
    x_btd[0] = -x_btd[0]
    changed = {}
    for name in ("token", "gather"):
        layer = _layer(CONFIGS[name])
        before, after = (layer(WEIGHTS, x, MASK_BT)[0] for x in (X_BTD, x_btd))
        changed[name] = np.flatnonzero(np.abs(after - before).max((1, 2)) > 1e-4).tolist()
    assert changed == {"token": [0], "gather": [0, 1]}


def _router_gradient(config, weights):
    def loss(router):
        apply = functools.partial(moe.apply_moe, config=config, mesh=single_device_mesh())
        inputs = RouterInputs(MASK_BT[:2])
        y_btd, _, _ = apply({**weights, "router": router}, X_BTD[:2], inputs, {})
        return jnp.sum(y_btd * Y_WEIGHT_BTD[:2])

    return np.abs(jax.jit(jax.grad(loss))(weights["router"])).max()


def test_router_gradient_by_normalisation():
    """Identical experts, weights that sum to 1: the choice has no effect (claim 0.7)."""
    same = {n: w if n == "router" else np.repeat(w[:1], E, 0) for n, w in WEIGHTS.items()}
    normalized = _config(capacity_factor=None)
    assert _router_gradient(normalized, same) < 1e-4
    assert _router_gradient(normalized, WEIGHTS) > 1
    switch = _config(capacity_factor=None, top_k=1, normalize_weights=False)
    assert _router_gradient(switch, same) > 1


def test_module_draws_every_expert_differently():
    module = moe.MoE(_config(expert_hidden=64), 64, rngs=nnx.Rngs(0))
    for name, fan_in in (("gate", 64), ("up", 64), ("down", 64)):
        stack = np.asarray(getattr(module, name)[...])
        np.testing.assert_allclose(stack.std((1, 2)), fan_in**-0.5, rtol=0.1)
        for e in range(1, E):
            assert abs(np.corrcoef(stack[0].ravel(), stack[e].ravel())[0, 1]) < 0.1
    np.testing.assert_allclose(np.asarray(module.router[...]).std(), 0.1 * 64**-0.5, rtol=0.1)


def test_module_is_the_function_of_its_weights():
    """Without a mask nothing is padding; the router `sigmoid_bias` starts from a bias of 0."""
    module = moe.MoE(_config(router="sigmoid_bias"), D, rngs=nnx.Rngs(0))
    weights = {name: getattr(module, name)[...] for name in SHAPES}
    y_btd, stats = jax.jit(lambda x_btd: module(x_btd))(X_BTD)
    oracle = jax.jit(functools.partial(reference.apply_moe, config=module.config))
    inputs = RouterInputs(np.ones((B, T), bool))
    expected, _, _ = oracle(weights, X_BTD, inputs, {"bias": np.zeros(E, np.float32)})
    np.testing.assert_allclose(y_btd, expected, rtol=1e-4, atol=1e-6)
    assert int(stats.tokens) == B * T


@pytest.mark.parametrize("name", ["dropless", "token"])
def test_bfloat16_tokens_give_bfloat16_near_the_float32_result(name):
    layer = _layer(CONFIGS[name])
    rounded = jnp.asarray(X_BTD, jnp.bfloat16)
    y_btd, stats = layer(WEIGHTS, rounded, MASK_BT)
    assert y_btd.dtype == jnp.bfloat16
    assert stats.z.dtype == np.float32
    # routers round their weights too, so compare with rounded ones
    router = np.asarray(jnp.asarray(WEIGHTS["router"], jnp.bfloat16).astype(jnp.float32))
    expected, same = layer(
        {**WEIGHTS, "router": router}, np.asarray(rounded.astype(jnp.float32)), MASK_BT
    )
    np.testing.assert_array_equal(stats.count_e, same.count_e)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y_btd.astype(np.float32), expected, atol=0.03 * scale)


def _lowered(name, mesh, *, backward: bool) -> str:
    if backward:
        return _compiled(moe.apply_moe, name, mesh).lower(WEIGHTS, X_BTD, MASK_BT).as_text()
    apply = functools.partial(moe.apply_moe, config=CONFIGS[name], mesh=mesh)
    return jax.jit(apply).lower(WEIGHTS, X_BTD, RouterInputs(MASK_BT), {}).as_text()


def _collectives(text: str, kind: str) -> list[str]:
    """Returns the result shape, for example 8x8x8, of every `stablehlo.<kind>` in lowered text."""
    found = []
    for match in re.finditer(rf'"?stablehlo\.{kind}"?', text):
        shape = re.search(r"-> tensor<((?:\d+x)*)\w+>", text[match.end() :]).group(1)
        found.append(shape.removesuffix("x"))
    return found


@pytest.mark.parametrize("both", [1, 4], ids=["expert", "expert_fsdp_4"])
def test_tokens_take_two_all_to_alls_forward_and_two_backward(mesh_of, both):
    """Each device holds 2 sequences of 6 tokens: ceil(2 * 6 / 8) = 2 slots an expert and sequence.

    The buffer is [8 experts, 2 * 2 slots, D] at home and [1 expert, 8 * 4 slots, D] at the expert.
    The combine weight of each slot goes with it, and its gradient comes back. No expert is
    gathered: they are split by `expert_fsdp` as by `expert`.
    """
    mesh = mesh_of(1, 1, 8 // both, 1, expert_fsdp=both)
    forward = [f"8x4x{D}", "8x4", f"8x4x{D}"]
    assert _collectives(_lowered("token", mesh, backward=False), "all_to_all") == forward
    step = _collectives(_lowered("token", mesh, backward=True), "all_to_all")
    assert sorted(step) == sorted(2 * forward)
    for backward in (False, True):
        text = _lowered("token", mesh, backward=backward)
        assert _collectives(text, "all_gather") == []
        assert _collectives(text, "reduce_scatter") == []


def test_dropless_gathers_tokens_and_reduce_scatters_results(mesh_of):
    """All 16 * 6 tokens with their experts and weights come in; 2 * 6 results go home."""
    text = _lowered("dropless, gather", mesh_of(1, 1, 8, 1), backward=False)
    assert _collectives(text, "all_gather") == [f"96x{D}", "96x2", "96x2"]
    assert _collectives(text, "reduce_scatter") == [f"12x{D}"]
    assert _collectives(text, "all_to_all") == []


def test_fsdp_gathers_expert_weights_and_reduce_scatters_their_gradients(mesh_of):
    """Over fsdp no gradient of a whole stack is summed; over data only what the scatter left.

    An all-reduce of whole stacks would be 4 times the memory and the traffic. The router is
    replicated: its gradient is the only one that is summed over every device.
    """
    text = _lowered("token", mesh_of(2, 4, 1, 1), backward=True)
    whole, in_shards, out_shards = f"{E}x{D}x{F}", f"{E}x{D // 4}x{F}", f"{E}x{F}x{D // 4}"
    assert _collectives(text, "all_gather") == [whole] * 3
    scattered = sorted(_collectives(text, "reduce_scatter"))
    assert scattered == sorted([in_shards, in_shards, out_shards])
    summed = _collectives(text, "all_reduce")
    assert whole not in summed
    assert sorted(s for s in summed if s in scattered) == scattered
    assert summed.count(f"{D}x{E}") == 1


@pytest.mark.parametrize(
    ("experts", "gathered", "scattered"), [(1, "1x4x2x3", "1x1x2x3"), (2, "2x8x3", "2x2x3")]
)
def test_the_gradient_of_one_expert_is_scattered_over_a_dim_of_its_own(
    mesh_of, experts, gathered, scattered
):
    """Of one matrix [D, F] D would be outermost, and libtpu would sum all of it."""
    random = np.random.default_rng(0)
    w_edf = random.normal(size=(experts, 8, 3)).astype(np.float32)
    grad_zedf = random.normal(size=(4, experts, 8, 3)).astype(np.float32)

    def whole(w_edf):
        return exchange.gather_experts(w_edf, 1, jnp.float32)[None]

    every = jax.shard_map(
        whole, mesh=mesh_of(1, 4, 1, 1), in_specs=P(None, "fsdp"), out_specs=P("fsdp")
    )

    def both(w_edf, grad_zedf):
        w_zedf, transpose = jax.vjp(every, w_edf)
        return w_zedf, transpose(grad_zedf)[0]

    w_zedf, grad_edf = jax.jit(both)(w_edf, grad_zedf)
    np.testing.assert_array_equal(w_zedf, np.stack([w_edf] * 4))
    np.testing.assert_allclose(grad_edf, grad_zedf.sum(0), rtol=1e-5, atol=1e-6)
    text = jax.jit(both).lower(w_edf, grad_zedf).as_text()
    assert _collectives(text, "all_gather") == [gathered]
    assert _collectives(text, "reduce_scatter") == [scattered]


@st.composite
def _drawn_layers(draw):
    """A layer of any small shape, its mesh, and which tokens are real."""
    expert, fsdp = draw(st.sampled_from([(1, 1), (2, 2), (4, 1), (8, 1)]))
    num_experts = expert * draw(st.integers(1, 3))
    config = MoEConfig(
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(3, num_experts))),
        normalize_weights=False,
        expert_hidden=draw(st.integers(1, 5)),
        capacity_factor=draw(st.sampled_from([None, 0.3, 1.0, 2.5])),
        transport=draw(st.sampled_from(["all_to_all", "ragged", "gather"])),
        buffer_factor=draw(st.sampled_from([1.0, 1.5])),
    )
    tokens = draw(st.integers(1, 5))
    seed = draw(st.integers(0, 99))
    mask_bt = np.random.default_rng(seed).random((8, tokens)) < draw(st.sampled_from([0.3, 1.0]))
    return config, (1, fsdp, expert, 1), 2 * draw(st.integers(1, 3)), mask_bt


@settings(max_examples=5, derandomize=True, deadline=None, database=None)
@given(drawn=_drawn_layers())
def test_any_shape_is_the_oracle(mesh_of, drawn):
    """Odd widths, one expert a device, one token, capacity of one slot, sequences of padding."""
    config, shape, width, mask_bt = drawn
    random = np.random.default_rng(1)
    weights = {
        name: random.normal(size=p.shape).astype(np.float32)
        for name, p in moe_parameters(config, width).items()
    }
    x_btd = random.normal(size=(*mask_bt.shape, width)).astype(np.float32)

    def run(apply, mesh):
        def objective(weights, x_btd):
            y_btd, stats, _ = apply(
                weights, x_btd, RouterInputs(mask_bt), {}, config=config, mesh=mesh
            )
            return jnp.sum(y_btd**2) + stats.z, (y_btd, stats)

        gradient = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        return _named(jax.jit(gradient)(weights, x_btd))

    _assert_equal(run(moe.apply_moe, mesh_of(*shape)), run(reference.apply_moe, None))
