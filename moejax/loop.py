"""The training loop: batch, step, hooks. Metrics are fetched a step late: devices never wait."""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

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
from moejax.errors import DIVERGED, DONE
from moejax.evaluate import Evaluator
from moejax.events import Events, read_events, rollbacks_to
from moejax.flops import model_flops_utilization
from moejax.generate import generate
from moejax.history import History
from moejax.ledger import Ledger
from moejax.lifeline import lifeline
from moejax.lock import RunLock
from moejax.mesh import make_mesh, mesh_config
from moejax.metric_writer import MetricWriter
from moejax.optim import make_optimizer
from moejax.overrides import config_to_dict, config_to_json, config_values
from moejax.plots import plot_run
from moejax.preemption import Preemption
from moejax.progress import TrainProgress, show_summary
from moejax.records import host_record, loss_record, routing_record, state_record
from moejax.replay import load_choices, save_choices
from moejax.replicas import Comparisons, Mismatch, describe_mismatches
from moejax.sharding import place_batch
from moejax.state import TrainState, initial_state, require_room
from moejax.step import StepMetrics, make_train_step
from moejax.together import compiled_together
from moejax.wandb_board import WandbBoard
from moejax.watch import Finding, findings_of_router, findings_of_step, router_health
from moejax.watchdog import Watchdog
from moejax.workdir import open_workdir, require_config_of

SAMPLE_PROMPTS = ("And it came to pass", "Y aconteció que", "def main(")


class Diverged(Exception):
    """A finding in a step stops the run; the message says which."""


class RollBack(Exception):
    """A finding in `step` makes the run go back to a checkpoint; the message says which."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


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
        training = Training(config, workdir, inputs, checkpoints, watchdog, boards)
        main, start = training.main_process, training.start
        ledger = stack.enter_context(Ledger(workdir, start, begun, enabled=main))
        training.ledger = ledger
        try:
            if training.train(preemption):
                training.finish()
                ledger.close(done=True)
                return DONE
            return preemption.code
        except Diverged as error:
            print(f"moejax train: {error}", file=sys.stderr)
            return DIVERGED
        finally:
            training.writer.close()


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


class Training:
    """One training in progress: the state, and everything that its hooks write to."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        inputs: Inputs,
        checkpoints: Checkpoints,
        watchdog: Watchdog,
        boards: Sequence[WandbBoard],
    ):
        self.config, self.workdir = config, workdir
        self.mesh, corpus, self.data, self.evaluator = inputs
        self.checkpoints, self.watchdog, mesh = checkpoints, watchdog, inputs.mesh
        self.environment = environment(config, mesh_config(mesh))
        differing: list[str] = []
        self._choices_to_replay(1)  # refused before anything is compiled
        step_function, self.abstract = make_train_step(config, mesh)
        watch, again = config.watch, None
        if watch.recompute_every is not None:
            again, _ = make_train_step(config, mesh, donate=False)
            again = compiled_together(again)
        together = compiled_together(step_function)
        self.comparisons = Comparisons(watch, mesh, self.abstract, together, again)
        self.history = History(watch)
        resumed = checkpoints.resume(self.abstract)
        if resumed is None:
            start, self.state = 0, first_state(config, mesh, corpus)
        else:
            start = resumed.step
            require_meta(resumed.meta, start)
            before = resumed.meta["environment"]
            differing = environment_difference(before, self.environment)
            self._take(resumed)
            told = from_first("rollbacks", lambda: rollbacks_to(read_events(workdir), start))
            self.history.recall_rollbacks(start, told)
        self.start = start
        self.ledger: Ledger  # from when nothing refuses the run
        self.main_process = jax.process_index() == 0
        if self.main_process:
            open_workdir(workdir, config)  # from here on nothing refuses the run
            self._tell_environment(start, differing)
        self.writer = MetricWriter(workdir, start, enabled=self.main_process, boards=boards)
        self.events = Events(workdir, enabled=self.main_process)
        self.last_eval: dict[str, Any] | None = None
        self.last_train: dict[str, Any] | None = None
        self.seconds: list[float] = []

    def _take(self, resumed: Resumed) -> None:
        """Goes on from a checkpoint."""
        step, state, meta = resumed
        require_config_of(step, meta.get("config"), self.config)
        self._check_data(meta)
        if step > self.config.train.steps:
            raise ConfigError(
                f"train.steps={self.config.train.steps} is below the checkpoint of step {step} in "
                f"{self.workdir}; use train.steps={step} or more"
            )
        self.history.restore(step, meta)
        self.start, self.state = step, state

    def _tell_environment(self, start: int, differing: list[str]) -> None:
        if differing:
            Events(self.workdir).write("environment", start, differing=differing)
            print(
                f"moejax train: the environment has changed since step {start} "
                f"({'; '.join(differing)}): results agree with those of the old one to rounding, "
                "not bit for bit",
                file=sys.stderr,
            )

    def _check_data(self, meta: dict[str, Any]) -> None:
        ours = {"data": self.data.fingerprint, "validation": self.evaluator.fingerprint}
        for name, fingerprint in ours.items():
            if fingerprint != meta[name]:
                raise ConfigError(
                    f"the {name} text of {self.workdir} has changed (fingerprint "
                    f"{meta[name][:12]}, now {fingerprint[:12]}); a resumed run reads the same "
                    "text in the same order: bring it back (the embedded Python text is that of the"
                    " running interpreter), or give another --workdir"
                )

    def train(self, preemption: Preemption) -> bool:
        """Runs the remaining steps; returns False if it saved and ended before, by preemption."""
        while True:
            try:
                return self._train(preemption)
            except RollBack as back:
                with self._slow("start"):
                    self._roll_back(back)

    def _train(self, preemption: Preemption) -> bool:
        config = self.config
        positions = config.train.batch_size * config.data.sequence_length
        self.writer.write_text("config", f"```\n{config_to_json(config)}\n```")
        late = LateMetrics(self._record)
        with (
            TrainProgress(
                config.train.steps,
                self.start,
                positions,
                console=Console(highlight=False, quiet=not self.main_process),
            ) as self.progress,
            Prefetch(self._batch, self.start, config.data.timeout_seconds) as batches,
        ):
            self.ledger.switch("compile")
            for step in range(self.start + 1, config.train.steps + 1):
                batch = self._next(step, batches, late)
                choices = self._choices_to_replay(step)
                self.state, metrics, mismatches = self.comparisons.step(
                    step, self.state, batch, choices
                )
                late.push(step, metrics)
                self._report(step, mismatches)
                preempted = preemption.reached() and step < config.train.steps
                self._hooks(step, late, preempted)
                if preempted:
                    return self._stop(step, preemption)
            late.flush()
        return True

    def _roll_back(self, back: RollBack) -> None:
        """Restores the newest checkpoint, and leaves out the batches from there to `back`."""
        del self.state  # room for another
        self.checkpoints.wait()
        resumed = self.checkpoints.resume(self.abstract, back.step - 1)
        if resumed is None:
            raise Diverged(self._explain(back.step, f"{back}; no checkpoint to go back to"))
        step, times = resumed.step, self.history.count_rollback(resumed.step)
        if times >= self.config.watch.max_rollbacks:  # fewer may be allowed than at the start
            raise Diverged(self._explain(back.step, f"{back}; went back {times} times"))
        first, last = self.history.leave_out(step, back.step)
        self._take(resumed)
        self.ledger.rolled_back(step)
        self.writer.go_back(step)
        self.events.write("rollback", back.step, to=step, first=first, last=last)
        self._say(back.step, f"back to step {step}, without batches {first} to {last}")

    def _stop(self, step: int, preemption: Preemption) -> bool:
        with self._slow("checkpoint"):
            self.checkpoints.require_saved()
        if self.main_process:
            ended = f"stopped by {preemption.name}, saved at step {step}"
            print(f"moejax train: {ended}; the same command resumes from there", file=sys.stderr)
        return False

    def _next(self, step: int, batches: Prefetch, late: "LateMetrics") -> Batch:
        """Begins a step by waiting for its batch."""
        self.watchdog.step(step, late.host_seconds, compiles=not late.fetched)
        with self.ledger.during("data"):
            batch = next(batches)
        late.host_is_done()
        return batch

    @contextlib.contextmanager
    def _slow(self, kind: str) -> Iterator[None]:
        """Books the time spent inside as `kind`, and allows it more time than a step."""
        with self.ledger.during(kind), self.watchdog.slow(kind):
            yield

    def _batch(self, finished: int) -> Batch:
        """Returns the batch after `finished` steps, on the devices; reads this process's rows."""
        train, index = self.config.train, self.history.batch(finished)
        rows = functools.partial(self.data.rows, index)
        return place_batch(self.mesh, rows, train.batch_size, train.accumulation)

    def _choices_to_replay(self, step: int) -> jax.Array | None:
        replays = self.config.train.replay is not None and self.config.num_moe_layers > 0
        return load_choices(self.config, self.mesh, step) if replays else None

    def _hooks(self, step: int, late: "LateMetrics", preempted: bool) -> None:
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
            raise Diverged(self._explain(step, "the validation loss is not finite"))
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
        seconds = time.monotonic() - start
        record = {"step": step, "split": "eval", **self.history.counters, **record}
        compiled = self.last_eval is not None  # the first one's seconds are the compiler's
        record["tokens_per_second"] = record["tokens"] / seconds if compiled else None
        self.writer.write(record)
        self.progress.update(record)
        self.last_eval = record
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

    def _record(self, step: int, metrics: StepMetrics, seconds: float | None) -> None:
        """Takes a step's metrics: counts, checks them, and writes them every `logging.every`."""
        self.ledger.finished(step)
        if step == self.start + 1:
            self.ledger.switch("productive")
        positions = self.config.train.batch_size * self.config.data.sequence_length
        routing = routing_record(
            metrics.stats, positions, int(metrics.totals.tokens), self.config.moe
        )
        if metrics.choice_albts is not None and self.main_process:
            self._save_choices(step, np.asarray(metrics.choice_albts))
        counters = self.history.counters
        counters["tokens_seen"] += int(metrics.totals.targets)
        counters["routed_seen"] += routing["routed"]
        counters["dropped_seen"] += routing["dropped"]
        counters["skipped_updates"] += int(metrics.verdict.skipped)
        self._note_data(step, metrics)
        findings = self._look(step, metrics, routing)
        if seconds is not None:
            self.seconds.append(seconds)
        every, steps = self.config.logging.every, self.config.train.steps
        written = bool(findings) or step % every == 0 or step in (1, steps)
        if written or step == self.start + 1:
            record = self._train_record(step, metrics, seconds) | routing
            self.progress.update(record)
            self.last_train = record
            if written:
                self.writer.write(record)
        self._act(step, findings)

    def _save_choices(self, step: int, choice_albts: np.ndarray) -> None:
        try:
            save_choices(self.workdir, step, choice_albts)
        except OSError as error:  # a run is worth more than what it tells of itself
            self._say(step, f"its choices cannot be written ({error}): no run can replay them")

    def _note_data(self, step: int, metrics: StepMetrics) -> None:
        """Records the data events of a step: skipped batches, a new epoch, corrupt sequences."""
        batch, before = self.history.batch(step - 1), self.history.batch(step - 2)
        if batch > before + 1:
            self.events.write("skip_batches", step, first=before + 1, last=batch - 1)
        epoch = self.data.epoch(batch)
        if epoch > max(0, self.data.epoch(before)):
            self.events.write("epoch", step, epoch=epoch, batch=batch)
        lost = self.config.train.batch_size - int(metrics.totals.sequences)
        if lost:
            self.history.counters["corrupt_sequences"] += lost
            self.events.write("corrupt_data", step, batch=batch, sequences=lost)
        if lost == self.config.train.batch_size:
            raise ConfigError(
                f"step {step}: no sequence of batch {batch} could be read; prepare the text again"
            )

    def _look(self, step: int, metrics: StepMetrics, routing: dict[str, Any]) -> list[Finding]:
        """Returns what `watch.*` finds in a step, and in its router over the last steps."""
        values = {"loss": metrics.losses.loss, "grad_norm": metrics.grad_norm}
        found = findings_of_step(self.config, metrics.verdict, values, metrics.finite)
        health, history = router_health(metrics.stats, routing), self.history
        collapsed, history.streaks = findings_of_router(self.config.watch, health, history.streaks)
        return found + collapsed

    def _act(self, step: int, findings: list[Finding]) -> None:
        """Records findings and acts by their policies; the strongest one decides."""
        for finding in findings:
            about = {"policy": finding.policy, "batch": self.history.batch(step - 1)}
            self.events.write(finding.kind, step, **about, **finding.fields)
        messages = {finding.policy: finding.message for finding in reversed(findings)}
        if "stop" in messages:
            raise Diverged(self._explain(step, messages["stop"]))
        for finding in findings:
            left = "; the step was left without effect" if finding.policy == "skip" else ""
            self._say(step, finding.message + left)
        if "rollback" in messages:
            raise RollBack(step, messages["rollback"])

    def _report(self, step: int, mismatches: dict[str, list[Mismatch]]) -> None:
        """Records arrays that differ where they must not, and acts as `watch.mismatch` says."""
        policy = self.config.watch.mismatch
        for comparison, arrays in mismatches.items():
            about = {"comparison": comparison, "policy": policy}
            named = {array: list(devices) for array, devices in arrays}
            self.events.write("mismatch", step, **about, arrays=named)
            message = describe_mismatches(comparison, arrays)
            if policy == "stop":
                raise Diverged(self._explain(step, message))
            self._say(step, message)

    def _say(self, step: int, message: str) -> None:
        if self.main_process:
            print(f"moejax train: step {step}: {message}", file=sys.stderr)

    def _train_record(
        self, step: int, metrics: StepMetrics, seconds: float | None
    ) -> dict[str, Any]:
        losses, tokens = metrics.losses, int(metrics.totals.targets)
        speed = None if seconds is None else tokens / seconds
        devices = jax.devices()
        utilization = None
        if speed is not None:
            utilization = model_flops_utilization(
                self.config, speed, devices[0].device_kind, len(devices)
            )
        return {
            "step": step,
            "split": "train",
            "loss": float(losses.loss),
            "total_loss": float(losses.total),
            **loss_record(losses.terms),
            **state_record(metrics.router_state, self.config.moe),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(metrics.learning_rate),
            "tokens": tokens,
            **self.history.counters,
            "tokens_per_second": speed,
            "step_seconds": seconds,
            "mfu": utilization,
            "goodput": self.ledger.totals().goodput,
            **host_record(self.watchdog.host_seconds()),
        }

    def _explain(self, step: int, message: str) -> str:
        with self._slow("checkpoint"):
            self.checkpoints.settle()
        steps = self.checkpoints.steps
        kept = (
            f"the checkpoint of step {steps[-1]} is kept" if steps else "there is no checkpoint yet"
        )
        return f"step {step}: {message}; {kept}"

    def finish(self) -> None:
        """Shows the result: evaluation, speed, a sample, plots, and the files."""
        with self._slow("other"):
            self._finish()
            self.checkpoints.require_saved()  # others may wait here for process 0

    def _finish(self) -> None:
        if self.last_eval is None:  # the run was complete already
            self.last_eval = {
                "step": int(self.state.step),
                "split": "eval",
                **self.evaluator(self.state.params, self.state.router_state),
            }
        self.checkpoints.wait()
        samples = generate(
            self.config,
            self.mesh,
            self.state.params,
            self.state.router_state,
            SAMPLE_PROMPTS,
            seed=self.config.seed,
        )
        if not self.main_process:
            return
        files = plot_run(self.workdir, self.config.num_moe_layers > 0)
        show_summary(
            self.last_eval,
            tokens_per_second=self._speed(),
            files=[self.workdir / "checkpoints", *self.writer.files, *files],
            sample="\n\n".join(p + s for p, s in zip(SAMPLE_PROMPTS, samples, strict=True)),
            record_train=self.last_train,
            spent=self.ledger.totals(),
        )

    def _speed(self) -> float | None:
        if not self.seconds or self.last_train is None:
            return None
        return self.last_train["tokens"] / float(np.median(self.seconds))


class LateMetrics:
    """Fetches a step's metrics after the next step was dispatched.

    Args:
        record: called with (step, metrics as NumPy arrays, seconds since the step before, None for
            the first).
    """

    def __init__(self, record: Callable[[int, StepMetrics, float | None], None]):
        self._record = record
        self._waiting: tuple[int, StepMetrics] | None = None
        self._clock: float | None = None
        self.fetched = False  # whether a step is known to be done: then all are compiled
        self.host_seconds: float | None = None  # between the last fetch and what came after

    def push(self, step: int, metrics: StepMetrics) -> None:
        """Takes the metrics of a step that was dispatched, and hands on those of the one before."""
        self.flush()
        self._waiting = (step, metrics)

    def flush(self) -> None:
        """Waits for the last step's metrics and hands them on."""
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        fetched = jax.device_get(metrics)
        now = time.monotonic()
        seconds = None if self._clock is None else now - self._clock
        self._clock, self.fetched = now, True
        self._record(step, fetched, seconds)

    def host_is_done(self) -> None:
        """Notes how long the host took since a fetch: the next dispatch may wait for devices."""
        self.host_seconds = None if self._clock is None else time.monotonic() - self._clock

    def restart_clock(self) -> None:
        """Leaves out of the next step's seconds what was done since the last."""
        self._clock = time.monotonic()
