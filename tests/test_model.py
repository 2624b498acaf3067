"""The decoder: what a token may depend on, and that stacking, scanning and remat change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.attention import Attention, packed_tokens, rope
from moejax.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig
from moejax.flops import parameter_counts
from moejax.model import REMAT_POLICIES, LayerRouting, Run
from moejax.router_state import initial_router_state
from moejax.sharding import path_name
from moejax.state import model_graph, split_model
from moejax.step import parameter_group

B, T, V = 2, 10, 24
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
    moe=MoEConfig(num_experts=4, top_k=2, expert_hidden=12, capacity_factor=1.0),
    data=DataConfig(sequence_length=T),
    train=TrainConfig(batch_size=B),
)
# Distinct tokens in each row, so that a row of the embedding belongs to one position.
TOKEN_BT = np.array([np.arange(T), np.arange(T)[::-1] + 12], np.int32)
# Row 0 is one document. Row 1: two documents and two positions of padding.
SEGMENT_BT = np.array([[1] * T, [1, 1, 1, 2, 2, 2, 2, 2, 0, 0]], np.int32)


def _with(model=None, moe=None) -> Config:
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, **(model or {})),
        moe=dataclasses.replace(CONFIG.moe, **(moe or {})),
    )


def _forward(config, mesh, params, token_bt, segment_bt):
    model = nnx.merge(model_graph(config, mesh), params)
    out = model(token_bt, packed_tokens(segment_bt), {})
    return model, out.hidden_btd, out.stats


@functools.cache
def _hidden(config, mesh):
    """Returns the compiled `(params, tokens, segments) -> hidden states`."""
    return jax.jit(lambda *a: _forward(config, mesh, *a)[1])


@functools.cache
def _gradient(config, mesh):
    """Returns the compiled value and gradient of a function of the logits and all losses' sums."""

    def objective(params, token_bt, segment_bt):
        model, hidden_btd, stats = _forward(config, mesh, params, token_bt, segment_bt)
        value = jnp.mean(jnp.sin(model.unembed(hidden_btd)))
        return value + 0 if stats is None else value + stats.z.sum() + stats.sequence_balance.sum()

    return jax.jit(jax.value_and_grad(objective))


def _influences(mesh, params_of) -> np.ndarray:
    """Returns bool [B, query T, key T]: whether a hidden state has a gradient of a token."""

    @jax.jit
    def by_embedding(params, b, t):
        def probe(embedding):
            changed = {**params, "embedding": embedding}
            hidden_btd = _forward(CONFIG, mesh, changed, TOKEN_BT, SEGMENT_BT)[1]
            return jnp.sum(jnp.sin(hidden_btd[b, t] * jnp.arange(1.0, 17.0)))

        return jax.grad(probe)(params["embedding"])

    influences = np.zeros((B, T, T), bool)
    for b in range(B):
        for t in range(T):
            gradient_vd = np.asarray(by_embedding(params_of(CONFIG, mesh), b, t))
            influences[b, t] = np.any(gradient_vd[TOKEN_BT[b]] != 0, axis=-1)
            other_row = gradient_vd[TOKEN_BT[1 - b]]
            np.testing.assert_array_equal(other_row, 0)
    return influences


def test_a_token_depends_on_its_own_document_up_to_itself(mesh, params_of):
    """By gradient: all earlier tokens of the document, no later one, no other document."""
    t = np.arange(T)
    causal = t[:, None] >= t[None, :]
    same = SEGMENT_BT[:, :, None] == SEGMENT_BT[:, None, :]
    np.testing.assert_array_equal(_influences(mesh, params_of), same & causal)


def test_a_later_token_takes_no_slot_from_an_earlier_one(mesh, params_of):
    """What a gradient does not see: whether a token is dropped.

    Change token 6, compare all before it.
    """
    token_bt = TOKEN_BT.copy()
    token_bt[0, 6] = V - 1
    run = _hidden(CONFIG, mesh)
    before, after = (
        np.asarray(run(params_of(CONFIG, mesh), tokens, SEGMENT_BT))
        for tokens in (TOKEN_BT, token_bt)
    )
    np.testing.assert_array_equal(after[0, :6], before[0, :6])
    np.testing.assert_array_equal(after[1], before[1])
    assert (np.abs(after[0, 6:] - before[0, 6:]).max(-1) > 1e-4).all()


def test_attention_by_the_textbook(mesh, params_of):
    """Two query heads share a key head; a softmax over the visible keys, written with loops."""
    attention = nnx.merge(
        nnx.split(nnx.eval_shape(lambda: Attention(CONFIG, mesh, rngs=nnx.Rngs(0))))[0],
        jax.tree.map(lambda leaf: leaf[0], params_of(CONFIG, mesh)["runs"]["layer_0"]["attention"]),
    )
    x_btd = np.random.default_rng(0).normal(size=(B, T, 16)).astype(np.float32)
    tokens = packed_tokens(jnp.asarray(SEGMENT_BT))
    actual = jax.jit(lambda x: attention(x, tokens, None)[0])(x_btd)

    def heads(weight, norm):
        y = np.einsum("btd,dhk->bthk", x_btd, np.asarray(weight[...]))
        return y if norm is None else y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)

    def turn(y):
        angle = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(2) / 2)
        turned = (y[..., :2] + 1j * y[..., 2:]) * np.exp(1j * angle)[None, :, None]
        return np.concatenate([turned.real, turned.imag], -1)

    q = turn(heads(attention.query, "norm"))
    k, v = turn(heads(attention.key, "norm")), heads(attention.value, None)
    expected = np.zeros((B, T, 16))
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(t + 1) if SEGMENT_BT[b, s] == SEGMENT_BT[b, t]]
            for h in range(4):
                score = np.array([q[b, t, h] @ k[b, s, h // 2] / 2 for s in seen])
                p = np.exp(score) / np.exp(score).sum()
                mixed = sum(p_s * v[b, s, h // 2] for p_s, s in zip(p, seen, strict=True))
                expected[b, t] += mixed @ np.asarray(attention.output[...])[h]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_rope_scores_depend_on_the_distance_alone():
    x_bthk = np.random.default_rng(0).normal(size=(1, 2, 1, 8)).astype(np.float32)

    def score(first, second):
        turned = rope(x_bthk, jnp.array([[first, second]]), 100.0)
        return jnp.sum(turned[0, 0] * turned[0, 1])

    np.testing.assert_allclose(score(5, 2), score(13, 10), rtol=1e-4)
    assert abs(score(5, 2) - score(5, 1)) > 1e-3
    np.testing.assert_allclose(rope(x_bthk, jnp.zeros((1, 2), jnp.int32), 100.0), x_bthk)


def test_scanned_layers_are_the_layers_one_by_one(mesh, params_of):
    """A dense prefix of one layer, then two runs of a dense and a sparse layer."""
    config = _with({"num_layers": 5}, {"every": 2, "first_dense": 1, "capacity_factor": None})
    params = params_of(config, mesh)
    tokens = packed_tokens(jnp.asarray(SEGMENT_BT))

    @jax.jit
    def one_by_one(params, x_btd):
        def layers(stack, kinds):
            graph = nnx.split(nnx.eval_shape(lambda: Run(config, mesh, kinds, rngs=nnx.Rngs(0))))[0]
            for i in range(jax.tree.leaves(params[stack])[0].shape[0]):
                layer = jax.tree.map(lambda leaf, i=i: leaf[i], params[stack])
                yield nnx.merge(graph, layer)

        counts = []
        for run in (*layers("prefix", (False,)), *layers("runs", (False, True))):
            routing = LayerRouting({}, jnp.int32(len(counts)), jnp.asarray(TOKEN_BT), None)
            x_btd, routed, _ = run(x_btd, tokens, routing, None)
            counts += [] if routed is None else [routed[0].count_e]
        x_btd *= jax.lax.rsqrt(jnp.mean(x_btd**2, -1, keepdims=True) + 1e-6)
        return x_btd, counts

    expected, counts = one_by_one(params, params["embedding"][TOKEN_BT])
    actual, stats = jax.jit(lambda *a: _forward(config, mesh, *a)[1:])(params, TOKEN_BT, SEGMENT_BT)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stats.count_e, counts)
    assert stats.count_e.shape == (2, 4)


def test_remat_changes_neither_the_loss_nor_a_gradient(mesh, params_of):
    plain, gradient = _gradient(CONFIG, mesh)(params_of(CONFIG, mesh), TOKEN_BT, SEGMENT_BT)
    for policy in REMAT_POLICIES:
        run = _gradient(_with({"remat": policy}), mesh)
        value, remat_gradient = run(params_of(CONFIG, mesh), TOKEN_BT, SEGMENT_BT)
        np.testing.assert_allclose(value, plain, rtol=1e-6)
        for (path, expected), actual in zip(
            jax.tree_util.tree_leaves_with_path(gradient),
            jax.tree.leaves(remat_gradient),
            strict=True,
        ):
            atol = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(actual, expected, atol=atol, err_msg=path_name(path))


def test_remat_recomputes(mesh, params_of):
    """Otherwise the test above compares a thing with itself: every policy gives another program."""
    arguments = (params_of(CONFIG, mesh), TOKEN_BT, SEGMENT_BT)
    programs = {
        policy: str(jax.make_jaxpr(_gradient(_with({"remat": policy}), mesh))(*arguments)).count(
            "dot_general"
        )
        for policy in ("none", *REMAT_POLICIES)
    }
    assert programs["none"] < programs["dots_with_no_batch_dims"] < programs["full"], programs


# What a router reads besides the tokens' vectors


def _routed(config, mesh, params, token_bt, router_state, key_b=None, choice_lbts=None):
    """Returns hidden states and choices."""

    @jax.jit
    def run(params, token_bt, router_state, key_b, choice_lbts):
        model = nnx.merge(model_graph(config, mesh), params)
        tokens = packed_tokens(jnp.asarray(SEGMENT_BT), key_b)
        return model(token_bt, tokens, router_state, choice_lbts=choice_lbts)

    out = run(params, token_bt, router_state, key_b, choice_lbts)
    return np.asarray(out.hidden_btd), np.asarray(out.choice_lbts)


def test_token_ids_and_the_table_of_its_own_layer_reach_a_router(mesh, params_of):
    config = _with(moe={"router": "hash", "capacity_factor": None})
    state = initial_router_state(config.moe, 2, V)
    _, choice_lbts = _routed(config, mesh, params_of(config, mesh), TOKEN_BT, state)
    expected = np.where((SEGMENT_BT > 0)[None, ..., None], state["table"][:, TOKEN_BT], 4)
    np.testing.assert_array_equal(choice_lbts, expected)
    assert (choice_lbts[0] != choice_lbts[1]).any()


def test_random_choices_depend_on_sequence_and_layer_alone(mesh, params_of):
    """Keys of rows, folded with the layer's number; without keys they are the same every time."""
    config = _with(moe={"router": "random", "capacity_factor": None})
    params = params_of(config, mesh)
    key_b = np.array([[1, 2], [3, 4]], np.uint32)
    run = functools.partial(_routed, config, mesh, params)
    _, choices = run(TOKEN_BT, {}, key_b)
    assert (choices[0] != choices[1]).any()
    assert (choices[:, 0, :8] != choices[:, 1, :8]).any()
    _, swapped = run(TOKEN_BT, {}, key_b[::-1])
    np.testing.assert_array_equal(swapped[:, 0, :8], choices[:, 1, :8])
    _, other_tokens = run(TOKEN_BT[::-1], {}, key_b)
    np.testing.assert_array_equal(other_tokens, choices)
    evaluated = [run(TOKEN_BT, {})[1] for _ in range(2)]
    np.testing.assert_array_equal(*evaluated)
    assert (evaluated[0] != choices).any()


def test_choices_that_are_replayed_are_used_in_their_own_layer(mesh, params_of):
    """The router's own give the same; those of the other layer, or others, do not."""
    config = _with(moe={"capacity_factor": None})
    run = functools.partial(_routed, config, mesh, params_of(config, mesh), TOKEN_BT, {})
    hidden_btd, choices = run()
    assert choices.shape == (2, B, T, 2)
    again_btd, same = run(choice_lbts=choices)
    np.testing.assert_allclose(again_btd, hidden_btd, rtol=1e-6)
    np.testing.assert_array_equal(same, choices)
    swapped_btd, swapped = run(choice_lbts=choices[::-1])
    np.testing.assert_array_equal(swapped, choices[::-1])
    assert np.abs(swapped_btd - hidden_btd).max() > 1e-3


def test_a_dense_model_has_neither_routing_sums_nor_choices(mesh, params_of):
    config = _with(moe={"every": None})

    def run(params):
        model = nnx.merge(model_graph(config, mesh), params)
        return model(TOKEN_BT, packed_tokens(jnp.asarray(SEGMENT_BT)), {})

    out = jax.eval_shape(run, params_of(config, mesh))
    assert (out.stats, out.cache, out.choice_lbts) == (None, None, None)


LAYOUTS = {
    "all sparse": {},
    "all dense": {"moe": {"every": None}},
    "every second": {"model": {"num_layers": 4}, "moe": {"every": 2}},
    "one dense first": {"model": {"num_layers": 3}, "moe": {"first_dense": 1}},
    "two dense first, every third": {
        "model": {"num_layers": 8},
        "moe": {"first_dense": 2, "every": 3},
    },
    "shared and free experts": {
        "moe": {
            **{"shared_experts": 2, "shared_gate": "sigmoid", "activation": "gelu"},
            **{"zero_experts": 1, "copy_experts": 1, "constant_experts": 2},
        }
    },
    "cosine": {"moe": {"router": "cosine"}},
    "input gates": {"moe": {"router": "elementwise_input", "capacity_factor": None}},
    "tied": {"model": {"tie_embeddings": True}},
    "no norm of queries and keys": {"model": {"qk_norm": False}},
    "latent": {"model": {"attention": "latent", "num_kv_heads": 2, "head_dim": 32}},
    "biases and sinks": {"model": {"attention_bias": True, "attention_sinks": True}},
}


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_parameters_are_as_many_as_the_formula_says(mesh, changes):
    config = _with(**changes)
    params = jax.eval_shape(lambda: split_model(config, mesh, jax.random.key(0))[1])
    counts = dict.fromkeys(parameter_counts(config), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        counts[parameter_group(path_name(path))] += leaf.size
    assert counts == parameter_counts(config)
    assert ("unembedding" in params) == (not config.model.tie_embeddings)


def test_every_layer_and_expert_is_drawn_differently(mesh):
    draw = jax.jit(lambda key: split_model(CONFIG, mesh, key)[1])
    moe = draw(jax.random.key(0))["runs"]["layer_0"]["moe"]
    for name, fan_in in (("gate", 16), ("down", 12 * 2 * 2)):  # residual outputs shrink with depth
        stack = np.asarray(moe[name])
        np.testing.assert_allclose(stack.std((2, 3)), fan_in**-0.5, rtol=0.3)
        matrices = stack.reshape(2 * 4, -1)
        others = np.corrcoef(matrices) - np.eye(8)
        assert np.abs(others).max() < 0.4


def test_tied_logits_are_products_with_the_embedding(mesh, params_of):
    config = _with({"tie_embeddings": True})
    params = params_of(config, mesh)
    hidden_btd = np.random.default_rng(0).normal(size=(1, 3, 16)).astype(np.float32)
    unembed = jax.jit(lambda p, x: nnx.merge(model_graph(config, mesh), p).unembed(x))
    expected = hidden_btd @ params["embedding"].T
    np.testing.assert_allclose(unembed(params, hidden_btd), expected, rtol=1e-4, atol=1e-5)


def test_a_token_outside_the_vocabulary_gives_nan(mesh, params_of):
    """JAX would clamp the id to the last token, and train on it. Other rows of the batch stay."""
    token_bt = TOKEN_BT.copy()
    token_bt[1, 5] = V
    hidden_btd = _hidden(CONFIG, mesh)(params_of(CONFIG, mesh), token_bt, SEGMENT_BT)
    finite_bt = np.isfinite(hidden_btd).all(-1)
    assert finite_bt[0].all()
    assert not finite_bt[1, 5]


def test_bfloat16_computes_near_float32_and_keeps_float32_weights(mesh, params_of):
    config = _with({"dtype": "bfloat16"})
    params = params_of(config, mesh)
    hidden_btd = _hidden(config, mesh)(params, TOKEN_BT, SEGMENT_BT)
    assert hidden_btd.dtype == jnp.bfloat16
    expected, _ = _gradient(CONFIG, mesh)(params, TOKEN_BT, SEGMENT_BT)
    with jax.numpy_dtype_promotion("standard"):  # JAX mixes dtypes where it transposes a product
        value, gradient = _gradient(config, mesh)(params, TOKEN_BT, SEGMENT_BT)
    np.testing.assert_allclose(value, expected, rtol=0.02)
    for tree in (params, gradient):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype("float32")}
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
