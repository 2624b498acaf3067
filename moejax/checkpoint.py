"""Checkpoints: Orbax, asynchronous and sharded, in one module.

A step's folder holds three items: `model` (step, parameters, router state: all that evaluation
needs), `training` (optimizer state, rng) and `meta` (config, data fingerprint, versions, counters).
A folder without Orbax's commit marker is no checkpoint. Kept are the last `keep` and the best by
validation loss.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from moejax.cluster import agree_on_largest, appears, refuse_together
from moejax.config import CheckpointConfig, ConfigError
from moejax.state import TrainState
from moejax.workdir import CHECKPOINTS, checkpoint_steps

ITEMS = ("model", "training", "meta")


def _options(config: CheckpointConfig, read_only: bool) -> ocp.CheckpointManagerOptions:
    def loss(metrics):
        return metrics["loss"]

    best = BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    return ocp.CheckpointManagerOptions(
        read_only=read_only,
        best_fn=loss,  # without it Orbax stores no metrics, and a resumed run forgets the best
        best_mode="min",
        preservation_policy=AnyPreservationPolicy([LatestN(config.keep), best]),
        atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
    )


def _split(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    model = {"step": state.step, "params": state.params, "router_state": state.router_state}
    return model, {"opt_state": state.opt_state, "rng": state.rng}


def latest_step(workdir: Path) -> int:
    """Returns the last committed step that any process sees, once all see it; 0 if there is none.

    Each process lists the shared folder for itself, and one that saw less would resume from another
    step than the rest.

    Raises:
        ConfigError: a process does not see it in time.
    """
    step = agree_on_largest("latest checkpoint", max(checkpoint_steps(workdir), default=0))
    seen = step == 0 or appears(lambda: step in checkpoint_steps(workdir))
    complaint = f"does not see step {step} of another process in {workdir / CHECKPOINTS}"
    refuse_together("checkpoint", "" if seen else f"{complaint}; use a shared file system")
    return step


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Asks nobody: Orbax only logs the answer, and each question moves the service's count."""
        return False


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving it waits for the last save.

    Args:
        workdir: of the run.
        config: how many to keep.
        read_only: for evaluation, also while a training goes on.

    Raises:
        ConfigError: it is opened read-only and holds no checkpoint.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig, *, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells each of its moves
        self._workdir = workdir.resolve()
        if read_only and not self.steps:
            raise ConfigError(
                f"{self._workdir / CHECKPOINTS} holds no checkpoint; train first, or wait for the "
                "first checkpoint.every steps"
            )
        (self._workdir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        self._manager = _Manager(
            self._workdir / CHECKPOINTS, options=_options(config, read_only), item_names=ITEMS
        )

    @property
    def steps(self) -> list[int]:
        """The committed steps on disk, in order."""
        return checkpoint_steps(self._workdir)

    def save(self, state: TrainState, meta: dict[str, Any], validation_loss: float | None) -> None:
        """Starts to save; returns when the arrays are copied, and they may be donated.

        Args:
            meta: JSON.
            validation_loss: of these parameters, nats; None if they were not evaluated.
        """
        step = int(state.step)
        model, training = _split(state)
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model),  # pyright: ignore[reportCallIssue]
                training=ocp.args.StandardSave(training),  # pyright: ignore[reportCallIssue]
                meta=ocp.args.JsonSave(meta),  # pyright: ignore[reportCallIssue]
            ),
            metrics=None if validation_loss is None else {"loss": validation_loss},
            force=True,
        )
        if not saved:
            raise RuntimeError(
                f"the checkpoint of step {step} was refused: {self._workdir / CHECKPOINTS} goes "
                f"up to {self._manager.latest_step()}; another run may be writing there"
            )

    def restore_meta(self, step: int) -> dict[str, Any]:
        """Returns the `meta` item of a step."""
        restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return restored["meta"]

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Returns the state of `step`, laid out as `abstract` says, whatever mesh saved it."""
        model, training = _split(abstract)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(model),  # pyright: ignore[reportCallIssue]
                training=ocp.args.StandardRestore(training),  # pyright: ignore[reportCallIssue]
            ),
        )
        return TrainState(**restored["model"], **restored["training"])

    def restore_model(self, step: int, abstract: TrainState) -> tuple[Any, dict[str, jax.Array]]:
        """Returns (params, router state) of `step`; the optimizer's state is not read."""
        model, _ = _split(abstract)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(model=ocp.args.StandardRestore(model)),  # pyright: ignore[reportCallIssue]
        )
        return restored["model"]["params"], restored["model"]["router_state"]

    def find(self, step: int | None) -> int:
        """Returns `step`, or the last one for None.

        Raises:
            ConfigError: there is no such checkpoint.
        """
        if step is None:
            return self.steps[-1]
        if step not in self.steps:
            raise ConfigError(
                f"step {step} has no checkpoint in {self._workdir / CHECKPOINTS}; there are steps "
                f"{', '.join(map(str, self.steps))}"
            )
        return step

    def wait(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder. Closing twice is harmless."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()
