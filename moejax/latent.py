"""Multi-head latent attention: keys and values of all heads from one narrow vector a token."""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.attend import attend
from moejax.attention import (
    Cache,
    RMSNorm,
    Tokens,
    normal,
    output_scale,
    rope,
    sight,
    write_cache,
)
from moejax.config import Config
from moejax.mesh import AnyMesh
from moejax.sharding import constrain_tokens, gathered


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Queries are made of a vector of width Q, keys and values of one of width C, each behind an RMS
    norm. RoPE turns R more dims of the query and one key [R] that all heads share; scores are
    scaled by (K + R)**-0.5. The cache holds C + R numbers a token; keys and values are made of it
    again in every call.
    """

    def __init__(self, config: Config, mesh: AnyMesh, *, rngs: nnx.Rngs):
        model = config.model
        self.config, self.mesh = model, mesh
        d, h, dtype = model.d_model, model.num_heads, model.param_dtype
        q, c = model.q_lora_rank, model.kv_lora_rank
        k, r, v = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
        self.query_down = normal(rngs, (d, q), d, dtype)
        self.query_norm = RMSNorm(q, dtype)
        self.query_up = normal(rngs, (q, h, k + r), q, dtype)
        self.latent_down = normal(rngs, (d, c), d, dtype)
        self.latent_norm = RMSNorm(c, dtype)
        self.key_up = normal(rngs, (c, h, k), c, dtype)
        self.value_up = normal(rngs, (c, h, v), c, dtype)
        self.key_rope = normal(rngs, (d, r), d, dtype)
        self.output = normal(rngs, (h, v, d), h * v, dtype, output_scale(model))

    def __call__(
        self, x_btd: jax.Array, tokens: Tokens, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Returns [B, T, D] and the cache with this call's keys and latents written to it."""
        model, position_bt = self.config, tokens.position_bt
        q_bthk = self._heads(self.query_norm(self._down(x_btd, "query_down")), "query_up")
        still, turning = jnp.split(q_bthk, [model.qk_nope_head_dim], axis=-1)
        turned = rope(turning, position_bt, model.rope_theta)
        q_bthk = jnp.concatenate([still, turned], axis=-1)
        latent_btc = self.latent_norm(self._down(x_btd, "latent_down"))
        key_bt1r = self._down(x_btd, "key_rope")[:, :, None]
        key_bt1r = rope(key_bt1r, position_bt, model.rope_theta)
        if cache is not None:
            cache = write_cache(cache, key_bt1r, latent_btc[:, :, None], tokens)
            key_bt1r, latent_btc = cache.key, cache.value[:, :, 0]
        k_bshk, v_bshv = (
            self._heads(latent_btc, "key_up"),
            self._heads(latent_btc, "value_up"),
        )
        shared = jnp.broadcast_to(key_bt1r, (*k_bshk.shape[:-1], key_bt1r.shape[-1]))
        k_bshk = jnp.concatenate([k_bshk, shared], axis=-1)
        mixed = attend(q_bthk, k_bshk, v_bshv, sight(model, tokens), None, self.mesh)
        out = jnp.einsum("bthv,hvd->btd", mixed, self._weight("output", x_btd))
        return constrain_tokens(out, self.mesh), cache

    def _weight(self, name: str, x_btd: jax.Array) -> jax.Array:
        return gathered(getattr(self, name)[...], f"attention/{name}", self.mesh, x_btd.dtype)

    def _down(self, x_btd: jax.Array, name: str) -> jax.Array:
        """Returns [B, T, C], whole on every device of a tensor group."""
        narrow = jnp.einsum("btd,dc->btc", x_btd, self._weight(name, x_btd))
        return constrain_tokens(narrow, self.mesh)

    def _heads(self, x_btc: jax.Array, name: str) -> jax.Array:
        heads = jnp.einsum("btc,chk->bthk", x_btc, self._weight(name, x_btc))
        return constrain_tokens(heads, self.mesh, heads=True)
