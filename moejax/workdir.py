"""The folder of one run: what lies where in it, and whose config it has. JAX is not imported."""

import contextlib
import fnmatch
import os
import tempfile
from pathlib import Path

from moejax.config import Config, ConfigError
from moejax.overrides import config_difference, config_from_json, config_to_json

CONFIG = "config.json"  # the resolved config
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"  # one folder a step, named by its number
COMMITTED = "commit_success.txt"  # Orbax writes it into a step's folder when that is whole
LOSS_PLOT = "loss.png"
EXPERT_LOAD_PLOT = "expert_load.png"

# What may differ on resume: how long, how often to look and save, and how the same mathematics is
# laid out over devices. Everything else decides what a step computes: another training.
MAY_CHANGE = (
    "train.steps",
    "train.accumulation",
    "model.remat",
    "model.loss_chunk",
    "logging.every",
    "checkpoint.every",
    "checkpoint.keep",
    "eval.*",
    "mesh.*",
)


def matches(key: str, patterns: tuple[str, ...]) -> bool:
    """Says whether a dotted key is one of `patterns`, where `mesh.*` stands for a whole section."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def checkpoint_steps(workdir: Path) -> list[int]:
    """Returns the steps that have a committed checkpoint, in order."""
    committed = (workdir / CHECKPOINTS).glob(f"*/{COMMITTED}")
    return sorted(int(file.parent.name) for file in committed if file.parent.name.isdecimal())


def check_workdir(path: str | os.PathLike, config: Config) -> Path:
    """Checks that `path` can take a training with `config`; makes the folder, and changes nothing.

    A workdir that has checkpoints is resumed, and must have the same config but for `MAY_CHANGE`.

    Raises:
        ConfigError: it is a file, it cannot be written, or it belongs to another config.
    """
    workdir = Path(path)
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(
            f"workdir {workdir} is a file; give a folder, for example --workdir runs/a"
        )
    steps = checkpoint_steps(workdir)
    if steps:
        _check_same_run(workdir, config, steps[-1])
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise _unwritable(workdir, error) from None
    return workdir


def open_workdir(path: str | os.PathLike, config: Config) -> Path:
    """Checks the workdir and stores the config in it; call it when nothing else can refuse the run.

    Raises:
        ConfigError: as `check_workdir`.
    """
    workdir = check_workdir(path, config)
    try:
        _write_atomically(workdir / CONFIG, config_to_json(config))
    except OSError as error:
        raise _unwritable(workdir, error) from None
    return workdir


def _unwritable(workdir: Path, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(f"workdir {workdir} cannot be written: {reason}; give another --workdir")


def read_config(path: str | os.PathLike) -> Config:
    """Returns the config of a workdir, without running anybody's Python.

    Raises:
        ConfigError: `path` is not a workdir of `moejax train`, or its config is damaged.
    """
    file = Path(path) / CONFIG
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{file} does not exist; give a workdir that `moejax train` wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    try:
        return config_from_json(text)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _check_same_run(workdir: Path, config: Config, step: int) -> None:
    differing = [
        row
        for row in config_difference(read_config(workdir), config)
        if not matches(row[0], MAY_CHANGE)
    ]
    if differing:
        rows = ", ".join(f"{key} {stored!r} -> {asked!r}" for key, stored, asked in differing)
        raise ConfigError(
            f"workdir {workdir} has checkpoints up to step {step} of another config ({rows}); give "
            "the stored values back to resume, or another --workdir; on resume these may change: "
            f"{', '.join(MAY_CHANGE)}"
        )


def _write_atomically(file: Path, text: str) -> None:
    """A reader sees the old file or the new one, also after a crash."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
