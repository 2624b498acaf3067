"""Attention of both kinds against loops in NumPy: windows, sinks, biases, the latent, the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.attend import Sight, attend
from moejax.attention import empty_cache, packed_tokens
from moejax.config import Config, ModelConfig, MoEConfig
from moejax.generate import cached_forward
from moejax.model import ATTENTION, Block, LayerRouting
from moejax.state import model_graph

B, T, D, V = 2, 9, 12, 24
# Row 0 is one document. Row 1: two documents and two positions of padding.
SEGMENT_BT = np.array([[1] * T, [1, 1, 1, 2, 2, 2, 2, 0, 0]], np.int32)
GROUPED = ModelConfig(
    num_layers=2,
    d_model=D,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    dense_hidden=8,
    vocab_size=V,
    attention_bias=True,
    attention_sinks=True,
    attention_window=3,
    full_attention_every=2,
)
LATENT = ModelConfig(
    num_layers=2,
    d_model=D,
    attention="latent",
    num_heads=4,
    q_lora_rank=6,
    kv_lora_rank=8,
    qk_nope_head_dim=3,
    qk_rope_head_dim=4,
    v_head_dim=5,
    dense_hidden=8,
    vocab_size=V,
)
MOE = MoEConfig(num_experts=4, expert_hidden=8, capacity_factor=None)


def _drawn(model: ModelConfig, mesh):
    """Returns a module of attention with random parameters, norms and biases too."""
    config = Config(model=model, moe=MOE)
    make = ATTENTION[model.attention]
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(config, mesh, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(1)
    return nnx.merge(
        graph, jax.tree.map(lambda s: random.normal(size=s.shape).astype(s.dtype) / 2, shapes)
    )


def _array(parameter) -> np.ndarray:
    return np.asarray(parameter[...], np.float64)


def _rms(x, norm) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * _array(norm.scale)


def _turn(x_bthk, theta=10_000.0) -> np.ndarray:
    """Rotates by position: the halves of a head are real and imaginary parts."""
    half = x_bthk.shape[-1] // 2
    angle_tk = np.arange(x_bthk.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    turned = (x_bthk[..., :half] + 1j * x_bthk[..., half:]) * np.exp(1j * angle_tk)[None, :, None]
    return np.concatenate([turned.real, turned.imag], -1)


def _mixed(q, k, v, sees, sink_h=None) -> np.ndarray:
    """Returns [B, T, H, V] by loops; `sees(b, t, s)` says what a query sees."""
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, h in np.ndindex(out.shape[:3]):
        seen = [s for s in range(T) if sees(b, t, s)]
        score = [np.exp(q[b, t, h] @ k[b, s, h // group] / q.shape[-1] ** 0.5) for s in seen]
        total = sum(score) + (0 if sink_h is None else np.exp(sink_h[h]))
        out[b, t, h] = sum(w * v[b, s, h // group] for w, s in zip(score, seen, strict=True))
        out[b, t, h] /= total
    assert heads == 4
    return out


def _same_document(b, t, s) -> bool:
    return s <= t and SEGMENT_BT[b, s] == SEGMENT_BT[b, t]


@pytest.fixture(scope="module")
def x_btd():
    return np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


def _applied(module, x_btd, layer=0):
    tokens = packed_tokens(jnp.asarray(SEGMENT_BT))._replace(layer=layer)
    return jax.jit(lambda x: module(x, tokens, None)[0])(x_btd)


@pytest.mark.parametrize(("layer", "window"), [(0, 3), (1, T)], ids=["window", "full"])
def test_windows_sinks_and_biases_by_the_textbook(mesh, x_btd, layer, window):
    """Two query heads share a key head; layer 0 sees three tokens, layer 1 all before it."""
    module = _drawn(GROUPED, mesh)

    def heads(name):
        y = np.einsum("btd,dhk->bthk", x_btd, _array(getattr(module, name)))
        return y + _array(getattr(module, f"{name}_bias"))

    q = _turn(_rms(heads("query"), module.query_norm))
    k = _turn(_rms(heads("key"), module.key_norm))
    mixed = _mixed(
        q,
        k,
        heads("value"),
        lambda b, t, s: _same_document(b, t, s) and t - s < window,
        _array(module.sinks),
    )
    expected = np.einsum("bthk,hkd->btd", mixed, _array(module.output))
    expected += _array(module.output_bias)
    np.testing.assert_allclose(_applied(module, x_btd, layer), expected, rtol=1e-4, atol=1e-5)


def test_latent_attention_by_the_textbook(mesh, x_btd):
    """Queries and keys of 3 plain dims and 4 that turn, values of 5; the key that turns is one."""
    module = _drawn(LATENT, mesh)

    def heads(x_btc, w):
        return np.einsum("btc,chk->bthk", x_btc, _array(w))

    query = heads(_rms(x_btd @ _array(module.query_down), module.query_norm), module.query_up)
    q = np.concatenate([query[..., :3], _turn(query[..., 3:])], -1)
    latent = _rms(x_btd @ _array(module.latent_down), module.latent_norm)
    turning = _turn((x_btd @ _array(module.key_rope))[:, :, None])
    k = np.concatenate([heads(latent, module.key_up), np.repeat(turning, 4, axis=2)], -1)
    mixed = _mixed(q, k, heads(latent, module.value_up), _same_document)
    expected = np.einsum("bthv,hvd->btd", mixed, _array(module.output))
    np.testing.assert_allclose(_applied(module, x_btd), expected, rtol=1e-4, atol=1e-5)


def test_a_value_may_be_wider_than_a_key(mesh):
    random = np.random.default_rng(0)
    shapes = ((1, T, 4, 2), (1, T, 4, 2), (1, T, 4, 7))
    q, k, v = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    sight = Sight(jnp.arange(T, dtype=jnp.int32)[None], jnp.ones((1, T), jnp.int32))
    actual = jax.jit(lambda q, k, v: attend(q, k, v, sight, None, mesh))(q, k, v)
    np.testing.assert_allclose(
        actual, _mixed(q, k, v, lambda b, t, s: s <= t), rtol=1e-4, atol=1e-5
    )


def test_scanned_layers_have_the_windows_of_their_numbers(mesh, params_of):
    """A dense layer first, then two runs of two: layers 1 and 3 see all, 0, 2 and 4 a window."""
    model = dataclasses.replace(GROUPED, num_layers=5)
    config = Config(model=model, moe=dataclasses.replace(MOE, first_dense=1, every=2))
    near = dataclasses.replace(model, full_attention_every=None)
    plain = dataclasses.replace(near, attention_window=None)
    params = params_of(config, mesh)
    token_bt = np.array([np.arange(T), np.arange(T)[::-1] + 12], np.int32)
    tokens = packed_tokens(jnp.asarray(SEGMENT_BT))

    @jax.jit
    def one_by_one(params):
        x_btd, moe_layers = params["embedding"][token_bt], 0
        stacks = [("prefix", 0, 0), *(("runs", r, i) for r in range(2) for i in range(2))]
        for number, (stack, run, i) in enumerate(stacks):
            sparse = stack == "runs" and i == 1
            layer = jax.tree.map(lambda leaf, run=run: leaf[run], params[stack][f"layer_{i}"])
            own = dataclasses.replace(config, model=plain if number in (1, 3) else near)
            block = nnx.eval_shape(
                lambda own=own, sparse=sparse: Block(own, mesh, sparse=sparse, rngs=nnx.Rngs(0))
            )
            routing = LayerRouting({}, jnp.int32(moe_layers), jnp.asarray(token_bt), None)
            moe_layers += sparse
            x_btd, _, _ = nnx.merge(nnx.split(block)[0], layer)(x_btd, tokens, routing, None)
        return x_btd * jax.lax.rsqrt(jnp.mean(x_btd**2, -1, keepdims=True) + 1e-6)

    @jax.jit
    def scanned(params):
        decoder = nnx.merge(model_graph(config, mesh), params)
        return decoder(jnp.asarray(token_bt), tokens, {}).hidden_btd

    np.testing.assert_allclose(scanned(params), one_by_one(params), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [GROUPED, LATENT], ids=["windows and sinks", "latent"])
def test_decoding_on_the_cache_is_the_full_forward(mesh, params_of, model):
    """Five tokens at once, then one at a time."""
    config = Config(model=model, moe=MOE)
    params, graph = params_of(config, mesh), model_graph(config, mesh)
    token_bt = np.random.default_rng(0).integers(V, size=(B, T)).astype(np.int32)

    @jax.jit
    def full(params):
        decoder = nnx.merge(graph, params)
        return decoder(jnp.asarray(token_bt), packed_tokens(jnp.ones((B, T), jnp.int32)), {})

    @jax.jit
    def step(params, token_bt, position_bt, cache):
        real_bt = jnp.ones(token_bt.shape, bool)
        decoder = nnx.merge(graph, params)
        return cached_forward(decoder, token_bt, position_bt, real_bt, {}, cache)

    cache, parts = empty_cache(config, B, T + 2), []
    for start, stop in ((0, 5), *((t, t + 1) for t in range(5, T))):
        position_bt = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (B, stop - start))
        hidden, cache = step(params, token_bt[:, start:stop], position_bt, cache)
        parts.append(hidden)
    actual = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(actual, full(params).hidden_btd, rtol=1e-4, atol=1e-5)


def test_the_cache_of_latent_attention_holds_the_latent_and_one_key():
    cache = empty_cache(Config(model=LATENT, moe=MOE), B, T)
    assert cache.key.shape == (2, B, T, 1, 4)
    assert cache.value.shape == (2, B, T, 1, 8)
