"""The train step `(state, batch) -> (state, metrics)`, and the gradients that it applies."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from moejax.attention import packed_tokens
from moejax.config import Config
from moejax.data import Batch
from moejax.loss import (
    Losses,
    Totals,
    auxiliary_loss,
    auxiliary_part,
    cross_entropy,
    microbatch_balance,
    needs_whole_step,
    totals,
    whole_losses,
)
from moejax.optim import learning_rate, make_optimizer
from moejax.parameters import kind_of
from moejax.router_state import update_router_state
from moejax.router_stats import RouterStats
from moejax.sharding import path_name, replicated, tree_shardings
from moejax.state import TrainState, abstract_state, model_graph
from moejax.watch import Verdict, judge

GROUPS = ("router", "experts", "shared", "attention", "dense", "norms", "embeddings")


def parameter_group(name: str) -> str:
    """Returns which of GROUPS the parameter with this path name belongs to."""
    owner, _, last = name.rpartition("/")
    if owner.endswith("moe"):
        return kind_of(last)
    if last == "scale":
        return "norms"
    for part, group in (("/attention/", "attention"), ("/ffn/", "dense")):
        if part in name:
            return group
    return "embeddings"


class StepMetrics(NamedTuple):
    """What a step reports: device arrays, the same on every mesh.

    Attributes:
        losses: of the whole step.
        grad_norm: global norm before clipping.
        learning_rate: of this step.
        totals: counts of the step.
        stats: routing sums [layers, ...]; None for a dense model.
        choice_albts: int32 [accumulation, MoE layers, B, T, S]; the experts that tokens chose, with
            `logging.choices`, else None.
        router_state: after the step, [layers, ...], without the table of router `hash`.
        finite: bool by quantity, in the order of the computation: whether all of it is finite.
        verdict: whether the step is abnormal, and whether it was left without effect.
    """

    losses: Losses
    grad_norm: jax.Array
    learning_rate: jax.Array
    totals: Totals
    stats: RouterStats | None
    choice_albts: jax.Array | None
    router_state: dict[str, jax.Array]
    finite: OrderedDict[str, jax.Array]
    verdict: Verdict


class Microbatch(NamedTuple):
    """What the forward pass of one microbatch reads; with a leading dim, all those of a step.

    Attributes:
        batch: arrays [B, T].
        key_b: uint32 [B, 2]; random key data of each sequence.
        choice_lbts: int32 [MoE layers, B, T, S]; choices to replay, or None.
    """

    batch: Batch
    key_b: jax.Array
    choice_lbts: jax.Array | None


def sequence_keys(rng: jax.Array, step: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Returns uint32 [accumulation, B, 2]: key data of each sequence of a step.

    A function of the run's seed, the step and the sequence's row in the whole step alone, so that
    what a router draws is the same on every layout.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(rng), step)
    rows = jnp.arange(shape[0] * shape[1], dtype=jnp.uint32)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    return jax.random.key_data(keys).reshape(*shape, -1)


def _forward(graph: nnx.GraphDef, params: Any, router_state, part: Microbatch):
    """Runs the model on one microbatch; returns it and its outputs."""
    model = nnx.merge(graph, params)
    tokens = packed_tokens(part.batch.segments, part.key_b)
    out = model(part.batch.tokens, tokens, router_state, choice_lbts=part.choice_lbts)
    return model, out


def _step_stats(
    config: Config, graph, params, router_state, parts: Microbatch, total: Totals
) -> RouterStats | None:
    """Returns the routing sums of the whole step, which the losses of its microbatches need.

    With accumulation, a loss that is not linear in the sums weighs each microbatch by the loss's
    slope at the sums of the whole step. Those take one more forward pass, a third of the cost of a
    forward and backward pass; without such a loss, only the counts of tokens are filled in. None
    without accumulation, where the microbatch is the step, and for a dense model.
    """
    if parts.batch.tokens.shape[0] == 1 or config.num_moe_layers == 0:
        return None

    def stats(part: Microbatch) -> RouterStats:
        return _forward(graph, params, router_state, part)[1].stats

    shapes = jax.eval_shape(stats, _first(parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    if not needs_whole_step(config.moe):
        layers = jnp.ones(config.num_moe_layers, jnp.int32)
        return zeros._replace(tokens=layers * total.tokens, sequences=layers * total.sequences)
    return jax.lax.scan(lambda sums, part: (_add(sums, stats(part)), None), zeros, parts)[0]


def _first(parts: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], parts)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), a, b)


def gradients(
    config: Config,
    graph: nnx.GraphDef,
    params: Any,
    router_state: dict[str, jax.Array],
    parts: Microbatch,
) -> tuple[Any, Losses, RouterStats | None, Totals, jax.Array | None]:
    """Returns the step's gradients, losses, routing, totals and, if they are logged, choices.

    They are those of one large batch, however it is split.

    Args:
        graph: of `model_graph`.
        parts: with a leading dim of microbatches.
    """
    total = totals(parts.batch.loss_mask, parts.batch.segments)
    whole = _step_stats(config, graph, params, router_state, parts, total)
    objective = functools.partial(
        _objective, config=config, graph=graph, router_state=router_state, whole=whole, total=total
    )
    gradient = jax.grad(objective, has_aux=True)
    if parts.batch.tokens.shape[0] == 1:
        grads, (sums, choices) = gradient(params, _first(parts))
        choices = jax.tree.map(lambda leaf: leaf[None], choices)
    else:
        grads, (sums, choices) = _accumulated(gradient, params, parts)
    loss, balance_l, stats = sums
    losses = whole_losses(loss, balance_l, stats, router_state.get("l1"), config.moe)
    return grads, losses, stats, total, choices


def _objective(
    params: Any,
    part: Microbatch,
    *,
    config: Config,
    graph: nnx.GraphDef,
    router_state: dict[str, jax.Array],
    whole: RouterStats | None,
    total: Totals,
) -> tuple[jax.Array, tuple[tuple, jax.Array | None]]:
    """Returns a microbatch's share of what the step minimises, and what else comes of it.

    Args:
        whole: of `_step_stats`.

    Returns:
        The share; then what adds up over microbatches (cross-entropy, microbatch-level balance loss
        [L] or None, routing sums) and the choices, None if they are not logged.
    """
    moe, l1_l = config.moe, router_state.get("l1")
    model, out = _forward(graph, params, router_state, part)
    with jax.named_scope("loss"):
        summed = model.summed_loss(out.hidden_btd, part.batch.targets, part.batch.loss_mask)
        loss = share = cross_entropy(summed, total)
        balance_l = None
        if out.stats is not None:
            if whole is None:
                share += auxiliary_loss(out.stats, l1_l, moe)
            else:
                share += auxiliary_part(out.stats, whole, l1_l, moe)
            if moe.microbatch_balance_loss_weight:
                balance_l = microbatch_balance(out.stats, total, moe)
                share += moe.microbatch_balance_loss_weight * balance_l.sum()
    choices = out.choice_lbts if config.logging.choices else None
    return share, ((loss, balance_l, out.stats), choices)


def _accumulated(gradient: Callable, params: Any, parts: Microbatch) -> tuple[Any, tuple]:
    """Returns what `gradient` gives for each microbatch, added up; choices are stacked."""

    def accumulate(sums, part: Microbatch):
        grads, (values, choices) = gradient(params, part)
        return _add(sums, (grads, values)), choices

    grads, (values, _) = jax.eval_shape(gradient, params, _first(parts))
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _sum_dtype(leaf)), (grads, values))
    (grads, values), choices = jax.lax.scan(accumulate, start, parts)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), (values, choices)


def _sum_dtype(leaf: Any):
    """Returns float32 for a narrower float, which would lose small terms of a long sum."""
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return jnp.float32 if narrow else leaf.dtype


def global_norm(tree: Any) -> jax.Array:
    """Returns the float32 norm of all arrays together; a sum in bfloat16 stops growing at 256."""
    return optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree))


def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _finite(
    losses: Losses, stats: RouterStats | None, grads: Any, grad_norm: jax.Array
) -> OrderedDict[str, jax.Array]:
    """Returns which quantities are finite; the first that is not is where trouble showed first."""
    finite = OrderedDict()  # a dict would leave `jit` sorted by name
    if stats is not None:
        finite |= {
            f"router logits of MoE layer {i}": jnp.isfinite(z) for i, z in enumerate(stats.z)
        }
    finite |= {"loss": jnp.isfinite(losses.loss), "total_loss": jnp.isfinite(losses.total)}
    by_group: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        by_group.setdefault(parameter_group(path_name(path)), []).append(leaf)
    for group in GROUPS:
        if group in by_group:
            finite[f"gradient of {group}"] = _all_finite(by_group[group])
    finite["grad_norm"] = jnp.isfinite(grad_norm)
    return finite


def train_step(
    config: Config, mesh: Mesh, optimizer: optax.GradientTransformation, graph: nnx.GraphDef
) -> Callable[..., tuple[TrainState, StepMetrics, Any]]:
    """Returns `(state, batch) -> (state, metrics, gradients)`, pure; `make_train_step` jits it.

    A third argument, choices [accumulation, MoE layers, B, T, S], replays those instead of choosing
    experts; the router state then stays as it is.
    """
    schedule = learning_rate(config.optim, config.train.steps)

    def step(
        state: TrainState, batch: Batch, choices: jax.Array | None = None
    ) -> tuple[TrainState, StepMetrics, Any]:
        key_ab = sequence_keys(state.rng, state.step, batch.tokens.shape[:2])
        grads, losses, stats, total, chosen = gradients(
            config, graph, state.params, state.router_state, Microbatch(batch, key_ab, choices)
        )
        grads = jax.lax.with_sharding_constraint(grads, tree_shardings(mesh, grads))
        grad_norm = global_norm(grads)
        finite = _finite(losses, stats, grads, grad_norm)
        values = {"loss": losses.loss, "grad_norm": grad_norm}
        sound = jnp.stack(list(finite.values())).all()
        verdict, watch = judge(config.watch, state.watch, values, sound)

        def update() -> tuple[Any, Any, dict[str, jax.Array]]:
            with jax.named_scope("optimizer"):
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
                params = optax.apply_updates(state.params, updates)
            router_state = state.router_state
            if stats is not None and choices is None:
                router_state = update_router_state(router_state, stats, config.moe)
            return params, opt_state, router_state

        before = (state.params, state.opt_state, state.router_state)
        skips = config.watch.skips  # a branch, not a choice of results: that would hold both
        after = jax.lax.cond(verdict.skipped, lambda: before, update) if skips else update()
        params, opt_state, router_state = after
        finite["parameters after the step"] = _all_finite(params)
        updates = state.step - state.watch["skipped"]  # what the optimizer counts
        metrics = StepMetrics(
            losses=losses,
            grad_norm=grad_norm,
            learning_rate=jnp.asarray(schedule(updates), jnp.float32),
            totals=total,
            stats=stats,
            choice_albts=chosen,
            router_state={k: v for k, v in router_state.items() if k != "table"},
            finite=finite,
            verdict=verdict,
        )
        state = TrainState(state.step + 1, params, opt_state, router_state, state.rng, watch)
        return state, metrics, grads

    return step


Step = Callable[..., tuple[TrainState, StepMetrics]]  # of state, batch and choices to replay


def make_train_step(config: Config, mesh: Mesh, *, donate: bool = True) -> tuple[Step, TrainState]:
    """Returns the jitted step, and the state that it takes as shapes with shardings.

    Args:
        donate: reuse the memory of the state for the next one; the old state is then invalid.
    """
    optimizer = make_optimizer(config.optim, config.train.steps)
    step = train_step(config, mesh, optimizer, model_graph(config, mesh))
    abstract = abstract_state(config, mesh, optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def without_gradients(
        state: TrainState, batch: Batch, choices: jax.Array | None = None
    ) -> tuple[TrainState, StepMetrics]:
        return step(state, batch, choices)[:2]

    jitted = jax.jit(
        without_gradients,
        donate_argnums=0 if donate else (),
        out_shardings=(shardings, replicated(mesh)),
    )
    return jitted, abstract
