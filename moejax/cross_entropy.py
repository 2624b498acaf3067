"""The cross-entropy of hidden states, in chunks: logits of a whole batch exist nowhere.

A chunk is some tokens of one device with all their logits. The gradients of a chunk are taken as
soon as its logits are there, so none is computed twice; chunks of the vocabulary would need the
logits again, since a softmax needs the sum over all of it. A device sums the gradient of its part
of the unembedding over its chunks, and devices exchange it once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax import exchange
from moejax.mesh import AnyMesh
from moejax.sharding import (
    BATCH_AXES,
    CONTEXT_AXIS,
    parameter_spec,
    split_spec,
    vary_like,
    varying_axes,
)


def token_losses(
    x_btd: jax.Array, w_dv: jax.Array, target_bt: jax.Array, chunk: int | None, mesh: AnyMesh
) -> jax.Array:
    """Returns float32 [B, T]: -log softmax(x w)[target], nats. Oracle: `loss.token_losses`.

    Args:
        x_btd: hidden states; products have their dtype, logits and losses are float32.
        w_dv: the unembedding, split as `sharding.PARAMETER_SPECS` says.
        target_bt: whole numbers; one outside the vocabulary gives NaN.
        chunk: tokens a device whose logits exist at once; None: all.
    """

    def local(x_btd, w_dv, target_bt):
        w_dv = exchange.gather_weights(w_dv, 0, x_btd.dtype)
        chunks = _split((*vary_like(x_btd, w_dv)[:1], target_bt), chunk)
        loss_nc = jax.lax.map(lambda part: _chunk(part[0], w_dv, part[1]).loss_c, chunks)
        return _joined(loss_nc, target_bt)

    weights, tokens = _specs(mesh)
    run = jax.shard_map(local, mesh=mesh, in_specs=(tokens, weights, tokens), out_specs=tokens)
    return run(x_btd, w_dv, target_bt)


def best_tokens(
    x_btd: jax.Array,
    w_dv: jax.Array,
    target_bt: jax.Array,
    known: int,
    chunk: int | None,
    mesh: AnyMesh,
) -> jax.Array:
    """Returns bool [B, T]: whether no id below `known` has a larger logit than the target.

    Args:
        known: ids that a tokenizer has; those behind them, where the vocabulary was rounded up,
            are never generated. The rest as in `token_losses`.
    """

    def local(x_btd, w_dv, target_bt):
        w_dv = exchange.gather_weights(w_dv, 0, x_btd.dtype)
        chunks = _split((*vary_like(x_btd, w_dv)[:1], target_bt), chunk)
        best_nc = jax.lax.map(lambda part: _best(part[0], w_dv, part[1], known), chunks)
        return _joined(best_nc, target_bt)

    weights, tokens = _specs(mesh)
    run = jax.shard_map(local, mesh=mesh, in_specs=(tokens, weights, tokens), out_specs=tokens)
    return run(x_btd, w_dv, target_bt)


def _best(x_cd: jax.Array, w_dv: jax.Array, target_c: jax.Array, known: int) -> jax.Array:
    logit_cv = jnp.einsum("cd,dv->cv", x_cd, w_dv, preferred_element_type=jnp.float32)
    size = w_dv.shape[1]
    id_cv = jax.lax.broadcasted_iota(jnp.int32, logit_cv.shape, 1)
    first = exchange.tensor_index() * size
    most_c = exchange.most_over_tensor(jnp.where(id_cv < known - first, logit_cv, -jnp.inf).max(1))
    hit_cv = id_cv == (target_c.astype(jnp.int32) - first)[:, None]
    return exchange.sum_tensor(jnp.where(hit_cv, logit_cv, 0).sum(1)) >= most_c


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def summed_loss(
    x_btd: jax.Array,
    w_dv: jax.Array,
    target_bt: jax.Array,
    mask_bt: jax.Array,
    chunk: int | None,
    mesh: AnyMesh,
) -> jax.Array:
    """Returns the sum of `token_losses` over the tokens of bool `mask_bt`, with its gradients."""
    loss_bt = token_losses(x_btd, w_dv, target_bt, chunk, mesh)
    return jnp.sum(jnp.where(mask_bt, loss_bt, 0))


def _forward(x_btd, w_dv, target_bt, mask_bt, chunk, mesh):
    weights, tokens = _specs(mesh)
    run = jax.shard_map(
        functools.partial(_local_gradients, chunk=chunk),
        mesh=mesh,
        in_specs=(tokens, weights, tokens, tokens),
        out_specs=(P(), tokens, weights),
    )
    loss, grad_btd, grad_dv = run(x_btd, w_dv, target_bt, mask_bt)
    return loss, (grad_btd, grad_dv)


def _backward(chunk, mesh, saved, grad):
    del chunk, mesh
    # in float32: 1 / targets in bfloat16 would scale a whole gradient by up to 0.4%
    grads = [(grad * g.astype(jnp.float32)).astype(g.dtype) for g in saved]
    return *grads, None, None


summed_loss.defvjp(_forward, _backward)


def _specs(mesh: AnyMesh) -> tuple[P, P]:
    """Returns the specs of the unembedding and of what tokens have."""
    return split_spec(parameter_spec("unembedding", 2), mesh), split_spec(
        P(BATCH_AXES, CONTEXT_AXIS), mesh
    )


def _local_gradients(x_btd, w_dv, target_bt, mask_bt, *, chunk: int | None):
    """Returns the loss over all devices, and the gradients of this device's x and part of w."""
    whole_dv = exchange.gather_weights(w_dv, 0, x_btd.dtype)
    x_btd, zero_dv = vary_like(x_btd, jnp.zeros(whole_dv.shape, jnp.float32), whole_dv)[:2]

    def add(grad_dv, part):
        x_cd, target_c, mask_c = part
        found = _chunk(x_cd, whole_dv, target_c)
        grad_cv = jnp.where(mask_c[:, None], found.grad_cv, 0).astype(x_cd.dtype)
        # x is transposed, not the larger logits: XLA:CPU has a slower kernel for a transposed left
        x_dc = jax.lax.optimization_barrier(x_cd.T)
        grad_dv += jnp.einsum("dc,cv->dv", x_dc, grad_cv, preferred_element_type=jnp.float32)
        grad_cd = jnp.einsum("cv,dv->cd", grad_cv, whole_dv)
        return grad_dv, (jnp.where(mask_c, found.loss_c, 0).sum(), grad_cd)

    grad_dv, (loss_n, grad_ncd) = jax.lax.scan(
        add, zero_dv, _split((x_btd, target_bt, mask_bt), chunk)
    )
    loss = loss_n.sum()
    axes = varying_axes(loss)
    return (
        jax.lax.psum(loss, axes) if axes else loss,
        exchange.sum_tensor(_joined(grad_ncd, x_btd)),
        exchange.sum_weight_gradient(grad_dv, 0).astype(w_dv.dtype),
    )


class _Chunk(NamedTuple):
    """The losses of some tokens, and their gradient by the logits of this device's vocabulary."""

    loss_c: jax.Array
    grad_cv: jax.Array


def _chunk(x_cd: jax.Array, w_dv: jax.Array, target_c: jax.Array) -> _Chunk:
    logit_cv = jnp.einsum("cd,dv->cv", x_cd, w_dv, preferred_element_type=jnp.float32)
    size = w_dv.shape[1]
    most_c = exchange.most_over_tensor(jax.lax.stop_gradient(logit_cv.max(1)))
    exp_cv = jnp.exp(logit_cv - most_c[:, None])
    # Not a gather: a comparison fuses with what uses it.
    id_cv = jax.lax.broadcasted_iota(jnp.int32, logit_cv.shape, 1)
    id_c = target_c.astype(jnp.int32) - exchange.tensor_index() * size
    hit_cv = id_cv == id_c[:, None]
    sum_c, picked_c, known_c = exchange.sum_tensor(
        jnp.stack(
            [
                exp_cv.sum(1),
                jnp.where(hit_cv, logit_cv, 0).sum(1),
                ((id_c >= 0) & (id_c < size)).astype(jnp.float32),
            ]
        )
    )
    loss_c = jnp.log(sum_c) + most_c - jnp.where(known_c > 0, picked_c, jnp.nan)
    grad_cv = exp_cv / sum_c[:, None] - hit_cv.astype(jnp.float32)
    return _Chunk(loss_c, grad_cv)


def _split(arrays: tuple[jax.Array, ...], chunk: int | None) -> tuple[jax.Array, ...]:
    """Returns arrays [B, T, ...] as equal chunks [N, C, ...], C at most `chunk`; padded by 0."""
    tokens = arrays[0].shape[0] * arrays[0].shape[1]
    number = -(-tokens // min(chunk or tokens, tokens))
    size = -(-tokens // number)

    def split(array):
        flat = array.reshape(tokens, *array.shape[2:])
        padding = [(0, number * size - tokens), *[(0, 0)] * (flat.ndim - 1)]
        return jnp.pad(flat, padding).reshape(number, size, *flat.shape[1:])

    return tuple(split(array) for array in arrays)


def _joined(value_nc: jax.Array, like_bt: jax.Array) -> jax.Array:
    """Returns chunks [N, C, ...] as [B, T, ...], without the padding."""
    tokens = like_bt.shape[0] * like_bt.shape[1]
    flat = value_nc.reshape(-1, *value_nc.shape[2:])[:tokens]
    return flat.reshape(*like_bt.shape[:2], *flat.shape[1:])
