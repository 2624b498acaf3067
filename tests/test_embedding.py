"""The lookup over devices against plain indexing, in value and gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moejax.embedding import embed, look_up
from moejax.sharding import parameter_spec

V, D = 24, 16
RANDOM = np.random.default_rng(0)
W_VD = RANDOM.normal(size=(V, D)).astype(np.float32)
TOKEN_BT = RANDOM.integers(0, V, (8, 6), np.int32)
WEIGH_BTD = RANDOM.normal(size=(8, 6, D)).astype(np.float32)


def _gradient(run):
    return jax.jit(jax.value_and_grad(lambda w_vd: jnp.sum(run(w_vd) * WEIGH_BTD)))


def _placed(mesh):
    return jax.device_put(W_VD, NamedSharding(mesh, parameter_spec("embedding", 2)))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 2, 2), (2, 1, 1, 4), (2, 4, 1, 1)])
def test_rows_and_their_gradient_are_those_of_plain_indexing(mesh_of, shape):
    mesh = mesh_of(*shape)
    expected = _gradient(lambda w_vd: look_up(w_vd, TOKEN_BT))(W_VD)
    found = _gradient(lambda w_vd: embed(w_vd, TOKEN_BT, mesh, jnp.float32))(_placed(mesh))
    for actual, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 2, 2)])
def test_an_id_outside_the_vocabulary_gives_nan_there_alone(mesh_of, shape):
    token_bt = TOKEN_BT.copy()
    token_bt[0, 0], token_bt[7, 5] = V, V + 3
    mesh = mesh_of(*shape)
    x_btd = jax.jit(lambda w_vd: embed(w_vd, token_bt, mesh, jnp.float32))(_placed(mesh))
    np.testing.assert_array_equal(np.isnan(x_btd), np.repeat(token_bt[..., None] >= V, D, axis=2))


def test_the_gradient_is_reduce_scattered_over_fsdp(mesh_of):
    mesh = mesh_of(1, 4, 2, 1)
    run = _gradient(lambda w_vd: embed(w_vd, TOKEN_BT, mesh, jnp.float32))
    text = run.lower(_placed(mesh)).as_text()
    assert text.count("stablehlo.reduce_scatter") == 1
    summed = re.findall(r"stablehlo.all_reduce.*?\}\) : \((tensor<[^>]*>)", text, re.DOTALL)
    assert f"tensor<{V}x{D // 4}xf32>" in summed  # over the expert axis, of what is left
    assert f"tensor<{V}x{D}xf32>" not in summed
