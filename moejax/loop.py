"""The training loop: batch, step, hooks. Metrics are fetched a step late: devices never wait."""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moejax.checkpoint import Checkpoints, Resumed, require_meta
from moejax.cluster import (
    Beats,
    check_agreement,
    check_shared,
    failing_together,
    from_first,
    leaving_at_once,
    software,
)
from moejax.config import Config, ConfigError
from moejax.corpus import Corpus, load_corpus
from moejax.data import Batch, Prefetch, TrainBatches, check_vocabulary
from moejax.describe import bytes_text, placements
from moejax.environment import environment, environment_difference
from moejax.errors import DIVERGED, DONE, require
from moejax.evaluate import Evaluator
from moejax.events import Events, read_events, rollbacks_to
from moejax.generate import generate
from moejax.history import History
from moejax.ledger import Ledger
from moejax.lifeline import lifeline
from moejax.lock import RunLock
from moejax.mesh import make_mesh, mesh_config
from moejax.metric_writer import MetricWriter
from moejax.observer import Diverged, LateMetrics, Observer, RollBack
from moejax.optim import make_optimizer
from moejax.overrides import config_to_dict, config_values
from moejax.preemption import Preemption
from moejax.replay import load_choices
from moejax.replicas import Comparisons
from moejax.sharding import place_batch
from moejax.state import TrainState, initial_state, require_room
from moejax.step import make_train_step
from moejax.together import compiled_together
from moejax.wandb_board import WandbBoard
from moejax.watchdog import Watchdog
from moejax.workdir import CONFIG, open_workdir, require_config_of

SAMPLE_PROMPTS = ("And it came to pass", "Y aconteció que", "def main(")


def train(config: Config, workdir: Path, wandb: bool = False) -> int:
    """Trains, or resumes, the run in `workdir` to `config.train.steps`.

    Args:
        wandb: whether Weights & Biases gets the records too.

    Returns:
        0, or 17 when `watch.*` stopped it, or 75 (130) when SIGTERM (Ctrl-C) ended it, saved,
        before that.

    Raises:
        ConfigError: the config does not fit the devices or the data, or processes differ.
    """
    begun = time.monotonic()
    with Watchdog(config.watchdog, Events(workdir), Beats()) as watchdog:  # outlives all that hangs
        return _train(config, workdir, wandb, watchdog, begun)


def _train(config: Config, workdir: Path, wandb: bool, watchdog: Watchdog, begun: float) -> int:
    check_agreement("config", {**config_values(config), "--wandb": wandb})
    with failing_together("inputs"):
        inputs = load_inputs(config)
    check_agreement("data", {"data fingerprint": inputs.data.fingerprint[:12]})
    check_shared(workdir)
    # They are left in reverse order: an error ends this process before the lifeline says goodbye,
    # and the lock is released when nothing writes any more.
    with RunLock(workdir) as lock, contextlib.ExitStack() as stack:
        from_first("lock", lock.take)
        checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint))
        boards: list[WandbBoard] = []
        if wandb:
            from_first(
                "wandb", lambda: boards.append(stack.enter_context(WandbBoard(workdir, config)))
            )
        preemption = stack.enter_context(Preemption())
        stack.enter_context(lifeline())
        stack.callback(watchdog.ends)  # a save may still be under way
        stack.enter_context(leaving_at_once())
        stack.enter_context(explaining_memory(config, inputs.mesh))
        training = Training(config, workdir, inputs, checkpoints, watchdog, boards, begun)
        stack.callback(training.close)
        try:
            if not training.train(preemption):
                return preemption.code
            training.finish()
            training.ledger.close(done=True)
            return DONE
        except Diverged as error:
            print(f"moejax train: {training.explain(error)}", file=sys.stderr)
            return DIVERGED


class Inputs(NamedTuple):
    """Where a run computes, and what it reads."""

    mesh: jax.sharding.Mesh
    corpus: Corpus
    data: TrainBatches
    evaluator: Evaluator


def load_inputs(config: Config) -> Inputs:
    """Makes the mesh and opens the data, and checks that the config fits both.

    Raises:
        ConfigError: it does not, or data cannot be read.
    """
    mesh = make_mesh(config.mesh)
    config.check_mesh(mesh_config(mesh))
    require_room(config)
    corpus = load_corpus(config.data, "train")
    check_vocabulary(corpus, config.model.vocab_size)
    length, batch_size = config.data.sequence_length, config.train.batch_size
    data = TrainBatches(corpus, length, batch_size, config.seed)
    return Inputs(mesh, corpus, data, Evaluator(config, mesh))


def first_state(config: Config, mesh: jax.sharding.Mesh, corpus: Corpus) -> TrainState:
    """Returns the state before the first step; only router `hash` reads the text for it."""
    counts = None
    if config.moe.router == "hash":
        counts = corpus.token_counts(config.model.vocab_size)
    return initial_state(config, mesh, make_optimizer(config.optim, config.train.steps), counts)


@contextlib.contextmanager
def explaining_memory(config: Config, mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Turns a device's out-of-memory error into one that says what takes memory and what helps.

    Raises:
        ConfigError: instead of JAX's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if not text.startswith("RESOURCE_EXHAUSTED"):
            raise
        kinds = placements(config, mesh_config(mesh))
        state = bytes_text(sum(row.per_device for rows in kinds.values() for row in rows))
        raise ConfigError(
            f"out of memory ({text.splitlines()[0][:200]}); state and gradients alone are {state} "
            "a device, and activations come on top: use model.remat=full, a larger "
            "train.accumulation, a smaller train.batch_size, or more devices with mesh.fsdp; "
            "moejax plan tells before a run what fits; committed checkpoints are kept"
        ) from error


def make_comparisons(config: Config, mesh: jax.sharding.Mesh) -> tuple[Comparisons, TrainState]:
    """Returns what runs the steps, and their state as shapes with shardings."""
    step, abstract = make_train_step(config, mesh)
    again = None
    if config.watch.recompute_every is not None:
        again, _ = make_train_step(config, mesh, donate=False)
        again = compiled_together(again)
    return Comparisons(config.watch, mesh, abstract, compiled_together(step), again), abstract


class Training:
    """One training in progress: its state, and the order in which things happen to it.

    What is made here, top to bottom: the step, the state (new or restored), the files.

    Args:
        begun: what the monotonic clock said when this process began.

    Raises:
        ConfigError: the config does not fit the checkpoint, or the workdir cannot be written.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        inputs: Inputs,
        checkpoints: Checkpoints,
        watchdog: Watchdog,
        boards: Sequence[WandbBoard],
        begun: float,
    ):
        self.config, self.workdir = config, workdir
        self.checkpoints, self.watchdog = checkpoints, watchdog
        self.mesh, corpus, self.data, self.evaluator = inputs
        self.environment = environment(config, mesh_config(self.mesh))
        self._choices_to_replay(1)  # refused before anything is compiled
        self.comparisons, self.abstract = make_comparisons(config, self.mesh)
        self.history, self.start, differing = History(config.watch), 0, []
        resumed = checkpoints.resume(self.abstract)
        if resumed is None:
            self.state = first_state(config, self.mesh, corpus)
        else:
            differing = self._resume(resumed)
        main = jax.process_index() == 0
        if main:
            self._tell_config()
            open_workdir(workdir, config)  # from here on nothing refuses the run
            self._tell_environment(differing)
        writer = MetricWriter(workdir, self.start, enabled=main, boards=boards)
        self.ledger = Ledger(workdir, self.start, begun, enabled=main)
        self.observer = Observer(
            config, workdir, self.data, self.history, writer, self.ledger, watchdog
        )

    def _resume(self, resumed: Resumed) -> list[str]:
        """Goes on from a checkpoint; returns what of the environment has changed since."""
        require_meta(resumed.meta, resumed.step)
        self._take(resumed)
        told = from_first(
            "rollbacks", lambda: rollbacks_to(read_events(self.workdir), resumed.step)
        )
        self.history.recall_rollbacks(resumed.step, told)
        return environment_difference(resumed.meta["environment"], self.environment)

    def _take(self, resumed: Resumed) -> None:
        """Takes what a checkpoint holds, if it is of this run."""
        step, state, meta = resumed
        require_config_of(step, meta.get("config"), self.config)
        self._check_data(meta)
        require(
            step <= self.config.train.steps,
            f"train.steps={self.config.train.steps} is below the checkpoint of step {step} in "
            f"{self.workdir}; use train.steps={step} or more",
        )
        self.history.restore(step, meta)
        self.start, self.state = step, state

    def _check_data(self, meta: dict[str, Any]) -> None:
        ours = {"data": self.data.fingerprint, "validation": self.evaluator.fingerprint}
        for name, fingerprint in ours.items():
            require(
                fingerprint == meta[name],
                f"the {name} text of {self.workdir} has changed (fingerprint {meta[name][:12]}, "
                f"now {fingerprint[:12]}); a resumed run reads the same text in the same order: "
                "bring it back (the embedded Python text is that of the running interpreter), or "
                "give another --workdir",
            )

    def _tell_config(self) -> None:
        if self.start > 0 and not (self.workdir / CONFIG).exists():
            Events(self.workdir).write("config_restored", self.start)
            print(
                f"moejax train: {self.workdir / CONFIG} is missing; it is written again, "
                f"with the config of this command, which fits the checkpoint of step {self.start}",
                file=sys.stderr,
            )

    def _tell_environment(self, differing: list[str]) -> None:
        if differing:
            Events(self.workdir).write("environment", self.start, differing=differing)
            print(
                f"moejax train: the environment has changed since step {self.start} "
                f"({'; '.join(differing)}): results agree with those of the old one to rounding, "
                "not bit for bit",
                file=sys.stderr,
            )

    def train(self, preemption: Preemption) -> bool:
        """Runs the remaining steps; returns False if it saved and ended before, by preemption.

        Raises:
            Diverged: a step stops the run.
        """
        while True:
            try:
                return self._train(preemption)
            except RollBack as back:
                with self._slow("start"):
                    self._roll_back(back)

    def _train(self, preemption: Preemption) -> bool:
        steps, timeout = self.config.train.steps, self.config.data.timeout_seconds
        late = LateMetrics(self.observer.record)
        shown = self.observer.begin(self.start)
        with shown, Prefetch(self._batch, self.start, timeout) as batches:
            self.ledger.switch("compile")
            for step in range(self.start + 1, steps + 1):
                batch, choices = self._next(step, batches, late)
                results = self.comparisons.step(step, self.state, batch, choices)
                self.state, metrics, mismatches = results
                late.push(step, metrics)
                self.observer.compared(step, mismatches)
                preempted = preemption.reached() and step < steps
                self._hooks(step, late, preempted)
                if preempted:
                    return self._stop(step, preemption)
            late.flush()
        return True

    # Batch

    def _next(
        self, step: int, batches: Prefetch, late: LateMetrics
    ) -> tuple[Batch, jax.Array | None]:
        """Begins a step by waiting for its batch, and for the choices that it replays."""
        self.watchdog.step(step, late.host_seconds, compiles=not late.fetched)
        with self.ledger.during("data"):
            batch = next(batches)
        late.host_is_done()
        return batch, self._choices_to_replay(step)

    def _batch(self, finished: int) -> Batch:
        """Returns the batch after `finished` steps, on the devices; reads this process's rows."""
        train, index = self.config.train, self.history.batch(finished)
        rows = functools.partial(self.data.rows, index)
        return place_batch(self.mesh, rows, train.batch_size, train.accumulation)

    def _choices_to_replay(self, step: int) -> jax.Array | None:
        replays = self.config.train.replay is not None and self.config.num_moe_layers > 0
        return load_choices(self.config, self.mesh, step) if replays else None

    # Hooks

    def _hooks(self, step: int, late: LateMetrics, preempted: bool) -> None:
        """Evaluates and saves after `step`, where that is due."""
        config, last = self.config, step == self.config.train.steps
        due = config.eval.every is not None and step % config.eval.every == 0
        evaluates = last or (due and not preempted)  # the grace time is for saving
        final = last or preempted
        durable = final or step % config.checkpoint.every == 0
        saves = durable or config.checkpoint.saves_locally(step)
        if not (evaluates or saves):
            return
        late.flush()  # nothing that is not finite is evaluated or saved
        loss = None
        if evaluates:
            with self._slow("evaluation"):
                loss = self._evaluate(step)
        if loss is not None and not math.isfinite(loss):
            raise Diverged(step, "the validation loss is not finite")
        if saves:
            with self._slow("checkpoint"):
                self.checkpoints.save(
                    self.state, self._meta(), loss, local=not durable, final=final
                )
            self.ledger.write()
        late.restart_clock()

    def _evaluate(self, step: int) -> float:
        start = time.monotonic()
        record = self.evaluator(self.state.params, self.state.router_state)
        self.observer.evaluated(step, record, time.monotonic() - start)
        return record["loss"]

    def _meta(self) -> dict[str, Any]:
        return {
            "config": config_to_dict(self.config),
            **self.history.meta(),
            "data": self.data.fingerprint,
            "validation": self.evaluator.fingerprint,
            "versions": software(),
            "environment": self.environment,
        }

    @contextlib.contextmanager
    def _slow(self, kind: str) -> Iterator[None]:
        """Books the time spent inside as `kind`, and allows it more time than a step."""
        with self.ledger.during(kind), self.watchdog.slow(kind):
            yield

    # Ends

    def _roll_back(self, back: RollBack) -> None:
        """Restores the newest checkpoint, and leaves out the batches from there to `back`."""
        del self.state  # room for another
        self.checkpoints.wait()
        resumed = self.checkpoints.resume(self.abstract, back.step - 1)
        if resumed is None:
            raise Diverged(back.step, f"{back}; no checkpoint to go back to")
        times = self.history.count_rollback(resumed.step)
        if times >= self.config.watch.max_rollbacks:  # fewer may be allowed than at the start
            raise Diverged(back.step, f"{back}; went back {times} times")
        left_out = self.history.leave_out(resumed.step, back.step)
        self._take(resumed)
        self.ledger.rolled_back(resumed.step)
        self.observer.went_back(back.step, resumed.step, left_out)

    def _stop(self, step: int, preemption: Preemption) -> bool:
        with self._slow("checkpoint"):
            self.checkpoints.require_saved()
        self.observer.stopped(step, preemption.name)
        return False

    def explain(self, why: Diverged) -> str:
        """Returns why the run stops, and which checkpoint is kept, once it is written."""
        with self._slow("checkpoint"):
            self.checkpoints.settle()
        steps = self.checkpoints.steps
        kept = (
            f"the checkpoint of step {steps[-1]} is kept" if steps else "there is no checkpoint yet"
        )
        return f"step {why.step}: {why}; {kept}"

    def finish(self) -> None:
        """Shows the result: evaluation, speed, a sample, plots, and the files."""
        with self._slow("other"):
            self._finish()
            self.checkpoints.require_saved()  # others may wait here for process 0

    def _finish(self) -> None:
        model = self.state.params, self.state.router_state
        evaluation = self.observer.last_eval
        if evaluation is None:  # the run was complete already
            evaluation = {"step": int(self.state.step), "split": "eval", **self.evaluator(*model)}
        self.checkpoints.wait()
        prompts, seed = SAMPLE_PROMPTS, self.config.seed
        samples = generate(self.config, self.mesh, *model, prompts, seed=seed)
        texts = (prompt + sample for prompt, sample in zip(prompts, samples, strict=True))
        self.observer.show_result(evaluation, "\n\n".join(texts))

    def close(self) -> None:
        """Writes what is left to write. Closing twice is harmless."""
        try:
            self.observer.close()
        finally:
            self.ledger.close()
