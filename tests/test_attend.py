"""Attention in chunks, by the TPU kernel (interpreted here) and over the context axis is the same.

tests/test_attention.py holds it to loops in NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import attend as module
from moejax.attend import Sight, attend

B, T, H, N, K, V = 2, 256, 4, 2, 8, 8
DOCUMENTS = np.repeat([[1, 2, 3, 0], [1, 1, 2, 2]], T // 4, axis=1).astype(np.int32)
SIGHTS = {
    "all": {},
    "window": {"window": 40},
    "window of one layer": {"window": 40, "whole": False},
    "no window of one layer": {"window": 40, "whole": True},
    "window of everything": {"window": T},
}


@pytest.fixture(scope="module")
def operands():
    random = np.random.default_rng(0)
    shapes = ((B, T, H, K), (B, T, N, K), (B, T, N, V), (H,), (B, T, H, V))
    return tuple(random.normal(size=shape).astype(np.float32) for shape in shapes)


def _results(run, operands, sinks):
    """Returns output and gradients by q, k, v and, if there are, the sinks."""
    q, k, v, sink_h, weight = operands

    def loss(q, k, v, sink_h):
        mixed = run(q, k, v, sink_h if sinks else None)
        return jnp.sum(mixed * weight), mixed

    grads, mixed = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, sink_h)
    return mixed, *grads[: 3 + sinks]


def _sight(options, segment_bt=DOCUMENTS):
    position_bt = jnp.arange(T, dtype=jnp.int32)[None]
    return Sight(position_bt, jnp.asarray(segment_bt), **options)


def _on(mesh, options):
    return lambda q, k, v, sink_h: attend(q, k, v, _sight(options), sink_h, mesh)


def _close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", SIGHTS.values(), ids=SIGHTS)
def test_the_kernel_is_the_plain_attention(monkeypatch, mesh, operands, options):
    sinks = "window" in options
    expected = _results(_on(mesh, options), operands, sinks)
    monkeypatch.setattr(module, "_by_chunks", functools.partial(_interpreted, module._by_kernel))
    _close(_results(_on(mesh, options), operands, sinks), expected)


def _interpreted(kernel, local, window, causal):
    assert causal
    return kernel(local, window, 128, interpret=True)


def test_an_encoder_sees_later_keys_of_its_document(mesh, operands):
    """A later value reaches an earlier query, and none of another document does."""
    q, k, v, _, _ = operands

    def of(v, causal):
        return attend(q, k, v, _sight({"causal": causal}), None, mesh)

    other = v.copy()
    other[:, T // 4 - 1] += 1  # the last token of each first document
    for causal in (True, False):
        changed = jax.jit(of, static_argnums=1)(other, causal) != jax.jit(of, static_argnums=1)(
            v, causal
        )
        assert np.asarray(changed).any(axis=(2, 3))[0, : T // 4 - 1].all() == (not causal)
        assert not np.asarray(changed)[0, T // 4 :].any()


def test_the_kernel_over_the_context_axis(monkeypatch, mesh, mesh_of, operands):
    """Each device has the tables of its own queries."""
    expected = _results(_on(mesh, {"window": 150}), operands, True)
    monkeypatch.setattr(module, "_by_chunks", functools.partial(_interpreted, module._by_kernel))
    wide = mesh_of(1, 1, 1, 1, context=2)
    _close(_results(_on(wide, {"window": 150}), operands, True), expected)


@pytest.mark.parametrize("chunk", [64, 100])
def test_chunks_of_queries_change_nothing(monkeypatch, mesh, operands, chunk):
    """Also where they do not divide the sequence."""
    expected = _results(_on(mesh, {"window": 40}), operands, True)
    monkeypatch.setattr(module, "QUERY_CHUNK", chunk)
    _close(_results(_on(mesh, {"window": 40}), operands, True), expected)


@pytest.mark.parametrize(("chunk", "whole"), [(T, True), (64, False)])
def test_scores_exist_for_a_chunk_of_queries_only(monkeypatch, mesh, operands, chunk, whole):
    monkeypatch.setattr(module, "QUERY_CHUNK", chunk)
    q, k, v, _, weight = operands

    def loss(q):
        return jnp.sum(_on(mesh, {})(q, k, v, None) * weight)

    text = jax.jit(jax.grad(loss)).lower(q).compile().as_text()
    assert (f"{T},{T}]" in text) == whole


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 4), (2, 1, 1, 2, 2), (1, 2, 1, 1, 4)])
def test_meshes_change_nothing(mesh, mesh_of, operands, sizes):
    expected = _results(_on(mesh, {"window": 150}), operands, True)
    *others, context = sizes
    wide = mesh_of(*others, context=context)
    _close(_results(_on(wide, {"window": 150}), operands, True), expected)
