"""The rows of tokens in the embedding, whose gradient is exchanged once."""

import jax
import jax.numpy as jnp

from moejax import exchange
from moejax.mesh import AnyMesh
from moejax.sharding import gathered_axes, parameter_spec, split_spec, token_spec, vary_like


def embed(
    w_vd: jax.Array, token_bt: jax.Array, mesh: AnyMesh, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns w[token] [B, T, D] in `dtype`. Oracle: `look_up`.

    Each device gathers the embedding over fsdp and sums the gradient of its own tokens' rows; a
    reduce-scatter takes it back, where the partitioner would all-reduce and slice.

    Args:
        w_vd: split as `sharding.PARAMETER_SPECS` says.
        token_bt: int32; an id outside the vocabulary gives NaN.
    """
    vocab = w_vd.shape[0]
    spec, tokens = parameter_spec("embedding", 2), token_spec(token_bt.shape, mesh)
    if token_bt.shape[0] == 1 or all(mesh.shape[axis] == 1 for axis in gathered_axes(spec)):
        return look_up(w_vd.astype(dtype), token_bt)

    def local(w_vd, token_bt):
        # Varying over the tokens' axes before it is gathered: so the sum over the others of them is
        # of what the reduce-scatter leaves.
        w_vd = exchange.gather_weights(vary_like(w_vd, token_bt)[0], 1, dtype)
        row_bt = token_bt - exchange.tensor_index() * w_vd.shape[0]
        here_bt = (row_bt >= 0) & (row_bt < w_vd.shape[0])
        x_btd = w_vd.at[jnp.where(here_bt, row_bt, w_vd.shape[0])].get(mode="fill", fill_value=0)
        known_bt1 = ((token_bt >= 0) & (token_bt < vocab))[..., None]
        return jnp.where(known_bt1, exchange.sum_tensor(x_btd), jnp.nan)

    return jax.shard_map(
        local, mesh=mesh, in_specs=(split_spec(spec, mesh), tokens), out_specs=tokens
    )(w_vd, token_bt)


def look_up(w_vd: jax.Array, token_bt: jax.Array) -> jax.Array:
    """Returns w[token] [B, T, D]; an id outside the vocabulary gives NaN."""
    return w_vd.at[token_bt].get(mode="fill", fill_value=jnp.nan)
