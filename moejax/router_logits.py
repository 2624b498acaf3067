"""The logits of a router: its matmul, and what changes them in training.

Logits and all that is made of them are float32: bfloat16 logits tie, and ties change which experts
are selected. Only the inputs of the router's matmul have the compute dtype.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.moe_config import MoEConfig

LARGEST_TEMPERATURE = 100.0  # of router="cosine", as in Tutel
JITTER, EXPERT_DROPOUT, CHOICE = 2, 3, 4  # what a sequence's key is folded with; 1 is `assign`'s

Weights = Mapping[str, jax.Array]


class Logits(NamedTuple):
    """float32 [B, T, E]: `clean` for the z-loss, `used` with -inf for what dropout closes."""

    clean: jax.Array
    used: jax.Array


def router_matmul(x_btd: jax.Array, router_de: jax.Array) -> jax.Array:
    """Returns float32 [B, T, E]: inputs in the dtype of x, accumulated and given in float32."""
    router_de = router_de.astype(x_btd.dtype)
    return jnp.einsum("btd,de->bte", x_btd, router_de, preferred_element_type=jnp.float32)


def draw(key_b: jax.Array, purpose: int, sample: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns [B, ...]: `sample(key)` of each sequence. `purpose` keeps the draws of one apart."""

    def one(data):
        return sample(
            jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), purpose)
        )

    return jax.vmap(one)(key_b)


def router_logits(
    x_btd: jax.Array, weights: Weights, key_b: jax.Array | None, config: MoEConfig
) -> Logits:
    """Returns the router's logits, with `jitter`, `logit_cap` and `expert_dropout`."""
    x_btd = jitter(x_btd, key_b, config)
    if config.router == "cosine":
        logit_bte = _cosines(x_btd, weights)
    else:
        logit_bte = router_matmul(x_btd, weights["router"])
    if "router_bias" in weights:
        logit_bte = logit_bte + weights["router_bias"][None, None]
    logit_bte = cap(logit_bte, config)
    if key_b is None or config.expert_dropout == 0:
        return Logits(logit_bte, logit_bte)
    return Logits(logit_bte, jnp.where(_open(key_b, config)[:, None], logit_bte, -jnp.inf))


def jitter(x_btd: jax.Array, key_b: jax.Array | None, config: MoEConfig) -> jax.Array:
    """Multiplies what the router sees by U[1 - jitter, 1 + jitter], in training."""
    if key_b is None or config.jitter == 0:
        return x_btd
    low, high = 1 - config.jitter, 1 + config.jitter
    shape = x_btd.shape[1:]
    noise_btd = draw(
        key_b, JITTER, lambda key: jax.random.uniform(key, shape, minval=low, maxval=high)
    )
    return (x_btd.astype(jnp.float32) * noise_btd).astype(x_btd.dtype)


def unit(x: jax.Array, axis: int) -> jax.Array:
    """Returns x of length 1 along `axis`, in float32; zero stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis, keepdims=True) + 1e-12)


def _cosines(x_btd: jax.Array, weights: Weights) -> jax.Array:
    """Returns the cosine of each token's projection and each expert's vector, times temperature."""
    projected_btp = unit(router_matmul(x_btd, weights["router_projection"]), -1)
    cosine_bte = jnp.einsum(
        "btp,pe->bte", projected_btp, unit(weights["router"], 0), precision="highest"
    )
    return cosine_bte * jnp.minimum(weights["router_temperature"], LARGEST_TEMPERATURE)


def cap(logit: jax.Array, config: MoEConfig) -> jax.Array:
    """Returns logit_cap * tanh(logit / logit_cap), or the logits as they are without a cap."""
    if config.logit_cap is None:
        return logit
    return config.logit_cap * jnp.tanh(logit / config.logit_cap)


def _open(key_b: jax.Array, config: MoEConfig) -> jax.Array:
    """Returns bool [B, E]: the experts that each sequence can choose under `expert_dropout`.

    In every group of experts (all are one without `expert_groups`) the experts that drew the
    largest numbers stay open, so that `top_k` can be chosen whichever groups a token uses.
    """
    groups, kept = config.expert_groups or 1, config.groups_per_token or 1
    least = -(-config.top_k // kept)

    def open_of(key):
        drawn_ge = jax.random.uniform(key, (groups, config.choices // groups))
        bound_g1 = jax.lax.top_k(drawn_ge, least)[0][:, -1:]
        return ((drawn_ge >= config.expert_dropout) | (drawn_ge >= bound_g1)).reshape(-1)

    return draw(key_b, EXPERT_DROPOUT, open_of)
