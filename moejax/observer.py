"""What the host does with a step: its metrics, fetched a step late, are recorded and acted upon.

Metrics of a step are fetched after the next one was dispatched, so devices never wait for what is
done here.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from moejax.config import Config
from moejax.data import TrainBatches
from moejax.errors import ConfigError
from moejax.events import Events
from moejax.flops import model_flops_utilization
from moejax.history import History
from moejax.ledger import Ledger
from moejax.metric_writer import MetricWriter
from moejax.overrides import config_to_json
from moejax.plots import plot_run
from moejax.progress import TrainProgress, show_summary
from moejax.records import host_record, loss_record, routing_record, state_record
from moejax.replay import save_choices
from moejax.replicas import Mismatch, describe_mismatches
from moejax.step import StepMetrics
from moejax.watch import Finding, findings_of_router, findings_of_step, router_health
from moejax.watchdog import Watchdog
from moejax.workdir import CHECKPOINTS


class Abnormal(Exception):
    """What was found in `step` ends the loop over steps; the message says what it is."""

    def __init__(self, step: int, message: str):
        super().__init__(message)
        self.step = step


class Diverged(Abnormal):
    """It stops the run."""


class RollBack(Abnormal):
    """It makes the run go back to a checkpoint."""


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


class Observer:
    """Counts, records and shows steps, and ends the loop where `watch.*` says so.

    Every process has one and all decide alike, from the same numbers; only process 0 writes.

    Args:
        config: of the run in `workdir`.
        data: what the run reads.
        history: counts and streaks, which this one goes on with.
        writer: of records; it is closed here.
        ledger: is told which steps are done.
        watchdog: knows how long hosts take.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        data: TrainBatches,
        history: History,
        writer: MetricWriter,
        ledger: Ledger,
        watchdog: Watchdog,
    ):
        self._config, self._workdir, self._data, self._history = config, workdir, data, history
        self._writer, self._ledger, self._watchdog = writer, ledger, watchdog
        self._main_process = jax.process_index() == 0
        self._events = Events(workdir, enabled=self._main_process)
        self._positions = config.train.batch_size * config.data.sequence_length
        self._progress: TrainProgress
        self._last_train: dict[str, Any] | None = None
        self._seconds: list[float] = []
        self.last_eval: dict[str, Any] | None = None

    def begin(self, start: int) -> TrainProgress:
        """Shows what begins after step `start`; returns the display, for the caller to open."""
        self._start = start
        self._writer.write_text("config", f"```\n{config_to_json(self._config)}\n```")
        console = Console(highlight=False, quiet=not self._main_process)
        self._progress = TrainProgress(
            self._config.train.steps, start, self._positions, console=console
        )
        return self._progress

    # A step

    def record(self, step: int, metrics: StepMetrics, seconds: float | None) -> None:
        """Counts a step, looks at it, records it every `logging.every`, and acts on what it finds.

        Args:
            metrics: of NumPy arrays.
            seconds: since the step before; None for the first.

        Raises:
            Diverged, RollBack: by the policy of what was found.
            ConfigError: not one sequence of its batch could be read.
        """
        self._ledger.finished(step)
        if step == self._start + 1:
            self._ledger.switch("productive")
        tokens = int(metrics.totals.tokens)
        routing = routing_record(metrics.stats, self._positions, tokens, self._config.moe)
        self._save_choices(step, metrics.choice_albts)
        self._count(metrics, routing)
        self._note_data(step, metrics)
        findings = self._look(step, metrics, routing)
        if seconds is not None:
            self._seconds.append(seconds)
        every, steps = self._config.logging.every, self._config.train.steps
        written = bool(findings) or step % every == 0 or step in (1, steps)
        if written or step == self._start + 1:
            record = self._train_record(step, metrics, seconds) | routing
            self._progress.update(record)
            self._last_train = record
            if written:
                self._writer.write(record)
        self._act(step, findings)

    def _save_choices(self, step: int, choice_albts: Any) -> None:
        if choice_albts is None or not self._main_process:
            return
        try:
            save_choices(self._workdir, step, np.asarray(choice_albts))
        except OSError as error:  # a run is worth more than what it tells of itself
            self._say(step, f"its choices cannot be written ({error}): no run can replay them")

    def _count(self, metrics: StepMetrics, routing: Mapping[str, Any]) -> None:
        counters = self._history.counters
        counters["tokens_seen"] += int(metrics.totals.targets)
        counters["routed_seen"] += routing["routed"]
        counters["dropped_seen"] += routing["dropped"]
        counters["skipped_updates"] += int(metrics.verdict.skipped)

    def _note_data(self, step: int, metrics: StepMetrics) -> None:
        """Records the data events of a step: skipped batches, a new epoch, corrupt sequences."""
        batch, before = self._history.batch(step - 1), self._history.batch(step - 2)
        if batch > before + 1:
            self._events.write("skip_batches", step, first=before + 1, last=batch - 1)
        epoch = self._data.epoch(batch)
        if epoch > max(0, self._data.epoch(before)):
            self._events.write("epoch", step, epoch=epoch, batch=batch)
        lost = self._config.train.batch_size - int(metrics.totals.sequences)
        if lost:
            self._history.counters["corrupt_sequences"] += lost
            self._events.write("corrupt_data", step, batch=batch, sequences=lost)
        if lost == self._config.train.batch_size:
            raise ConfigError(
                f"step {step}: no sequence of batch {batch} could be read; prepare the text again"
            )

    def _look(self, step: int, metrics: StepMetrics, routing: Mapping[str, Any]) -> list[Finding]:
        """Returns what `watch.*` finds in a step, and in its router over the last steps."""
        values = {"loss": metrics.losses.loss, "grad_norm": metrics.grad_norm}
        found = findings_of_step(self._config, metrics.verdict, values, metrics.finite)
        health, history = router_health(metrics.stats, routing), self._history
        collapsed, history.streaks = findings_of_router(self._config.watch, health, history.streaks)
        return found + collapsed

    def _train_record(
        self, step: int, metrics: StepMetrics, seconds: float | None
    ) -> dict[str, Any]:
        losses, tokens = metrics.losses, int(metrics.totals.targets)
        speed = None if seconds is None else tokens / seconds
        devices = jax.devices()
        utilization = None
        if speed is not None:
            utilization = model_flops_utilization(
                self._config, speed, devices[0].device_kind, len(devices)
            )
        return {
            "step": step,
            "split": "train",
            "loss": float(losses.loss),
            "total_loss": float(losses.total),
            **loss_record(losses.terms),
            **state_record(metrics.router_state, self._config.moe),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(metrics.learning_rate),
            "tokens": tokens,
            **self._history.counters,
            "tokens_per_second": speed,
            "step_seconds": seconds,
            "mfu": utilization,
            "goodput": self._ledger.totals().goodput,
            **host_record(self._watchdog.host_seconds()),
        }

    def _act(self, step: int, findings: list[Finding]) -> None:
        """Records findings and acts by their policies; the strongest one decides."""
        for finding in findings:
            about = {"policy": finding.policy, "batch": self._history.batch(step - 1)}
            self._events.write(finding.kind, step, **about, **finding.fields)
        messages = {finding.policy: finding.message for finding in reversed(findings)}
        if "stop" in messages:
            raise Diverged(step, messages["stop"])
        for finding in findings:
            left = "; the step was left without effect" if finding.policy == "skip" else ""
            self._say(step, finding.message + left)
        if "rollback" in messages:
            raise RollBack(step, messages["rollback"])

    def compared(self, step: int, mismatches: Mapping[str, list[Mismatch]]) -> None:
        """Records arrays that differ where they must not, and acts as `watch.mismatch` says.

        Raises:
            Diverged: it says stop.
        """
        policy = self._config.watch.mismatch
        for comparison, arrays in mismatches.items():
            about = {"comparison": comparison, "policy": policy}
            named = {array: list(devices) for array, devices in arrays}
            self._events.write("mismatch", step, **about, arrays=named)
            message = describe_mismatches(comparison, arrays)
            if policy == "stop":
                raise Diverged(step, message)
            self._say(step, message)

    def _say(self, step: int, message: str) -> None:
        if self._main_process:
            print(f"moejax train: step {step}: {message}", file=sys.stderr)

    # Between steps, and at the end

    def evaluated(self, step: int, record: Mapping[str, Any], seconds: float) -> None:
        """Records and shows an evaluation after `step`, which took so many seconds."""
        record = {"step": step, "split": "eval", **self._history.counters, **record}
        compiled = self.last_eval is not None  # the first one's seconds are the compiler's
        record["tokens_per_second"] = record["tokens"] / seconds if compiled else None
        self._writer.write(record)
        self._progress.update(record)
        self.last_eval = record

    def went_back(self, step: int, to: int, left_out: tuple[int, int]) -> None:
        """Records that in `step` the run went back to that of a checkpoint.

        Args:
            left_out: the first and the last batch that it leaves out from now on.
        """
        first, last = left_out
        self._writer.go_back(to)
        self._events.write("rollback", step, to=to, first=first, last=last)
        self._say(step, f"back to step {to}, without batches {first} to {last}")

    def stopped(self, step: int, by: str) -> None:
        """Says that the run was asked to end and is saved."""
        if self._main_process:
            ended = f"stopped by {by}, saved at step {step}"
            print(f"moejax train: {ended}; the same command resumes from there", file=sys.stderr)

    def show_result(self, evaluation: Mapping[str, Any], sample: str) -> None:
        """Shows the run at its end: the last evaluation, speed, a sample, and the files."""
        if not self._main_process:
            return
        pictures = plot_run(self._workdir, self._config.num_moe_layers > 0)
        show_summary(
            evaluation,
            tokens_per_second=self._speed(),
            files=[self._workdir / CHECKPOINTS, *self._writer.files, *pictures],
            sample=sample,
            record_train=self._last_train,
            spent=self._ledger.totals(),
        )

    def _speed(self) -> float | None:
        if not self._seconds or self._last_train is None:
            return None
        return self._last_train["tokens"] / float(np.median(self._seconds))

    def close(self) -> None:
        """Writes the last records. Closing twice is harmless."""
        self._writer.close()
