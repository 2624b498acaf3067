"""`moejax train --wandb`: the records of a run, as runs of Weights & Biases. No JAX.

Every process that trains is a run of its own there, with an id of its own, and all attempts at one
workdir are one group. Resuming a W&B run by its id is avoided: several processes on a pod have
halted each other by it. Only process 0 has a board.
"""

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.config import Config, ConfigError
from moejax.overrides import config_values
from moejax.tensorboard import board_scalars
from moejax.workdir import read_run

PROJECT = "moejax"  # unless WANDB_PROJECT says another

_log = logging.getLogger("moejax")


class WandbBoard:
    """Shows records in Weights & Biases; where it fails later, it is off and training goes on.

    `WANDB_MODE=offline` writes into the workdir's `wandb` folder, for `wandb sync`; the other
    variables of wandb (`WANDB_PROJECT`, `WANDB_ENTITY`, ...) count too.

    Args:
        workdir: of the run; its name and the run's id make the group.
        config: is shown with it.

    Raises:
        ConfigError: wandb is not installed, nobody is logged in, or it cannot start.
    """

    def __init__(self, workdir: Path, config: Config):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                f"--wandb: wandb cannot be imported ({error}); pip install 'moejax[wandb]', or "
                "train without --wandb"
            ) from None
        self._wandb, self._workdir, self._config = wandb, workdir, config
        self._run: Any = None
        try:
            self._run = self._start()
        except Exception as error:  # wandb raises errors of many kinds
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"--wandb: {reason or type(error).__name__}; log in with `wandb login` or "
                "WANDB_API_KEY, or set WANDB_MODE=offline and `wandb sync` later"
            ) from None

    def _start(self) -> Any:
        workdir, run = self._workdir.resolve(), read_run(self._workdir)
        board = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=f"{run}-{secrets.token_hex(4)}",
            name=workdir.name,
            group=f"{workdir.name}-{run}",
            dir=str(workdir),
            config=config_values(self._config),
            resume="never",
            reinit="finish_previous",
            settings=self._wandb.Settings(console="off"),  # the progress bar is the terminal's
        )
        # steps go back where a run does: they are an axis, not the order of the records
        board.define_metric("step")
        board.define_metric("*", step_metric="step")
        return board

    def write(self, record: Mapping[str, Any]) -> None:
        """Shows the numbers of a record, under the names that TensorBoard has."""
        scalars = board_scalars(record)
        self._attempt(lambda: self._run.log({"step": record["step"], **scalars}))

    def restart(self) -> None:
        """Begins another run: training went back to an earlier step."""
        self._attempt(self._run_again)

    def _run_again(self) -> None:
        self._run.finish()
        self._run = self._start()

    def close(self, failed: bool = False) -> None:
        """Sends what is left. Closing twice is harmless."""
        self._attempt(lambda: self._run.finish(exit_code=int(failed)))
        self._run = None

    def __enter__(self) -> "WandbBoard":
        return self

    def __exit__(self, kind: object, *_) -> None:
        self.close(failed=kind is not None)

    def _attempt(self, act: Any) -> None:
        if self._run is None:
            return
        try:
            act()
        except Exception as error:  # of any kind: a display must never end a training
            _log.warning("Weights & Biases is off from here on: %r", error)
            self._run = None
