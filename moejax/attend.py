"""attend: softmax attention over packed documents, in the memory of some of its scores.

On a TPU JAX's splash attention, which keeps no score and skips blocks that no query sees; elsewhere
the scores of some queries at a time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from moejax import exchange
from moejax.mesh import AnyMesh
from moejax.sharding import token_spec

QUERY_CHUNK = 1024  # queries of a sequence whose scores exist at once, where there is no kernel
KERNEL_BLOCKS = (512, 256, 128)  # queries and keys of a block of the kernel: the first that divides
NO_DOCUMENT = -1


class Sight(NamedTuple):
    """Which keys a query sees: those at or before its position, of its own document.

    Attributes:
        position_bt: int32 [B, T], or [1, T] where all rows have the same: the query's place among
            the keys.
        segment_bt: int32; the document of every token, which is query and key. None with a cache:
            its S keys are of one document.
        window: keys that a query sees, its own included; None is all.
        whole: bool; whether this layer sees all in spite of `window`; None: it does not.
        causal: False for an encoder, whose queries see later keys too.
    """

    position_bt: jax.Array
    segment_bt: jax.Array | None
    window: int | None = None
    whole: jax.Array | bool | None = None
    causal: bool = True


class _Operands(NamedTuple):
    """What the attention of one device reads, or how it is split: queries, keys, what is seen."""

    q_bthk: Any
    k_bsnk: Any
    v_bsnv: Any
    position_bt: Any
    segment_bt: Any
    segment_bs: Any
    whole: Any
    sink_h: Any


def attend(
    q_bthk: jax.Array,
    k_bsnk: jax.Array,
    v_bsnv: jax.Array,
    sight: Sight,
    sink_h: jax.Array | None,
    mesh: AnyMesh,
) -> jax.Array:
    """Softmax attention, scaled by K**-0.5; returns [B, T, H, V]. Each of N key heads serves H / N.

    Scores are float32, and the backward pass computes them again. Over the context axis a device
    has its part of the queries and gathers the keys.

    Args:
        sink_h: a logit of each head beside those of its keys, of value 0: a head can attend to
            nothing. None for none.
    """
    whole = sight.segment_bt is None  # a cache is whole on every device of a context group
    heads = token_spec(q_bthk.shape, mesh, heads=True, whole=whole)
    position = token_spec(sight.position_bt.shape, mesh, whole=whole)
    segment = None if sight.segment_bt is None else token_spec(sight.segment_bt.shape, mesh)
    specs = _Operands(
        *(heads, heads, heads, position, segment, segment),
        None if sight.whole is None else P(),
        None if sink_h is None else P(heads[2]),
    )
    operands = _Operands(
        *(q_bthk, k_bsnk, v_bsnv, sight.position_bt, sight.segment_bt, sight.segment_bt),
        *(None if sight.whole is None else jnp.asarray(sight.whole), sink_h),
    )
    run = jax.shard_map(
        functools.partial(_attend_local, window=sight.window, causal=sight.causal),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=heads,
        check_vma=False,  # the kernel does not say over which axes its outputs vary
    )
    return run(operands)


def _attend_local(local: _Operands, window: int | None, causal: bool) -> jax.Array:
    if local.segment_bs is not None:
        gathered = (local.k_bsnk, local.v_bsnv, local.segment_bs)
        k_bsnk, v_bsnv, segment_bs = jax.tree.map(exchange.gather_sequence, gathered)
        local = local._replace(k_bsnk=k_bsnk, v_bsnv=v_bsnv, segment_bs=segment_bs)
    plain = functools.partial(_by_chunks, window=window, causal=causal)
    block = _kernel_block(local)
    if block is None or not causal:
        return plain(local)
    kernel = functools.partial(_by_kernel, window=window, block=block)
    return lax.platform_dependent(local, tpu=kernel, default=plain)


# In chunks of queries.


def _by_chunks(local: _Operands, window: int | None, causal: bool) -> jax.Array:
    length = local.q_bthk.shape[1]
    if length <= QUERY_CHUNK:
        return _by_scores(local, window, causal)
    number = -(-length // QUERY_CHUNK)
    size = -(-length // number)

    def split(x: jax.Array | None, padding: int = 0) -> jax.Array | None:
        if x is None:
            return None
        behind = [(0, number * size - length if axis == 1 else 0) for axis in range(x.ndim)]
        x = jnp.pad(x, behind, constant_values=padding)
        return rearrange(x, "b (n c) ... -> n b c ...", n=number)

    def one(part) -> jax.Array:
        q_bchk, position_bc, segment_bc = part
        chunk = local._replace(q_bthk=q_bchk, position_bt=position_bc, segment_bt=segment_bc)
        return _by_scores(chunk, window, causal)

    segment_nbc = split(local.segment_bt, NO_DOCUMENT)
    mixed_nbchv = lax.map(one, (split(local.q_bthk), split(local.position_bt), segment_nbc))
    return rearrange(mixed_nbchv, "n b c h v -> b (n c) h v")[:, :length]


def _seen(local: _Operands, window: int | None, causal: bool) -> jax.Array:
    """Returns bool [B or 1, T, S]: the keys that each query sees."""
    key_s = jnp.arange(local.k_bsnk.shape[1], dtype=jnp.int32)
    behind_bts = local.position_bt[:, :, None] - key_s[None, None]
    seen_bts = (behind_bts >= 0) | (not causal)
    if window is not None:
        near_bts = behind_bts < window
        seen_bts &= near_bts if local.whole is None else near_bts | local.whole
    if local.segment_bt is not None:
        seen_bts &= local.segment_bt[:, :, None] == local.segment_bs[:, None]
    return seen_bts


@functools.partial(jax.checkpoint, static_argnums=(1, 2))
def _by_scores(local: _Operands, window: int | None, causal: bool) -> jax.Array:
    q_bthk, k_bsnk, v_bsnv = local.q_bthk, local.k_bsnk, local.v_bsnv
    seen_bts, bias = _seen(local, window, causal), None
    width, v_width = q_bthk.shape[-1], v_bsnv.shape[-1]
    if local.sink_h is not None:  # one more key: its score is the sink, its value 0
        keys = k_bsnk.shape[1] + 1
        bias = jnp.zeros((1, local.sink_h.size, 1, keys), jnp.float32)
        bias = bias.at[..., -1].set(local.sink_h.astype(jnp.float32)[None, :, None])
        k_bsnk, v_bsnv = (_pad(x, 1, keys) for x in (k_bsnk, v_bsnv))
        seen_bts = jnp.pad(seen_bts, ((0, 0), (0, 0), (0, 1)), constant_values=True)
    # the library takes one width for queries, keys and values
    q_bthk, k_bsnk, v_bsnv = (_pad(x, 3, max(width, v_width)) for x in (q_bthk, k_bsnk, v_bsnv))
    mixed = jax.nn.dot_product_attention(
        q_bthk, k_bsnk, v_bsnv, bias=bias, mask=seen_bts[:, None], scale=width**-0.5
    )
    return mixed[..., :v_width]


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Returns `x` with zeros behind it, up to `size`."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])


# By the kernel.


def _kernel_block(local: _Operands) -> int | None:
    """Returns the rows of the kernel's blocks; None where it does not fit."""
    if local.segment_bt is None:
        return None  # a cache: few queries
    lengths = (local.q_bthk.shape[1], local.k_bsnk.shape[1])
    return next((b for b in KERNEL_BLOCKS if not any(n % b for n in lengths)), None)


def _by_kernel(
    local: _Operands, window: int | None, block: int, *, interpret: bool = False
) -> jax.Array:
    keys = local.k_bsnk.shape[1]
    parts = keys // local.q_bthk.shape[1]
    scale = local.q_bthk.shape[-1] ** -0.5
    q = rearrange((local.q_bthk * scale).astype(local.q_bthk.dtype), "b t h k -> b h t k")
    k, v = (rearrange(x, "b s n k -> b n s k") for x in (local.k_bsnk, local.v_bsnv))
    segments = splash.SegmentIds(q=local.segment_bt, kv=local.segment_bs)

    def under(mask: masks.Mask) -> Any:
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=_block_sizes(block),
            head_shards=1,
            q_seq_shards=parts,
            interpret=interpret,
        )
        run = jax.vmap(_own_queries(kernel, parts), in_axes=(0, 0, 0, 0, None))
        return run(q, k, v, segments, local.sink_h)

    causal = functools.partial(under, masks.CausalMask((keys, keys)))
    if window is None or window >= keys:
        mixed = causal()
    else:
        near = functools.partial(under, masks.LocalMask((keys, keys), (window - 1, 0), 0))
        mixed = near() if local.whole is None else lax.cond(local.whole, causal, near)
    return rearrange(mixed, "b h t v -> b t h v")


def _block_sizes(block: int) -> splash.BlockSizes:
    return splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )


def _own_queries(kernel: splash.SplashAttentionKernel, parts: int) -> splash.SplashAttentionKernel:
    """Returns the kernel of this device's queries, from one whose tables are those of all.

    Tables of blocks are [heads, blocks of queries, blocks of keys], positions [queries]; each is
    made of the equal parts of the devices on the context axis.
    """
    return jax.tree.map(lambda t: exchange.own_part(t, 1 if t.ndim == 3 else 0, parts), kernel)
