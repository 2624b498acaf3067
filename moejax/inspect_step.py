"""What `inspect` computes on the devices: (params, router_state, pages) -> sums, choices, losses.

Jitted functions over the microbatches of a batch, dropless, with an expert left out where its entry
of keep_le is 0. Sums are taken here; what is counted by token is left to the host.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moejax.atlas import PARTS
from moejax.attention import packed_tokens
from moejax.config import Config
from moejax.data import Batch
from moejax.routing import KEEP, Inspected
from moejax.sharding import replicated
from moejax.state import model_graph


def experts_by_layer(config: Config) -> np.ndarray:
    """Returns int [L]: what a token chooses from in each MoE layer."""
    counts = [[stack.config.choices] * stack.num_layers for stack, _ in config.moe_stacks()]
    return np.array(list(itertools.chain(*counts)), np.int32)


class Page(NamedTuple):
    """Rows of validation text, arrays [B, T].

    domain, part: int32; of the token itself: its domain, and the tenth of its document.
    """

    batch: Batch
    domain: Any
    part: Any


class Sums(NamedTuple):
    """What the tokens of a batch did, as sums; see `Atlas` for each."""

    load_dle: Any
    load_ple: Any
    coactivation_lee: Any
    norm_le: Any


class Seen(NamedTuple):
    """Choices and losses of a batch.

    expert_albts: int32 [A, L, B, T, K]; E for none.
    loss_abt: float32; nats of each target.
    """

    expert_albts: Any
    loss_abt: Any


def make_inspect_steps(
    config: Config, mesh: Mesh, num_domains: int
) -> tuple[Callable, Callable, Callable]:
    """Returns three jitted functions of (params, router_state, keep_le, pages [A, B, T]).

    The first gives (`Sums`, int16 choices [A, L, B, T, K]), the second `Seen`, the third all that
    is seen of a text, `Inspected` with leaves [A, L, B, T, K], and losses. An expert whose entry in
    keep_le is 0 is left out.
    """
    graph = model_graph(config, mesh)
    experts = config.moe.choices

    def forward(batch: Batch, params, router_state, keep_le):
        model = nnx.merge(graph, params)
        state = router_state | {KEEP: keep_le}
        out = model(batch.tokens, packed_tokens(batch.segments), state)
        assert out.inspected is not None
        return model, out.hidden_btd, counted_choices(out.inspected, config)

    def by_microbatch(one: Callable):
        @partial(jax.jit, out_shardings=replicated(mesh))
        def run(params, router_state, keep_le, pages: Page):
            return jax.lax.map(lambda page: one(page, params, router_state, keep_le), pages)

        return run

    def sums(page: Page, *weights):
        _, _, seen = forward(page.batch, *weights)
        domain_btd = jax.nn.one_hot(page.domain, num_domains, dtype=jnp.float32)
        part_btp = jax.nn.one_hot(page.part, PARTS, dtype=jnp.float32)
        by_layer = jax.lax.map(lambda layer: layer_sums(layer, domain_btd, part_btp, experts), seen)
        return by_layer, seen.expert_bts.astype(jnp.int16)

    def losses(page: Page, *weights):
        model, hidden_btd, seen = forward(page.batch, *weights)
        loss_bt = model.token_losses(hidden_btd, page.batch.targets)
        return Seen(seen.expert_bts.astype(jnp.int16), loss_bt)

    def text(page: Page, *weights):
        model, hidden_btd, seen = forward(page.batch, *weights)
        return seen, model.token_losses(hidden_btd, page.batch.targets)

    return by_microbatch(sums), by_microbatch(losses), by_microbatch(text)


def counted_choices(seen: Inspected, config: Config) -> Inspected:
    """Returns the choices that count, E of the largest layer for none.

    Router `dense` takes every expert for every token: a token counts at that of the largest weight.
    """
    count_l111 = jnp.asarray(experts_by_layer(config))[:, None, None, None]
    experts = config.moe.choices
    seen = seen._replace(
        expert_bts=jnp.where(seen.expert_bts < count_l111, seen.expert_bts, experts)
    )
    if config.moe.router != "dense":
        return seen
    best = jnp.argmax(seen.weight_bts, axis=-1)[..., None]
    return Inspected(*(jnp.take_along_axis(leaf, best, axis=-1) for leaf in seen))


def layer_sums(seen: Inspected, domain_btd, part_btp, experts: int) -> Sums:
    """Returns the sums of one layer. Counts are exact: float32 holds whole numbers to 2^24."""

    def add(sums, choice):
        expert_bt, norm_bt = choice
        here_bte = jax.nn.one_hot(expert_bt, experts, dtype=jnp.float32)
        taken_bte, norm_e = sums
        return (taken_bte + here_bte, norm_e + (norm_bt[..., None] * here_bte).sum((0, 1))), None

    columns = (jnp.moveaxis(seen.expert_bts, -1, 0), jnp.moveaxis(seen.norm_bts, -1, 0))
    zeros = (jnp.zeros((*domain_btd.shape[:2], experts)), jnp.zeros(experts))
    (taken_bte, norm_e), _ = jax.lax.scan(add, zeros, columns)

    def count(letters: str, other) -> jax.Array:
        return jnp.einsum(letters, taken_bte, other).astype(jnp.int32)

    return Sums(
        count("bte,btd->de", domain_btd),
        count("bte,btp->pe", part_btp),
        count("bte,btf->ef", taken_bte),
        norm_e,
    )
