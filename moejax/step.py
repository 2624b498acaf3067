"""The train step `(state, batch) -> (state, metrics)`, and the gradients that it is made of."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from moejax.config import Config
from moejax.data import Batch
from moejax.loss import Losses, Totals, losses, token_losses, totals
from moejax.model import packed_tokens
from moejax.optim import learning_rate, make_optimizer
from moejax.routing import RouterStats, balance, update_router_state
from moejax.sharding import path_name, replicated, tree_shardings
from moejax.state import TrainState, abstract_state, model_graph

GROUPS = ("router", "experts", "attention", "dense", "norms", "embeddings")


def parameter_group(name: str) -> str:
    """Returns which of GROUPS the parameter with this path name belongs to."""
    if name.endswith("scale"):
        return "norms"
    if name.endswith("moe/router"):
        return "router"
    for part, group in (("/moe/", "experts"), ("/attention/", "attention"), ("/ffn/", "dense")):
        if part in name:
            return group
    return "embeddings"


class StepMetrics(NamedTuple):
    """What a step says of itself: device arrays, the same on every mesh.

    Attributes:
        losses: of the whole step.
        grad_norm: global norm before clipping.
        learning_rate: of this step.
        totals: counts of the step.
        stats: routing sums [layers, ...]; None for a dense model.
        finite: by quantity, in the order of the computation: whether it is finite everywhere.
    """

    losses: Losses
    grad_norm: jax.Array
    learning_rate: jax.Array
    totals: Totals
    stats: RouterStats | None
    finite: OrderedDict[str, jax.Array]


def _forward(graph: nnx.GraphDef, params: Any, router_state, batch: Batch):
    """Runs the model on one microbatch [B, T]; returns it, the hidden states and the routing."""
    model = nnx.merge(graph, params)
    hidden_btd, stats, _ = model(batch.tokens, packed_tokens(batch.segments), router_state)
    return model, hidden_btd, stats


def _microbatch(batch: Batch, index: int) -> Batch:
    return jax.tree.map(lambda leaf: leaf[index], batch)


def _step_counts(config: Config, graph, params, router_state, batch: Batch) -> jax.Array | None:
    """Counts the step's assignments [L, E] by a forward pass ahead, where the loss needs them.

    With accumulation a global balance loss weighs each microbatch's probabilities by counts over
    all of them. Without, the microbatch is the step. The pass costs a third of a forward and
    backward.
    """
    moe, accumulation = config.moe, batch.tokens.shape[0]
    if accumulation == 1 or config.num_moe_layers == 0:
        return None
    if moe.balance_scope != "global" or moe.balance_loss_weight == 0:
        return None

    def count(total_le, microbatch):
        _, _, stats = _forward(graph, params, router_state, microbatch)
        return total_le + stats.count_e, None

    start = jnp.zeros((config.num_moe_layers, moe.num_experts), jnp.int32)
    return jax.lax.scan(count, start, batch)[0]


def gradients(
    config: Config,
    graph: nnx.GraphDef,
    params: Any,
    router_state: dict[str, jax.Array],
    batch: Batch,
) -> tuple[Any, Losses, RouterStats | None, Totals]:
    """Returns the step's gradients, losses and routing: of one large batch, however it is split.

    Args:
        graph: of `model_graph`.
        batch: arrays [accumulation, B, T].
    """
    total = totals(batch.loss_mask, batch.segments)
    count_le = _step_counts(config, graph, params, router_state, batch)

    def objective(params, microbatch):
        model, hidden_btd, stats = _forward(graph, params, router_state, microbatch)
        with jax.named_scope("loss"):
            loss_bt = token_losses(model.unembed(hidden_btd), microbatch.targets)
            counts = count_le if count_le is not None or stats is None else stats.count_e
            parts = losses(loss_bt, microbatch.loss_mask, stats, counts, total, config.moe)
        return parts.total, (parts, stats)

    gradient = jax.grad(objective, has_aux=True)
    first = _microbatch(batch, 0)
    if batch.tokens.shape[0] == 1:
        grads, (parts, stats) = gradient(params, first)
    else:

        def accumulate(carry, microbatch):
            new = gradient(params, microbatch)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, new), None

        shapes = jax.eval_shape(gradient, params, first)
        start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _sum_dtype(leaf)), shapes)
        (grads, (parts, stats)), _ = jax.lax.scan(accumulate, start, batch)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    return grads, _whole_step(parts, stats, total, config), stats, total


def _sum_dtype(leaf: Any):
    """Returns float32 for a narrower float, which would lose small terms of a long sum."""
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return jnp.float32 if narrow else leaf.dtype


def _whole_step(parts: Losses, stats: RouterStats | None, total: Totals, config: Config) -> Losses:
    """Returns the losses of the step; a global balance loss from the summed routing."""
    if stats is None or config.moe.balance_scope == "sequence":
        return parts
    per_layer = jax.vmap(lambda count, p: balance(count, p, total.tokens))
    balance_loss = per_layer(stats.count_e, stats.probability_e).sum()
    moe = config.moe
    weighted = moe.balance_loss_weight * balance_loss + moe.router_z_loss_weight * parts.z
    return Losses(parts.loss, balance_loss, parts.z, parts.loss + weighted)


def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _finite(
    parts: Losses, stats: RouterStats | None, grads: Any, grad_norm: jax.Array, params: Any
) -> OrderedDict[str, jax.Array]:
    """Returns which quantities are finite; the first that is not is where trouble showed first."""
    finite = OrderedDict()  # a dict would leave `jit` sorted by name
    if stats is not None:
        finite |= {
            f"router logits of MoE layer {i}": jnp.isfinite(z) for i, z in enumerate(stats.z)
        }
    finite |= {"loss": jnp.isfinite(parts.loss), "total_loss": jnp.isfinite(parts.total)}
    by_group: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        by_group.setdefault(parameter_group(path_name(path)), []).append(leaf)
    for group in GROUPS:
        if group in by_group:
            finite[f"gradient of {group}"] = _all_finite(by_group[group])
    finite["grad_norm"] = jnp.isfinite(grad_norm)
    finite["parameters after the step"] = _all_finite(params)
    return finite


def train_step(
    config: Config, mesh: Mesh, optimizer: optax.GradientTransformation, graph: nnx.GraphDef
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics, Any]]:
    """Returns `(state, batch) -> (state, metrics, gradients)`, pure; `make_train_step` jits it."""
    schedule = learning_rate(config.optim, config.train.steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics, Any]:
        grads, parts, stats, total = gradients(
            config, graph, state.params, state.router_state, batch
        )
        grads = jax.lax.with_sharding_constraint(grads, tree_shardings(mesh, grads))
        grad_norm = optax.tree.norm(grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        router_state = state.router_state
        if stats is not None:
            router_state = update_router_state(router_state, stats.count_e, config.moe)
        metrics = StepMetrics(
            losses=parts,
            grad_norm=grad_norm,
            learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
            totals=total,
            stats=stats,
            finite=_finite(parts, stats, grads, grad_norm, params),
        )
        state = TrainState(state.step + 1, params, opt_state, router_state, state.rng)
        return state, metrics, grads

    return step


Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def make_train_step(config: Config, mesh: Mesh) -> tuple[Step, TrainState]:
    """Returns the jitted, donating step, and the state that it takes as shapes with shardings."""
    optimizer = make_optimizer(config.optim, config.train.steps)
    step = train_step(config, mesh, optimizer, model_graph(config, mesh))
    abstract = abstract_state(config, mesh, optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def without_gradients(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return step(state, batch)[:2]

    jitted = jax.jit(
        without_gradients, donate_argnums=0, out_shardings=(shardings, replicated(mesh))
    )
    return jitted, abstract
