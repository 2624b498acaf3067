"""The loss in chunks: the same as of whole logits, in value and every gradient, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from moejax import loss
from moejax.config import Config, ConfigError, ModelConfig
from moejax.cross_entropy import summed_loss, token_losses
from moejax.model import Decoder
from moejax.sharding import parameter_spec, tree_shardings
from moejax.state import model_graph, split_model

B, T, D, V = 8, 6, 16, 40
RANDOM = np.random.default_rng(0)
X_BTD = RANDOM.normal(size=(B, T, D)).astype(np.float32)
W_DV = RANDOM.normal(size=(D, V)).astype(np.float32)
TARGET_BT = RANDOM.integers(0, V, (B, T), np.int32)
MASK_BT = RANDOM.random((B, T)) < 0.7

MESHES = {
    "one device": (1, 1, 1, 1),
    "fsdp, expert, tensor": (1, 2, 2, 2),
    "data, tensor": (2, 1, 1, 4),
    "data, fsdp": (2, 4, 1, 1),
}


def _whole(x_btd, w_dv, target_bt, mask_bt):
    """The oracle: all logits at once."""
    logit_btv = jnp.einsum("btd,dv->btv", x_btd, w_dv, preferred_element_type=jnp.float32)
    return jnp.sum(jnp.where(mask_bt, loss.token_losses(logit_btv, target_bt), 0))


def _placed(mesh, w_dv):
    return jax.device_put(w_dv, NamedSharding(mesh, parameter_spec("unembedding", 2)))


@pytest.mark.parametrize("chunk", [1, 4, 5, None])  # 5 does not divide the tokens of any device
@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_chunks_give_the_whole_loss_and_its_gradients(mesh_of, shape, chunk):
    mesh = mesh_of(*shape)
    expected, grads = jax.jit(jax.value_and_grad(_whole, (0, 1)))(X_BTD, W_DV, TARGET_BT, MASK_BT)
    run = functools.partial(summed_loss, chunk=chunk, mesh=mesh)

    def half(*arguments):  # a factor after it: the gradient is not that of the loss alone
        return 0.5 * run(*arguments)

    arguments = (X_BTD, _placed(mesh, W_DV), TARGET_BT, MASK_BT)
    found = jax.jit(jax.value_and_grad(half, (0, 1)))(*arguments)
    np.testing.assert_allclose(found[0], 0.5 * expected, rtol=1e-6)
    for actual, grad in zip(found[1], grads, strict=True):
        np.testing.assert_allclose(actual, 0.5 * grad, rtol=1e-5, atol=1e-6)
    alone = jax.jit(run)(*arguments)
    np.testing.assert_allclose(alone, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_losses_of_tokens_are_those_of_whole_logits(mesh_of, shape):
    """A target outside the vocabulary gives NaN, where JAX would clamp it; others stay."""
    mesh, target_bt = mesh_of(*shape), TARGET_BT.copy()
    target_bt[0, :2] = V, -1
    expected = loss.token_losses(jnp.einsum("btd,dv->btv", X_BTD, W_DV), target_bt)
    run = jax.jit(functools.partial(token_losses, chunk=5, mesh=mesh))
    found = run(X_BTD, _placed(mesh, W_DV), target_bt)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.isnan(found).sum() == 2


def test_large_logits_do_not_overflow(mesh):
    x_btd, w_dv = np.full((1, 1, 1), 1e4, np.float32), np.array([[1.0, 0.0]], np.float32)
    run = functools.partial(summed_loss, chunk=1, mesh=mesh)
    value, grad = jax.value_and_grad(run)(x_btd, w_dv, np.array([[1]]), np.array([[True]]))
    assert value == 1e4
    assert grad == 1


def test_bfloat16_multiplies_in_bfloat16_and_sums_in_float32(mesh):
    x_btd = jnp.asarray(X_BTD, jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        expected, grads = jax.value_and_grad(_whole, (0, 1))(
            x_btd, jnp.asarray(W_DV, jnp.bfloat16), TARGET_BT, MASK_BT
        )
    run = functools.partial(summed_loss, chunk=5, mesh=mesh)
    found, actual = jax.jit(jax.value_and_grad(run, (0, 1)))(x_btd, W_DV, TARGET_BT, MASK_BT)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert [g.dtype for g in actual] == [jnp.bfloat16, jnp.float32]
    for ours, theirs in zip(actual, grads, strict=True):
        ours, theirs = (np.asarray(g, np.float32) for g in (ours, theirs))
        assert np.abs(ours - theirs).max() < 0.02 * np.abs(theirs).max()
    text = str(jax.make_jaxpr(jax.grad(run, (0, 1)))(x_btd, W_DV, TARGET_BT, MASK_BT))
    assert "[8,6,40]" not in text
    assert "f32[5,40]" in text


def test_a_factor_is_not_rounded_to_the_dtype_of_the_gradient(mesh):
    """A mean over 15,360 sequences of 4,096: in bfloat16 that factor would be 0.34% too large."""

    def run(x_btd, factor):
        return factor * summed_loss(x_btd, W_DV, TARGET_BT, MASK_BT, 5, mesh)

    gradient = jax.jit(jax.grad(run))
    x_btd = jnp.asarray(X_BTD, jnp.bfloat16)
    one, small = (
        np.linalg.norm(np.asarray(gradient(x_btd, f), np.float32)) for f in (1.0, 1 / 62914560)
    )
    assert small * 62914560 / one == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_s_gradient_is_that_of_whole_logits(mesh_of, tied):
    mesh = mesh_of(1, 2, 2, 2)
    model = ModelConfig(d_model=D, vocab_size=V, num_layers=1, tie_embeddings=tied, loss_chunk=2)
    config = Config(model=model)
    params = split_model(config, mesh, jax.random.key(0))[1]
    params = jax.device_put(params, tree_shardings(mesh, params))
    graph = model_graph(config, mesh)

    def ours(params):
        return _merged(graph, params).summed_loss(X_BTD, TARGET_BT, MASK_BT)

    def theirs(params):
        logit_btv = _merged(graph, params).unembed(X_BTD)
        return jnp.sum(jnp.where(MASK_BT, loss.token_losses(logit_btv, TARGET_BT), 0))

    (a, found), (b, expected) = (jax.jit(jax.value_and_grad(f))(params) for f in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    name = "embedding" if tied else "unembedding"
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert np.abs(found[name]).max() > 0.1


def _merged(graph, params) -> Decoder:
    return nnx.merge(graph, params)


def test_logits_of_the_batch_never_exist(mesh):
    """2,048 tokens of 32,768 logits are 268 MB; a chunk of 64 has 8 MB."""
    tokens, vocabulary, width = 2048, 32768, 32
    arguments = (
        jax.ShapeDtypeStruct((4, tokens // 4, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((4, tokens // 4), jnp.int32),
        jax.ShapeDtypeStruct((4, tokens // 4), jnp.bool_),
    )

    def temporary(function, **how):
        run = jax.jit(jax.value_and_grad(functools.partial(function, **how), (0, 1)))
        return run.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * tokens * vocabulary
    whole = temporary(_whole)
    at_once = temporary(summed_loss, chunk=None, mesh=mesh)
    in_chunks = temporary(summed_loss, chunk=64, mesh=mesh)
    assert whole >= logits
    assert at_once >= logits
    assert in_chunks < logits / 4
    assert in_chunks < whole / 6


def test_a_chunk_of_no_token_is_refused():
    with pytest.raises(ConfigError, match=r"model.loss_chunk=0 is below 1"):
        ModelConfig(loss_chunk=0)
