"""Trains the arms of the claims: one program trains all seeds of an arm side by side, by `vmap`.

An arm is a config of the package and a task. The step is the trainer's own `step.train_step`, the
model its `Decoder`. A seed decides the language, the data order and the parameters, so arms with
the same seed differ in nothing but what their configs say: layers that two arms have in common
start from the same numbers.
"""

import dataclasses
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moejax.attention import packed_tokens
from moejax.claims.tasks import MarkovTask
from moejax.config import Config
from moejax.loss import token_losses
from moejax.mesh import single_device_mesh
from moejax.model import LayerRouting, layer_inputs
from moejax.optim import make_optimizer
from moejax.overrides import config_values, value_difference
from moejax.records import layer_summary
from moejax.router_state import initial_router_state
from moejax.routing import route
from moejax.sharding import path_name
from moejax.state import TrainState, model_graph, split_model
from moejax.step import train_step

VERSION = 1  # of what this file computes; another one makes stored results stale
WINDOW = 25  # steps that a point of a curve is averaged over
INIT, TABLE, DATA, VALIDATION, ROUTER = range(5)  # what a seed's key is folded with

Change = Literal["zero_router", "upcycle"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One config, trained with several seeds.

    Attributes:
        name: of its files and of its row in a table.
        config: of the model and its training; its `seed` is not used.
        task: the data.
        seeds: how many, from 0.
        evaluations: by name, what is changed in `config.moe` to evaluate the trained model;
            `dropless` and `as trained` are there always.
        routing_after: steps after which the experts of fixed sequences are recorded.
        start: the arm whose last parameters this one starts from.
        change: what is done to the first parameters.
        without: part of a parameter's path; such parameters are 0 in one more evaluation.
        left_to_right: whether the model is evaluated token by token too, as it would generate.
    """

    name: str
    config: Config
    task: MarkovTask = MarkovTask()
    seeds: int = 3
    evaluations: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    routing_after: tuple[int, ...] = ()
    start: "Arm | None" = None
    change: Change | None = None
    without: str | None = None
    left_to_right: bool = False

    @property
    def key(self) -> str:
        """A hash of all that decides the result."""
        return key_of(self)

    @property
    def steps_before(self) -> int:
        """Steps of the arms that this one starts from; their data is not seen again."""
        if self.start is None:
            return 0
        return self.start.steps_before + self.start.config.train.steps


def key_of(arm: Any) -> str:
    """Returns a hash of an arm: of its fields, and of its config what is not the default.

    A key that is new in the config and has its default changes nothing.
    """
    values = {field.name: getattr(arm, field.name) for field in dataclasses.fields(arm)}
    values["config"] = value_difference(config_values(Config()), config_values(arm.config))
    values["start"] = None if arm.start is None else arm.start.key
    values["task"] = repr(values.get("task"))
    text = json.dumps([VERSION, values], sort_keys=True, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Seeds(NamedTuple):
    """What differs between seeds: arrays with a leading dim of seeds."""

    key: jax.Array
    table: jax.Array


def make_seeds(task: MarkovTask, seeds: tuple[int, ...]) -> Seeds:
    """Returns the keys and languages of these seeds."""
    key = jnp.stack([jax.random.key(seed) for seed in seeds])
    return Seeds(key, jax.vmap(lambda k: task.table(jax.random.fold_in(k, TABLE)))(key))


class Step(NamedTuple):
    """What is kept of one training step: [seeds, ...]; None where the model has no such thing."""

    loss: jax.Array
    count_le: jax.Array | None
    dropped_le: jax.Array | None
    l1_l: jax.Array | None  # the coefficient of router `relu`


def initial_states(arm: Arm, seeds: Seeds, start: Any) -> TrainState:
    """Returns the states before the first step.

    Args:
        start: parameters and router state to start from, with a leading dim of seeds, or None.
    """
    config, mesh = arm.config, single_device_mesh()
    optimizer = make_optimizer(config.optim, config.train.steps)

    def init(key, start):
        params = split_model(config, mesh, jax.random.fold_in(key, INIT))[1]
        router_state = initial_router_state(
            config.moe, config.num_moe_layers, config.model.vocab_size
        )
        if arm.change == "upcycle":
            params = upcycled(start[0], params)
        elif start is not None:
            params, router_state = start
        if arm.change == "zero_router":
            params = without(params, "moe/router")
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            router_state=router_state,
            rng=jax.random.key_data(jax.random.fold_in(key, ROUTER)),
        )

    # seed after seed: the draws of all seeds in one program take several times as long to compile
    run = jax.jit(init)
    states = [run(*of_seed((seeds.key, start), index)) for index in range(len(seeds.key))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return jax.device_put(stacked, _whole())


def of_seed(stacked: Any, index: int) -> Any:
    """Returns one seed's part of arrays with a leading dim of seeds."""
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def without(params: Any, part: str) -> Any:
    """Returns parameters with 0 in every one whose path has `part` in it."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if part in path_name(path) else leaf, params
    )


def upcycled(dense: Any, params: Any) -> Any:
    """Copies a dense model's feed-forward into every expert (Komatsuzaki et al. 2022).

    Args:
        dense: parameters of the dense model: all its layers stand in `prefix`.
        params: of the MoE model of the same depth, which has every layer in `runs`; its router is
            kept.
    """
    block, sparse = dense["prefix"]["layer_0"], params["runs"]["layer_0"]
    moe = {
        name: jnp.broadcast_to(block["ffn"][name][:, None], leaf.shape)
        for name, leaf in sparse["moe"].items()
        if name != "router"
    }
    copied = {name: leaf for name, leaf in block.items() if name != "ffn"}
    run = {**copied, "moe": {**sparse["moe"], **moe}}
    rest = {name: leaf for name, leaf in dense.items() if name != "prefix"}
    return {**rest, "runs": {"layer_0": run}}


def make_step(arm: Arm) -> Callable[[TrainState, Seeds], tuple[TrainState, Step]]:
    """Returns the jitted, donating step of all seeds at once; it makes its own batches."""
    config, mesh = arm.config, single_device_mesh()
    optimizer = make_optimizer(config.optim, config.train.steps)
    step = train_step(config, mesh, optimizer, model_graph(config, mesh))

    def one(state: TrainState, seed: Seeds) -> tuple[TrainState, Step]:
        key = jax.random.fold_in(seed.key, DATA)
        key = jax.random.fold_in(key, state.step + arm.steps_before)
        batch = arm.task.batch(key, seed.table, config.train.batch_size)
        state, metrics, _ = step(state, jax.tree.map(lambda leaf: leaf[None], batch))
        stats = metrics.stats
        if stats is None:
            return state, Step(metrics.losses.loss, None, None, None)
        l1_l = metrics.router_state.get("l1")
        return state, Step(metrics.losses.loss, stats.count_e, stats.dropped_e, l1_l)

    return jax.jit(jax.vmap(one), donate_argnums=0, out_shardings=_whole())


def _whole() -> NamedSharding:
    """Returns where states lie, before a step as after it: another place compiles it again."""
    return NamedSharding(single_device_mesh(), PartitionSpec())


class Trained(NamedTuple):
    """An arm after its last step.

    Attributes:
        params, router_state: with a leading dim of seeds.
        steps: `Step` of NumPy arrays [steps, seeds, ...].
        routing: by step, the experts of the fixed sequences int32 [seeds, L, N, T, S].
        seconds: wall clock of a step, compiling left out.
    """

    params: Any
    router_state: Any
    steps: Step
    routing: dict[int, np.ndarray]
    seconds: float


def train(arm: Arm, seeds: Seeds, start: Any = None) -> Trained:
    """Trains an arm with these seeds; see `initial_states` for `start`."""
    states, step = initial_states(arm, seeds, start), make_step(arm)
    records, routing, seconds = [], {}, []
    look = make_probe(arm) if arm.routing_after else None
    for number in range(1, arm.config.train.steps + 1):
        began = time.perf_counter()
        states, record = step(states, seeds)
        records.append(jax.device_get(record))
        seconds.append(time.perf_counter() - began)
        if look is not None and number in arm.routing_after:
            routing[number] = np.asarray(look(states.params, states.router_state, seeds).expert)
    steps = jax.tree.map(lambda *leaves: np.stack(leaves), *records)
    return Trained(
        states.params, states.router_state, steps, routing, float(np.median(seconds[1:] or seconds))
    )


# Evaluation

EVALUATED = 16  # batches of 64 sequences: 32,768 tokens


def evaluate(arm: Arm, config: Config, params: Any, router_state: Any, seeds: Seeds) -> dict:
    """Evaluates all seeds on fresh sequences.

    Args:
        config: what to run, which may have other capacities than the arm.

    Returns:
        `loss` and `drop_fraction` [seeds] and, for an MoE, by layer [seeds][L] `max_violation`,
        `dead_experts`, `router_entropy`, `z` (mean of logsumexp(logits)^2) and `active` (experts a
        token, those without a network left out).
    """
    graph = model_graph(config, single_device_mesh())

    @jax.jit
    def one(params, router_state, seed: Seeds, index):
        key = jax.random.fold_in(jax.random.fold_in(seed.key, VALIDATION), index)
        batch = arm.task.batch(key, seed.table, config.train.batch_size)
        model = nnx.merge(graph, params)
        out = model(batch.tokens, packed_tokens(batch.segments), router_state)
        loss_bt = token_losses(model.unembed(out.hidden_btd), batch.targets)
        return jnp.mean(loss_bt, where=batch.loss_mask), out.stats

    parts = [_by_seed(one, params, router_state, seeds, index) for index in range(EVALUATED)]
    losses = np.stack([loss for loss, _ in parts]).mean(0, dtype=np.float64)
    result = {"loss": losses.tolist(), "drop_fraction": [0.0] * len(losses)}
    if config.num_moe_layers:
        stats = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *[s for _, s in parts])
        result |= _routing_fields(stats, config.moe.num_experts)
    return result


def _by_seed(run: Callable, params: Any, router_state: Any, seeds: Seeds, *rest: Any) -> Any:
    """Runs a jitted function seed after seed; returns its results stacked, as NumPy arrays.

    Not by `vmap`: `lax.ragged_dot` has no batching rule for groups that all seeds share.
    """
    results = []
    for index in range(len(seeds.key)):
        own = of_seed((params, router_state, seeds), index)
        results.append(jax.device_get(run(*own, *rest)))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *results)


def evaluate_left_to_right(arm: Arm, params: Any, router_state: Any, seeds: Seeds) -> dict:
    """Evaluates every target by a pass over the tokens before it, as in generation.

    Returns:
        `loss` [seeds] and `parallel` [seeds], the loss of the same targets by one pass over all.
    """
    config = arm.config
    graph = model_graph(config, single_device_mesh())
    batches = max(1, EVALUATED // 4)

    def loss_of(params, router_state, batch):
        model = nnx.merge(graph, params)
        out = model(batch.tokens, packed_tokens(batch.segments), router_state)
        return token_losses(model.unembed(out.hidden_btd), batch.targets)

    @jax.jit
    def one(params, router_state, seed: Seeds, index):
        key = jax.random.fold_in(jax.random.fold_in(seed.key, VALIDATION), index)
        batch = arm.task.batch(key, seed.table, config.train.batch_size)
        position_t = jnp.arange(arm.task.length)

        def at(position):
            seen_bt = jnp.broadcast_to(position_t <= position, batch.segments.shape)
            cut = batch._replace(segments=seen_bt.astype(jnp.int32))
            return loss_of(params, router_state, cut)[:, position]

        alone_bt = jax.lax.map(at, position_t).T
        parallel_bt = loss_of(params, router_state, batch)
        mask = batch.loss_mask
        return jnp.mean(alone_bt, where=mask), jnp.mean(parallel_bt, where=mask)

    parts = np.array([_by_seed(one, params, router_state, seeds, i) for i in range(batches)])
    loss, parallel = parts.mean(0, dtype=np.float64)
    return {"loss": loss.tolist(), "parallel": parallel.tolist()}


def _routing_fields(stats: Any, num_experts: int) -> dict[str, list]:
    """Divides routing sums [seeds, L, ...] of an evaluation."""
    summaries = [layer_summary(count_le) for count_le in stats.count_e]
    asked = stats.count_e.sum((1, 2))
    return {
        "drop_fraction": (stats.dropped_e.sum((1, 2)) / asked).tolist(),
        "max_violation": [summary["max_violation"] for summary in summaries],
        "dead_experts": [summary["dead_experts"] for summary in summaries],
        "router_entropy": (stats.entropy / stats.tokens).tolist(),
        "z": (stats.z / stats.tokens).tolist(),
        "active": (stats.count_e[..., :num_experts].sum(2) / stats.tokens).tolist(),
    }


class Probe(NamedTuple):
    """The routing of fixed sequences, [seeds, L, N, T, ...]: experts [S], weights [S], logits."""

    expert: jax.Array
    weight: jax.Array
    logit: jax.Array
    domain: jax.Array


def make_probe(arm: Arm, sequences: int = 512) -> Callable[[Any, Any, Seeds], Probe]:
    """Returns what routes `sequences` fixed sequences and tells of every token and layer."""
    config = arm.config
    graph = model_graph(config, single_device_mesh())

    @jax.jit
    def one(params, router_state, seed: Seeds) -> Probe:
        key = jax.random.fold_in(jax.random.fold_in(seed.key, VALIDATION), EVALUATED)
        batch = arm.task.batch(key, seed.table, sequences)
        model, tokens = nnx.merge(graph, params), packed_tokens(batch.segments)
        x_btd = model.embedding[...][batch.tokens]
        run_graph, stacked = nnx.split(model.runs)
        routings = []
        for layer in range(config.num_moe_layers):
            take = functools.partial(jax.tree.map, lambda leaf, layer=layer: leaf[layer])
            run = nnx.merge(run_graph, take(nnx.to_pure_dict(stacked)))
            number = jnp.asarray(layer, jnp.int32)
            about = LayerRouting(take(router_state), number, batch.tokens, None)
            block = run.layer_0
            mixed_btd, _ = block.attention(block.attention_norm(x_btd), tokens, None)
            normed_btd = block.ffn_norm(x_btd + mixed_btd)
            weights = {name: getattr(block.moe, name)[...] for name in block.moe.names}
            inputs = layer_inputs(tokens, about)
            routings.append(route(normed_btd, weights, about.state, inputs, config.moe))
            x_btd, _, _ = run(x_btd, tokens, about, None)
        routing = jax.tree.map(lambda *leaves: jnp.stack(leaves), *routings)
        return Probe(routing.expert_bts, routing.weight_bts, routing.logit_bte, batch.domains[:, 0])

    return functools.partial(_by_seed, one)


def probe_fields(probe: Probe, num_experts: int) -> dict[str, list]:
    """Returns by seed and layer: `max_logit`, `selected_weight` (sum over a token's experts) and
    `information` of the domain on the expert, nats."""
    expert, domain = np.asarray(probe.expert), np.asarray(probe.domain)
    layers = range(expert.shape[1])
    return {
        "max_logit": np.abs(probe.logit).max((2, 3, 4)).tolist(),
        "selected_weight": np.asarray(probe.weight).sum(-1).mean((2, 3)).tolist(),
        "information": [
            [mutual_information(expert[s, layer], domain[s], num_experts) for layer in layers]
            for s in range(len(expert))
        ],
    }


def mutual_information(expert_nts: np.ndarray, domain_n: np.ndarray, num_experts: int) -> float:
    """Returns I(domain; expert) in nats, of the assignments [N, T, S] of sequences of domains."""
    joint = np.zeros((domain_n.max() + 1, num_experts))
    domain_nts = np.broadcast_to(domain_n[:, None, None], expert_nts.shape)
    real = expert_nts < num_experts
    np.add.at(joint, (domain_nts[real], expert_nts[real]), 1)
    joint /= joint.sum()
    apart = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True)
    seen = joint > 0
    return float(np.sum(joint[seen] * np.log(joint[seen] / apart[seen])))


def agreement(early: np.ndarray, late: np.ndarray) -> np.ndarray:
    """Returns by seed and layer the share of the experts `late` that were there in `early`.

    Args:
        early, late: int32 [seeds, L, N, T, S].
    """
    same = (late[..., :, None] == early[..., None, :]).any(-1)
    return same.mean((2, 3, 4))


# Results


def result_of(arm: Arm, trained: Trained, seeds: Seeds, start: Any = None) -> dict[str, Any]:
    """Evaluates a trained arm in all the ways that it asks for; returns what is stored."""
    config, moe = arm.config, arm.config.moe
    params, state = trained.params, trained.router_state

    def measure(changed, params):
        return evaluate(arm, dataclasses.replace(config, moe=changed), params, state, seeds)

    evaluations = {"as trained": measure(moe, params)}
    if config.num_moe_layers and moe.capacity_factor is None:
        evaluations["dropless"] = evaluations["as trained"]
    elif config.num_moe_layers:
        changes = {"dropless": {"capacity_factor": None}, **arm.evaluations}
        for name, change in changes.items():
            evaluations[name] = measure(dataclasses.replace(moe, **change), params)
    if arm.start is not None:
        first = initial_states(arm, seeds, start)
        evaluations["before training"] = evaluate(
            arm, config, first.params, first.router_state, seeds
        )
    if arm.left_to_right:
        evaluations["left to right"] = evaluate_left_to_right(arm, params, state, seeds)
    if arm.without is not None:
        evaluations[f"without {arm.without}"] = measure(moe, without(params, arm.without))
    result = {
        "key": arm.key,
        "arm": arm.name,
        "steps": config.train.steps,
        "parameters": sum(leaf[0].size for leaf in jax.tree.leaves(params)),
        "step_seconds": trained.seconds,
        "curve": _curve(arm, trained.steps),
        "evaluations": evaluations,
    }
    if config.num_moe_layers:
        result["probe"] = probe_fields(make_probe(arm)(params, state, seeds), moe.choices)
    if trained.routing:
        last = trained.routing[max(trained.routing)]
        result["agreement"] = {
            str(step): agreement(ids, last).tolist() for step, ids in trained.routing.items()
        }
    return result


def _curve(arm: Arm, steps: Step) -> dict[str, list]:
    """Returns means over windows of WINDOW steps, [windows][seeds].

    `loss` is of fresh sequences at the step's own parameters, dropped assignments included;
    `max_violation` of single batches, the mean over layers; `active` experts a token.
    """
    total = len(steps.loss)
    starts = range(0, total, WINDOW)

    def means(values_ns):
        return [values_ns[start : start + WINDOW].mean(0).tolist() for start in starts]

    curve = {"step": [min(start + WINDOW, total) for start in starts], "loss": means(steps.loss)}
    if steps.count_le is not None and steps.dropped_le is not None:
        count = steps.count_le.astype(np.float64)
        violation = count.max(-1) / np.maximum(count.mean(-1), 1e-9) - 1
        tokens = arm.config.train.batch_size * arm.task.length
        curve["max_violation"] = means(violation.mean(-1))
        curve["active"] = means(count.sum((-1, -2)) / (count.shape[-2] * tokens))
        if steps.l1_l is not None:
            curve["l1"] = means(steps.l1_l.mean(-1))
        asked = np.maximum(count.sum((-1, -2)), 1)
        curve["drop_fraction"] = means(steps.dropped_le.sum((-1, -2)) / asked)
    return curve


def run_arm(arm: Arm, folder: Path) -> dict[str, Any]:
    """Returns an arm's result: the stored one if its key is the same, else it is trained now."""
    file = arm_file(folder, arm)
    stored = read_result(file)
    if stored is not None and stored["key"] == arm.key:
        return stored
    seeds = make_seeds(arm.task, tuple(range(arm.seeds)))
    start = None if arm.start is None else _final_state(arm.start, folder)
    trained = train(arm, seeds, start)
    _save_state(file.with_suffix(".npz"), trained)
    result = result_of(arm, trained, seeds, start)
    text = json.dumps(result, indent=1)
    file.write_text(text + "\n", encoding="utf-8")
    return result


def arm_file(folder: Path, arm: Any) -> Path:
    """Returns where an arm's result is stored; its last state lies beside it."""
    return folder / f"{re.sub(r'[^a-z0-9.-]+', '_', arm.name.lower())}.json"


def read_result(file: Path) -> dict[str, Any] | None:
    """Returns a stored result, or None where there is none or a torn one."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _save_state(file: Path, trained: Trained) -> None:
    tree = {"params": trained.params, "router_state": trained.router_state}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays: dict[str, Any] = {path_name(path): np.asarray(leaf) for path, leaf in leaves}
    np.savez(file, **arrays)


def _final_state(arm: Arm, folder: Path) -> tuple[Any, Any]:
    """Returns parameters and router state of a trained arm, training it first if need be."""
    run_arm(arm, folder)
    params: dict[str, Any] = {}
    router_state: dict[str, Any] = {}
    with np.load(arm_file(folder, arm).with_suffix(".npz"), allow_pickle=False) as arrays:
        for name in arrays.files:
            *parts, last = name.split("/")
            node = {"params": params, "router_state": router_state}[parts[0]]
            for part in parts[1:]:
                node = node.setdefault(part, {})
            node[last] = jnp.asarray(arrays[name])
    return params, router_state
