"""What several verbs do alike."""

import argparse
import os

from moejax.command_line import Line, add_option
from moejax.config import Config, ConfigError
from moejax.overrides import apply_overrides, read_overrides
from moejax.workdir import MAY_CHANGE_AFTER_TRAINING, matches, read_config


def start_jax(cpu_devices: int | None, preemptible: bool = False) -> None:
    """Starts JAX. From here on importing it is allowed."""
    # XLA's own log lines would break the progress bar; set the variable to 0 to read them.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from moejax.mesh import start_jax as start

    start(cpu_devices, preemptible)


def stored_config(line: Line, verb: str) -> Config:
    """Returns the workdir's config with overrides of the keys that a checkpoint does not fix."""
    for name in read_overrides(line.overrides):
        if not matches(name, MAY_CHANGE_AFTER_TRAINING):
            allowed = ", ".join(MAY_CHANGE_AFTER_TRAINING)
            raise ConfigError(f"{name} is fixed by the checkpoint; {verb} can change {allowed}")
    return apply_overrides(read_config(line.options.workdir), line.overrides)


def add_storage(parser: argparse.ArgumentParser) -> None:
    """Adds the option of a sweep and of its workers that says where trials are kept."""
    help = (
        "URL of an Optuna storage, such as postgresql://user@host/sweeps, for several machines, "
        "which share the workdir (default: MOEJAX_SWEEP_STORAGE, or SQLite in the workdir)"
    )
    add_option(parser, "--storage", help, metavar="URL")
