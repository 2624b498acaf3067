"""The expert networks, against a plain loop over experts in value and in every gradient."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from moejax import experts
from moejax.dispatch import sort_by_expert
from moejax.experts import (
    Weights,
    capacity_experts,
    capacity_modules,
    dropless_experts,
    dropless_modules,
    feed_forward,
)

D, F, R = 6, 10, 3
PLAIN = {
    "gelu": lambda h: jax.nn.gelu(h),
    "relu": lambda h: jnp.maximum(h, 0),
    "squared_relu": lambda h: jnp.maximum(h, 0) ** 2,
}


def _random(seed, *shapes):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def _weights(num_experts, activation="swiglu", scale=None, seed=0):
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= {"up": (num_experts, D, F), "down": (num_experts, F, D)}
    if activation in ("swiglu", "geglu"):
        shapes["gate"] = (num_experts, D, F)
    if scale == "output_scale":
        shapes["output_scale"] = (num_experts, D)
    if scale == "scale_out":
        shapes |= {"scale_in": (D, R), "scale_out": (num_experts, R, D)}
    return dict(zip(shapes, _random(seed, *shapes.values()), strict=True))


def _one_expert(weights: Weights, x_td, activation):
    """One expert's network, its weights without E (but `scale_in`), on every token."""
    up_tf = x_td @ weights["up"]
    if activation == "swiglu":
        gate_tf = x_td @ weights["gate"]
        hidden_tf = gate_tf / (1 + jnp.exp(-gate_tf)) * up_tf
    elif activation == "geglu":
        hidden_tf = jax.nn.gelu(x_td @ weights["gate"]) * up_tf
    else:
        hidden_tf = PLAIN[activation](up_tf)
    out_td = hidden_tf @ weights["down"]
    if "output_scale" in weights:
        out_td *= weights["output_scale"][None]
    if "scale_out" in weights:
        out_td *= jax.nn.sigmoid(x_td @ weights["scale_in"] @ weights["scale_out"])
    return out_td


def _per_expert(weights):
    return ({name: None if name == "scale_in" else 0 for name in weights},)


def _loop(x_td, expert_ts, weight_ts, weights, activation="swiglu"):
    """Expert after expert on every token, weighted by how the token chose it: 0 where not."""
    num_experts = weights["up"].shape[0]
    run = functools.partial(_one_expert, x_td=x_td, activation=activation)
    out_etd = jax.vmap(run, _per_expert(weights))(weights)
    chosen_ets = expert_ts[None] == jnp.arange(num_experts)[:, None, None]
    weight_et = jnp.where(chosen_ets, weight_ts[None], 0).sum(-1)
    return (weight_et[..., None] * out_etd).sum(0)


def _value_and_gradients(run, x_td, expert_ts, weight_ts, weights, dy_td):
    y_td, transpose = jax.vjp(lambda x, w, p: run(x, expert_ts, w, p), x_td, weight_ts, weights)
    return y_td, *transpose(dy_td)


def _compare(actual, expected, scale=1e-5):
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        atol = scale * max(1.0, float(np.abs(e).max()))
        np.testing.assert_allclose(a, e, rtol=0, atol=atol, err_msg=str(path))


def _routing(tokens, top_k, num_experts, seed=0):
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(num_experts)[:top_k] for _ in range(tokens)]).astype(
        np.int32
    )


def _with_padding(expert_ts, num_experts):
    expert_ts = expert_ts.copy()
    expert_ts[::3] = num_experts
    expert_ts[1, 0] = num_experts
    return expert_ts


ROUTINGS = {  # name: expert_ts, number of experts
    "balanced": (_routing(40, 2, 4), 4),
    "a third is padding": (_with_padding(_routing(40, 2, 4), 4), 4),
    "one expert has all": (np.full((50, 1), 2, np.int32), 4),
    "last expert and padding": (np.where(np.arange(50)[:, None] % 2, 3, 4).astype(np.int32), 4),
    "nothing at all": (np.full((9, 2), 3, np.int32), 3),
    "one expert": (np.zeros((7, 1), np.int32), 1),
    "every token chooses every expert": (_routing(9, 5, 5), 5),
    "256 experts, most empty": (_routing(6, 2, 256), 256),
    "one token": (_routing(1, 2, 8), 8),
    "one expert has all of many": (np.full((400, 1), 2, np.int32), 4),  # several parts on a TPU
}


def _elsewhere(monkeypatch):
    """Takes the branch of platforms other than a CPU; rows that no expert owns become NaN there."""

    ragged_dot = lax.ragged_dot

    @jax.custom_vjp
    def poisoned(x_rd, w_edf, group_sizes):
        return _poison(ragged_dot(x_rd, w_edf, group_sizes), group_sizes)

    def forward(x_rd, w_edf, group_sizes):
        return poisoned(x_rd, w_edf, group_sizes), (x_rd, w_edf, group_sizes)

    def backward(saved, dy_rf):
        x_rd, w_edf, group_sizes = saved
        _, transpose = jax.vjp(lambda x, w: ragged_dot(x, w, group_sizes), x_rd, w_edf)
        unpoisoned = jnp.where(_owned(dy_rf, group_sizes), dy_rf, 0)  # an undefined row is not read
        dx_rd, dw_edf = transpose(unpoisoned)
        return _poison(dx_rd, group_sizes), dw_edf, None

    poisoned.defvjp(forward, backward)

    def choose(*operands, default, **branches):
        assert set(branches) == {"cpu", "cuda", "rocm"}
        return default(*operands)

    monkeypatch.setattr(lax, "platform_dependent", choose)
    monkeypatch.setattr(lax, "ragged_dot", poisoned)


def _owned(x_rd, group_sizes):
    return jnp.arange(x_rd.shape[0])[:, None] < group_sizes.sum()


def _poison(x_rd, group_sizes):
    return jnp.where(_owned(x_rd, group_sizes), x_rd, jnp.nan)


def _check(routing, num_experts, activation, scale, monkeypatch, **options):
    """Both platforms against the loop. Tokens with no assignment hold NaN, and so does dy."""
    x_td, dy_td, weight_ts = _random(1, *[(routing.shape[0], D)] * 2, routing.shape)
    weights = _weights(num_experts, activation, scale)
    loop = functools.partial(_value_and_gradients, functools.partial(_loop, activation=activation))
    expected = jax.jit(loop)(x_td, routing, weight_ts, weights, dy_td)
    alone_t1 = (routing == num_experts).all(1, keepdims=True)
    x_td, dy_td = (np.where(alone_t1, np.float32(np.nan), a) for a in (x_td, dy_td))
    run = functools.partial(dropless_experts, activation=activation, **options)
    count_e = np.bincount(routing.reshape(-1), minlength=num_experts + 1)[:num_experts]
    for platform in ("cpu", "elsewhere"):
        with monkeypatch.context() as patch:
            if platform == "elsewhere":
                _elsewhere(patch)
            gradients = jax.jit(functools.partial(_value_and_gradients, run))
            actual = gradients(x_td, routing, weight_ts, weights, dy_td)
        _compare(actual, expected)
        used_e = np.any(np.asarray(actual[3]["down"]), axis=(1, 2))
        np.testing.assert_array_equal(used_e, count_e > 0)


@pytest.mark.parametrize(("expert_ts", "num_experts"), ROUTINGS.values(), ids=ROUTINGS)
def test_dropless_experts_are_a_loop_over_experts(expert_ts, num_experts, monkeypatch):
    rows = max(1, int((expert_ts < num_experts).sum()))
    _check(expert_ts, num_experts, "swiglu", None, monkeypatch, rows=rows)


@pytest.mark.parametrize("scale", [None, "output_scale", "scale_out"])
def test_rows_in_order_are_not_sorted_again(scale, monkeypatch):
    """What is returned and asked of rows without an assignment, the last ones, means nothing."""
    expert_ts = np.repeat(np.arange(4, dtype=np.int32), [5, 0, 9, 3])[:, None]
    used_t1 = expert_ts < 3
    x_td, dy_td, weight_ts = _random(1, (17, D), (17, D), (17, 1))
    x_td, weight_ts = np.where(used_t1, x_td, 0), np.where(used_t1, weight_ts, 0)
    dy_td = np.where(used_t1, dy_td, 0)
    weights = _weights(3, scale=scale)
    expected = _value_and_gradients(_loop, x_td, expert_ts, weight_ts, weights, dy_td)
    _elsewhere(monkeypatch)
    if scale != "scale_out":
        monkeypatch.setattr(experts, "grouped_slots", None)
    run = functools.partial(dropless_experts, activation="swiglu", rows=17, in_order=True)
    gradients = jax.jit(functools.partial(_value_and_gradients, run))
    actual = gradients(x_td, expert_ts, weight_ts, weights, dy_td)
    rows = [np.where(used_t1, a, 0) for a in actual[:3]]
    _compare([*rows, actual[3]], [*expected])


def test_an_expert_with_more_rows_than_expected_takes_further_parts(monkeypatch):
    """On a TPU its first 64 rows, since 4 experts expect 50 +- 7, and 21 times 16 of 400."""
    monkeypatch.setattr(experts, "TILE_ROWS", 8)
    expert_ts = np.full((400, 1), 2, np.int32)
    _check(expert_ts, 4, "swiglu", None, monkeypatch, rows=400, expected_rows=200)


VARIANTS = [(name, None) for name in ("geglu", "gelu", "relu", "squared_relu")]
VARIANTS += [("swiglu", "output_scale"), ("swiglu", "scale_out")]


def test_a_token_of_no_expert_changes_no_shared_weight(monkeypatch):
    routing = _with_padding(_routing(40, 2, 4), 4)
    rows = int((routing < 4).sum())
    _check(routing, 4, "swiglu", "scale_out", monkeypatch, rows=rows)


@pytest.mark.parametrize(("activation", "scale"), VARIANTS)
def test_every_activation_and_scale(activation, scale, monkeypatch):
    """16 of 40 assignments go to expert 0 and the head has 8 rows: the CPU's tail is used too."""
    expert_ts = np.stack([np.arange(20) % 5 // 4, 1 + np.arange(20) % 3], 1).astype(np.int32)
    expert_ts[4::5, 1] = 3
    assert experts._plan(20, 4, 16, 1).head == 8
    _check(expert_ts, 4, activation, scale, monkeypatch, rows=40, expected_rows=16)


def _in_parts(monkeypatch):
    """Takes the hidden width of 10 in 5 parts."""
    monkeypatch.setattr(experts, "LANES", 2)
    monkeypatch.setattr(experts, "HIDDEN_BYTES", 1)
    assert experts._width_parts(F, 1) == 5


@pytest.mark.parametrize(("activation", "scale"), [*VARIANTS[1:], ("swiglu", None)])
def test_a_hidden_width_in_parts_changes_nothing(activation, scale, monkeypatch):
    _in_parts(monkeypatch)
    _check(_routing(20, 2, 4), 4, activation, scale, monkeypatch, rows=40)


def test_the_parts_of_a_hidden_width_are_whole_lanes(monkeypatch):
    monkeypatch.setattr(experts, "HIDDEN_BYTES", 1 << 28)
    # Mixtral 8x7B on a pod: 4 parts of 3,584 columns of 36,864 rows in bfloat16, 7 of 2,048
    assert [experts._width_parts(14336, 2 * rows) for rows in (36864, 40960)] == [4, 7]
    assert experts._width_parts(14336, 1) == 1
    assert experts._width_parts(100, 1 << 30) == 1  # no part of it has whole lanes


@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("scale", [None, "output_scale", "scale_out"])
def test_capacity_experts_run_each_network_on_its_rows(scale, weighted, parts, monkeypatch):
    """And weight what it gives for them: by the config's networks, and by modules of one's own."""
    if parts > 1:
        _in_parts(monkeypatch)
    buf_ecd, dy_ecd, weight_ec = _random(3, (3, 5, D), (3, 5, D), (3, 5))
    weights = _weights(3, "swiglu", scale)
    if not weighted:
        weight_ec = None

    def loop(buf_ecd, weight_ec, weights):
        run = functools.partial(_one_expert, activation="swiglu")
        out_ecd = jax.vmap(run, (*_per_expert(weights), 0))(weights, buf_ecd)
        return out_ecd if weight_ec is None else out_ecd * weight_ec[..., None]

    def modules(buf_ecd, weight_ec, weights):
        def apply_one(params, x_rd):
            return _one_expert(params, x_rd, "swiglu")

        return capacity_modules(buf_ecd, weight_ec, weights, apply_one)

    run = functools.partial(capacity_experts, activation="swiglu")
    runs = (run, modules) if scale != "scale_out" else (run,)  # scale_in is of no one expert
    expected = _jit_vjp(loop)(buf_ecd, weight_ec, weights, dy_ecd)
    for actual in (_jit_vjp(f)(buf_ecd, weight_ec, weights, dy_ecd) for f in runs):
        _compare(actual, expected)


def _jit_vjp(function):
    def value_and_gradients(x, weight, weights, dy):
        y, transpose = jax.vjp(function, x, weight, weights)
        return y, *transpose(dy)

    return jax.jit(value_and_gradients)


def test_modules_of_ones_own_are_a_loop_over_experts():
    """SwiGLU written as somebody's own expert, on the routing that fills the tail."""
    expert_ts = np.full((50, 1), 2, np.int32)
    x_td, dy_td, weight_ts = _random(4, (50, D), (50, D), (50, 1))
    weights = _weights(4)

    def run(x_td, expert_ts, weight_ts, weights):
        def apply_one(params, x_rd):
            return feed_forward(x_rd, params, "swiglu")

        return dropless_modules(x_td, expert_ts, weight_ts, weights, apply_one, rows=50)

    arguments = (x_td, expert_ts, weight_ts, weights, dy_td)
    actual = jax.jit(functools.partial(_value_and_gradients, run))(*arguments)
    _compare(actual, jax.jit(functools.partial(_value_and_gradients, _loop))(*arguments))


def _dropless(x_td, expert_ts, weight_ts, weights):
    return dropless_experts(x_td, expert_ts, weight_ts, weights, activation="swiglu", rows=40)


def test_the_weight_gradient_is_summed_in_float32():
    """600 rows of ones to one expert, most of them in the tail: in bfloat16 a sum stops at 256."""
    weights = {"up": np.stack([np.eye(D)] * 2), "down": np.ones((2, D, D))}
    weights = {name: jnp.asarray(w, jnp.bfloat16) for name, w in weights.items()}
    x_td = jnp.ones((600, D), jnp.bfloat16)
    expert_ts, weight_ts = np.ones((600, 1), np.int32), np.ones((600, 1), np.float32)
    run = functools.partial(dropless_experts, activation="relu", rows=600)
    y_td, dx_td, _, dweights = jax.jit(functools.partial(_value_and_gradients, run))(
        x_td, expert_ts, weight_ts, weights, x_td
    )
    assert y_td.dtype == dx_td.dtype == dweights["down"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(y_td.astype(jnp.float32), np.full((600, D), D))
    np.testing.assert_array_equal(dweights["down"][0].astype(jnp.float32), np.zeros((D, D)))
    np.testing.assert_array_equal(dweights["down"][1].astype(jnp.float32), np.full((D, D), 600))


def test_dropless_experts_under_vmap_scan_and_checkpoint():
    """Two seeds side by side give what each gives alone; so do scan and checkpoint around it."""
    expert_nts = np.stack([_routing(20, 2, 4), np.full((20, 2), 4)]).astype(np.int32)
    expert_nts[1, :, 0] = 3
    x_ntd, dy_ntd, weight_nts = _random(5, (2, 20, D), (2, 20, D), (2, 20, 2))
    weights = jax.tree.map(lambda a, b: np.stack([a, b]), _weights(4), _weights(4, seed=6))
    run = functools.partial(_value_and_gradients, _dropless)
    again = functools.partial(_value_and_gradients, jax.checkpoint(_dropless))
    arguments = (x_ntd, expert_nts, weight_nts, weights, dy_ntd)
    both = jax.jit(jax.vmap(run))(*arguments)
    scanned = jax.jit(lambda *a: lax.scan(lambda _, x: (None, again(*x)), None, a)[1])(*arguments)
    for seed in range(2):
        alone = jax.jit(run)(*(jax.tree.map(lambda a, n=seed: a[n], arguments)))
        _compare(jax.tree.map(lambda a, n=seed: a[n], both), alone)
        _compare(jax.tree.map(lambda a, n=seed: a[n], scanned), alone)


def test_dropless_experts_inside_shard_map(mesh_of):
    """Tokens differ over `data` and weights do not: the gradients of the weights are summed."""
    mesh = mesh_of(2, 1, 1, 1)
    expert_ts = _routing(40, 2, 4)
    x_td, dy_td, weight_ts = _random(7, (40, D), (40, D), (40, 2))
    tokens = P("data")
    sharded = jax.shard_map(
        _dropless, mesh=mesh, in_specs=(tokens, tokens, tokens, P()), out_specs=tokens
    )
    arguments = (x_td, expert_ts, weight_ts, _weights(4), dy_td)
    actual = jax.jit(functools.partial(_value_and_gradients, sharded))(*arguments)
    _compare(actual, jax.jit(functools.partial(_value_and_gradients, _loop))(*arguments))


def test_the_tail_has_the_blocks_that_the_routing_needs():
    """Of 8 experts expert 5 has 20 assignments and expert 6 has 9; 8 of each are in the head."""
    expert_ts = np.array([5] * 20 + [6] * 9, np.int32)[:, None]
    groups = sort_by_expert(jnp.asarray(expert_ts), 8)
    plan = experts._Plan(head=8, block=8, chunks=1)
    np.testing.assert_array_equal(experts._tail_blocks(groups, plan), [0, 0, 0, 0, 0, 2, 1, 0])
    expected = [(5, range(8, 16)), (5, [*range(16, 20), *[29] * 4]), (6, [28, *[29] * 7])]
    for n, (expert, assignments) in enumerate(expected):
        assignment_1b, e = experts._tail_block(groups, plan, n, 29)
        assert int(e) == expert
        np.testing.assert_array_equal(assignment_1b[0], list(assignments))


def test_the_head_follows_the_expected_load():
    """512 rows an expert need 512 + 2 * 22.6, 32 need 32 + 2 * 5.7; 1 has no head."""
    row_bytes = 4 * (512 + 1024)
    assert experts._plan(2048, 8, 4096, row_bytes).head == 560
    assert experts._plan(2048, 128, 4096, row_bytes) == experts._Plan(48, 8, 1)
    assert experts._plan(1, 8, 2, row_bytes) == experts._Plan(0, 8, 1)
    assert experts._plan(20, 8, 400, row_bytes).head == 20  # no expert has more rows than tokens
    assert experts._plan(2048, 64, 2**15, 4 * (512 + 128)).chunks > 1


def test_chunks_of_the_head_change_nothing(monkeypatch):
    monkeypatch.setattr(experts, "CHUNK_ROWS", 1)
    monkeypatch.setattr(experts, "CHUNK_BYTES", 1000)
    x_td, dy_td, weight_ts = _random(8, (20, D), (20, D), (20, 2))
    arguments = (x_td, _routing(20, 2, 4), weight_ts, _weights(4), dy_td)
    assert experts._plan(20, 4, 40, 4 * (D + F)).chunks == 4
    actual = jax.jit(functools.partial(_value_and_gradients, _dropless))(*arguments)
    _compare(actual, jax.jit(functools.partial(_value_and_gradients, _loop))(*arguments))


def test_a_gpu_without_tokamax_is_warned_once(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    experts._tokamax_ragged_dot.cache_clear()
    x_rd, w_edf = _random(9, (8, D), (2, D, F))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out_rf = experts._gpu_grouped_matmul(x_rd, w_edf, np.array([8, 0], np.int32))
    np.testing.assert_allclose(out_rf, x_rd @ w_edf[0], rtol=1e-4, atol=1e-5)
    assert [record.message for record in caplog.records] == [experts.NO_TOKAMAX]
    experts._tokamax_ragged_dot.cache_clear()
