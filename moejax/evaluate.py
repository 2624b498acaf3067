"""Evaluation on the validation split or other data: dropless, and at `moe.eval_capacity_factor`.

Sums are taken on the devices in float32, a batch at a time, and over batches on the host in
float64, so the result is the same on every mesh to rounding.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moejax.attention import packed_tokens
from moejax.checkpoint import Checkpoints, require_meta
from moejax.config import Config, MoEConfig
from moejax.corpus import load_corpus
from moejax.data import Batch, ValidationBatches, check_vocabulary
from moejax.eval_data import VALIDATION, EvalData
from moejax.loss import Totals, totals, whole_losses
from moejax.mesh import Device, make_mesh, mesh_config, peak_memory_bytes
from moejax.optim import make_optimizer
from moejax.records import loss_record, routing_record
from moejax.router_stats import RouterStats
from moejax.sharding import place_batch, replicated
from moejax.state import abstract_state, model_graph, require_room
from moejax.together import compiled_together, wait_for_all
from moejax.tokenizer import load_tokenizer
from moejax.workdir import MAY_CHANGE, MAY_CHANGE_AFTER_TRAINING, require_config_of

log = logging.getLogger("moejax")


class EvalSums(NamedTuple):
    """Sums over a batch; N counts the domains of the data.

    Attributes:
        positions: int32; tokens and padding.
        nats_n: float32 [N]; cross-entropy.
        targets_n: int32 [N]; targets that count.
        bytes_n: int32 [N]; bytes of text of those targets.
        totals: counts, see `loss.Totals`.
        stats: routing sums [layers, ...]; None for a dense model.
    """

    positions: jax.Array
    nats_n: jax.Array
    targets_n: jax.Array
    bytes_n: jax.Array
    totals: Totals
    stats: RouterStats | None


def dropless(config: MoEConfig) -> MoEConfig:
    """Returns `config` without a capacity: what evaluation and generation run."""
    transport = "reference" if config.transport == "reference" else "auto"
    return dataclasses.replace(
        config, capacity_factor=None, capacity_by_expert=None, transport=transport
    )


def at_eval_capacity(config: MoEConfig) -> MoEConfig:
    """Returns `config` with the capacity factor of evaluation; its router must take one."""
    return dataclasses.replace(config, capacity_factor=config.eval_capacity_factor)


def with_moe(config: Config, moe: MoEConfig) -> Config:
    """Returns `config` with another section `moe`."""
    return dataclasses.replace(config, moe=moe)


def make_eval_step(config: Config, mesh: Mesh, bytes_v: np.ndarray, num_domains: int):
    """Returns the jitted `(params, router_state, batch [A, B, T]) -> EvalSums`."""
    graph = model_graph(config, mesh)
    table_v = jnp.asarray(bytes_v, jnp.int32)

    def microbatch_sums(params, router_state, batch: Batch) -> EvalSums:
        model = nnx.merge(graph, params)
        out = model(batch.tokens, packed_tokens(batch.segments), router_state)
        loss_bt = model.token_losses(out.hidden_btd, batch.targets)
        domain_btn = jax.nn.one_hot(batch.domains, num_domains, dtype=jnp.int32)
        domain_btn *= batch.loss_mask[..., None].astype(jnp.int32)
        bytes_bt = table_v.at[batch.targets].get(mode="fill", fill_value=0)
        return EvalSums(
            positions=jnp.asarray(batch.tokens.size, jnp.int32),
            nats_n=jnp.einsum("bt,btn->n", loss_bt, domain_btn.astype(jnp.float32)),
            targets_n=domain_btn.sum((0, 1)),
            bytes_n=jnp.einsum("bt,btn->n", bytes_bt, domain_btn),
            totals=totals(batch.loss_mask, batch.segments),
            stats=out.stats,
        )

    @partial(jax.jit, out_shardings=replicated(mesh))
    def step(params, router_state, batch: Batch) -> EvalSums:
        sums = jax.lax.map(lambda b: microbatch_sums(params, router_state, b), batch)
        return jax.tree.map(lambda leaf: leaf.sum(0), sums)

    return step


def eval_steps(config: Config, mesh: Mesh, num_domains: int) -> dict[str, Callable]:
    """Returns the steps of an evaluation: "dropless", and "capacity" if the router takes one.

    Args:
        num_domains: the largest number of domains of the data sets that the steps will see.
    """
    bytes_v = load_tokenizer(config.data.tokenizer).bytes_v
    modes = {"dropless": dropless(config.moe)}
    if config.num_moe_layers and config.moe.takes_capacity:
        modes["capacity"] = at_eval_capacity(config.moe)
    return {
        name: compiled_together(make_eval_step(with_moe(config, moe), mesh, bytes_v, num_domains))
        for name, moe in modes.items()
    }


class Evaluator:
    """Evaluates parameters on one data set, the same sequences every time.

    Args:
        config: of the run; `eval.batches` batches of `train.batch_size` sequences.
        mesh: where to run.
        data: what on; None: the validation split of the run's data.
        steps: of `eval_steps`, to share compiled steps with other evaluators; None: make them.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        data: EvalData | None = None,
        steps: dict[str, Callable] | None = None,
    ):
        self._config, self._mesh = config, mesh
        self._data = data or EvalData(VALIDATION, load_corpus(config.data, "validation"))
        self._corpus = corpus = self._data.corpus
        check_vocabulary(corpus, config.model.vocab_size)
        length = config.data.sequence_length
        self._batches = ValidationBatches(
            corpus, length, config.train.batch_size, config.eval.batches
        )
        self.steps = steps or eval_steps(config, mesh, len(corpus.domains))

    def compile(self, params: Any, router_state: dict[str, jax.Array]) -> float:
        """Compiles the steps ahead of their first call; returns the seconds that it took."""
        begun = time.monotonic()
        batch = self._place(0)
        for name, step in self.steps.items():
            self.steps[name] = step.lower(params, router_state, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
        wait_for_all()
        return time.monotonic() - begun

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self._data.name

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the text."""
        return self._corpus.fingerprint

    def _place(self, index: int) -> Batch:
        """Puts a batch on the devices, filled up with padding to what the mesh can split."""
        train = self._config.train
        unit = mesh_config(self._mesh).token_shards * self._config.moe.group_sequences
        microbatch = -(-train.batch_size // train.accumulation // unit) * unit
        rows = partial(self._batches.rows, index)
        size = microbatch * train.accumulation
        return place_batch(self._mesh, rows, size, train.accumulation)

    def __call__(self, params: Any, router_state: dict[str, jax.Array]) -> dict[str, Any]:
        """Returns the fields of an evaluation record (see docs/metrics.md)."""
        sums: dict[str, Any] = dict.fromkeys(self.steps)
        for index in range(len(self._batches)):
            batch = self._place(index)
            for name, step in self.steps.items():
                new = jax.tree.map(_wide, jax.device_get(step(params, router_state, batch)))
                old = sums[name]
                sums[name] = new if old is None else jax.tree.map(np.add, old, new)
        sums = {name: self._with_bytes(found) for name, found in sums.items()}
        domains, moe, l1_l = self._corpus.domains, self._config.moe, router_state.get("l1")
        record = _loss_fields(sums["dropless"], domains, moe, l1_l)
        if "capacity" in sums:
            at_capacity = _loss_fields(sums["capacity"], domains, moe, l1_l)
            record["loss_at_capacity"] = at_capacity["loss"]
            record["drop_fraction_at_capacity"] = at_capacity["drop_fraction"]
            record["capacity_factor"] = self._config.moe.eval_capacity_factor
        return record

    def measure(self, params: Any, router_state: dict[str, jax.Array]) -> dict[str, Any]:
        """Returns the record, with the seconds and memory that it took; `compile` comes before."""
        begun = time.monotonic()
        record = self(params, router_state)
        seconds = time.monotonic() - begun
        return record | {
            "seconds": seconds,
            "tokens_per_second": record["tokens"] / seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _with_bytes(self, sums: Any) -> Any:
        """Returns `sums` by this data's domains, with the text's own bytes if it was read whole."""
        domains = len(self._corpus.domains)
        by_domain = {name: getattr(sums, name)[:domains] for name in ("nats_n", "targets_n")}
        bytes_n = sums.bytes_n[:domains]
        if self._data.bytes_n is not None and self._batches.whole:
            bytes_n = self._data.bytes_n
        return sums._replace(**by_domain, bytes_n=bytes_n)


def _wide(leaf: np.ndarray) -> np.ndarray:
    """Returns a batch's sum in a dtype that the sums of many batches fit into."""
    return leaf.astype(np.int64 if np.issubdtype(leaf.dtype, np.integer) else np.float64)


def _loss_fields(
    sums: Any, domains: tuple[str, ...], moe: MoEConfig, l1_l: jax.Array | None
) -> dict[str, Any]:
    """Returns losses, in all and by domain, and the routing: fields of an evaluation record."""
    fields = _cross_entropy_fields
    record = fields(sums.nats_n.sum(), sums.targets_n.sum(), sums.bytes_n.sum())
    by_domain = zip(domains, sums.nats_n, sums.targets_n, sums.bytes_n, strict=True)
    record["domains"] = {name: fields(*values) for name, *values in by_domain if values[1] > 0}
    record |= _auxiliary_fields(record["loss"], sums, moe, l1_l)
    return record | routing_record(sums.stats, int(sums.positions), int(sums.totals.tokens), moe)


def _cross_entropy_fields(nats: Any, targets: Any, size: Any) -> dict[str, Any]:
    """Returns loss, perplexity and bits per byte from a sum of `nats` over `targets` and bytes."""
    loss = float(nats / max(targets, 1))
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(loss))
    return {
        "loss": loss,
        "perplexity": perplexity,
        "bits_per_byte": float(nats / math.log(2) / max(size, 1)),
        "tokens": int(targets),
        "bytes": int(size),
    }


def _auxiliary_fields(
    loss: float, sums: Any, moe: MoEConfig, l1_l: jax.Array | None
) -> dict[str, Any]:
    """Returns the auxiliary losses of the whole split, by the same formulas as in training."""
    stats = sums.stats
    if stats is not None:
        stats = jax.tree.map(lambda leaf: jnp.asarray(leaf, _narrow(leaf)), stats)
    l1_l = None if l1_l is None else jnp.asarray(jax.device_get(l1_l))
    losses = jax.device_get(whole_losses(jnp.zeros((), jnp.float32), None, stats, l1_l, moe))
    return {"total_loss": loss + float(losses.total)} | loss_record(losses.terms)


def _narrow(leaf: np.ndarray):
    """Returns the dtype that a sum of a training step has on the devices."""
    return jnp.int32 if np.issubdtype(leaf.dtype, np.integer) else jnp.float32


class Restored(NamedTuple):
    """A checkpoint's model, ready for use."""

    mesh: Mesh
    step: int
    params: Any
    router_state: dict[str, jax.Array]
    meta: dict[str, Any]


def restore_for_use(
    config: Config,
    workdir: Path,
    step: int | None,
    devices: list[Device] | None = None,
) -> Restored:
    """Returns a run's checkpoint on `config.mesh`, which need not divide the training's batch.

    Args:
        step: None for the last one.
        devices: default: all.

    Raises:
        ConfigError: no such checkpoint, or the mesh does not fit the devices or the model.
    """
    return load_for_use(config, workdir, step, mesh_for_use(config, devices))


def mesh_for_use(config: Config, devices: list[Device] | None = None) -> Mesh:
    """Returns `config.mesh`; raises ConfigError if it does not fit the devices or the model."""
    mesh = make_mesh(config.mesh, devices)
    config.check_model_fits(mesh_config(mesh))
    require_room(config)
    return mesh


def load_for_use(config: Config, workdir: Path, step: int | None, mesh: Mesh) -> Restored:
    """Returns a run's checkpoint on `mesh`.

    Raises:
        ConfigError: there is no sound one, or it was written with another config.
    """
    abstract = abstract_state(config, mesh, make_optimizer(config.optim, config.train.steps))
    with Checkpoints(workdir, config.checkpoint, read_only=True) as checkpoints:
        restored = Restored(mesh, *checkpoints.load_model(abstract, step))
    require_meta(restored.meta, restored.step, ("counters", "validation"))
    changed = (*MAY_CHANGE, *MAY_CHANGE_AFTER_TRAINING)
    require_config_of(restored.step, restored.meta.get("config"), config, changed)
    return restored


def evaluate_workdir(
    config: Config,
    workdir: Path,
    step: int | None,
    devices: list[Device] | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run; returns its record with `step` and `split`.

    Args and errors are those of `restore_for_use`.
    """
    restored = restore_for_use(config, workdir, step, devices)
    evaluator = Evaluator(config, restored.mesh)
    compile_seconds = evaluator.compile(restored.params, restored.router_state)
    return {**evaluate_restored(evaluator, restored), "compile_seconds": compile_seconds}


def evaluate_restored(evaluator: Evaluator, restored: Restored) -> dict[str, Any]:
    """Returns the record of a checkpoint, with `step`, `split`, counters, seconds and memory."""
    name, meta = evaluator.name, restored.meta
    if name == VALIDATION and evaluator.fingerprint != meta["validation"]:
        log.warning(
            "the validation text is not that of the training (the embedded Python text is that of "
            "the running interpreter): compare this loss with its metrics.jsonl with care"
        )
    record = evaluator.measure(restored.params, restored.router_state)
    return {"step": restored.step, "split": "eval", **meta["counters"], **record}
