"""The folder of one run: its files, and which config may use it. JAX is not imported."""

import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from moejax.config import Config, ConfigError
from moejax.errors import StorageError, file_error
from moejax.foreign import MIB, has_link, printable, read_file, write_atomically
from moejax.manifest import MANIFEST, RUN_ID, Manifest, Unsound, fingerprint, read_manifest
from moejax.overrides import (
    JSON_FORMAT,
    config_difference,
    config_from_json,
    config_to_dict,
    config_to_json,
)

CONFIG = "config.json"  # the resolved config
RUN = "run.json"  # the id of the run, by which it knows its checkpoints
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"  # one folder a step, named by its number
COMMITTED = "commit_success.txt"  # Orbax writes it into a step's folder when that is whole
META_FILE = "meta/metadata"  # in a step's folder: JSON, the config among it
ATLAS = "atlas"  # one `.npz` a step, named by its number
LOSS_PLOT = "loss.png"
EXPERT_LOAD_PLOT = "expert_load.png"
# What a run reads and writes by name; a test checks that modules name no others.
FILES = (
    *(CONFIG, RUN, METRICS, "events.jsonl", "ledger.jsonl", "lock.json", "eval.jsonl"),
    *(LOSS_PLOT, EXPERT_LOAD_PLOT),
)
FOLDERS = (CHECKPOINTS, TENSORBOARD, ATLAS, "choices", "wandb")

# Keys that may differ on resume: how long to train, how often to look and save, and how the same
# computation is laid out over devices. All others change what a step computes.
MAY_CHANGE = (
    "train.steps",
    "train.accumulation",
    "model.remat",
    "model.loss_chunk",
    "logging.every",
    "checkpoint.*",
    "watchdog.*",
    "eval.*",
    "mesh.*",
    "watch.*",
    "data.on_corrupt",
    "data.timeout_seconds",
)
# And where a checkpoint is used: where the model runs and how it is measured.
MAY_CHANGE_AFTER_TRAINING = (
    "mesh.*",
    "eval.*",
    "moe.eval_capacity_factor",
    "moe.transport",
    "model.dtype",
)
# Where files are that somebody may have moved; what is in them is looked at by itself.
PLACES = ("data.path", "data.tokenizer", "train.replay")


def matches(key: str, patterns: tuple[str, ...]) -> bool:
    """Says whether a dotted key is one of `patterns`, where `mesh.*` stands for a whole section."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def read_run(workdir: Path) -> str | None:
    """Returns the id of a workdir's run; None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        run = json.loads(read_file(workdir / RUN, MIB))["run"]
        if RUN_ID.fullmatch(run):
            return run
    return None


def checkpoint_roots(workdir: Path, local: str | None, run: str | None) -> list[Path]:
    """Returns where a run's checkpoints are: in its workdir, then on the local disk.

    The local folder is that of run and workdir: a copy of the workdir goes its own way.
    """
    durable = Path(os.path.realpath(workdir)) / CHECKPOINTS
    if not (local and run):
        return [durable]
    place = hashlib.sha256(os.fsencode(os.path.realpath(workdir))).hexdigest()[:8]
    return [durable, Path(os.path.realpath(local)) / f"{run}-{place}"]


def checkpoint_steps(workdir: Path, local: str | None = None) -> list[int]:
    """Returns the steps that have a finished checkpoint, in order; nothing of it is read."""
    roots = checkpoint_roots(workdir, local, read_run(workdir))
    return sorted({step for root in roots for step in _finished_steps(root)})


def find_manifest(workdir: Path, local: str | None, step: int) -> Manifest | None:
    """Returns the manifest of a workdir's checkpoint; None where there is none that can be read.

    Args:
        local: `checkpoint.local` of the run.
    """
    for root in checkpoint_roots(workdir, local, read_run(workdir)):
        with contextlib.suppress(Unsound, StorageError):
            return read_manifest(root / str(step))
    return None


def _finished_steps(root: Path) -> list[int]:
    return [step for step in committed_steps(root) if (root / str(step) / MANIFEST).is_file()]


def committed_steps(root: Path) -> list[int]:
    """Returns the steps of the folders that Orbax finished, with and without a manifest."""
    return steps_with(root, COMMITTED)


def steps_with(root: Path, name: str) -> list[int]:
    """Returns the steps of the folders that have a file of that name, in order."""
    found = []
    for marker in root.glob(f"*/{name}"):
        step = marker.parent.name
        if step.isdecimal() and step == str(int(step)) and not marker.parent.is_symlink():
            found.append(int(step))
    return sorted(found)


def require_own(workdir: Path) -> None:
    """Checks that no file or folder of a run is a link, by which it would be outside the workdir.

    Raises:
        ConfigError: which name is a link, or something else than a file or a folder.
    """
    name = has_link(workdir, FILES) or has_link(workdir, FOLDERS, folders=True)
    if name is not None:
        kind = "not a folder" if name in FOLDERS else "not a file"
        kind = "a link" if (workdir / name).is_symlink() else kind
        raise ConfigError(
            f"{workdir / name} is {kind}: a run reads and writes nothing outside of its folder; "
            "move it away, or the run's files to it, or make the workdir itself a link"
        )


def atlas_file(workdir: Path, step: int) -> Path:
    """Returns where the atlas of a checkpoint is, or would be."""
    return workdir / ATLAS / f"{step}.npz"


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
    require_own(workdir)
    steps = checkpoint_steps(workdir, config.checkpoint.local)
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
        write_atomically(workdir / CONFIG, config_to_json(config))
    except OSError as error:
        raise _unwritable(workdir, error) from None
    return workdir


def _unwritable(workdir: Path, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    message = f"workdir {workdir} cannot be written: {reason}; give another --workdir"
    return file_error(message, error)


def read_config(path: str | os.PathLike) -> Config:
    """Returns the config of a workdir, without running anybody's Python.

    Where config.json is missing it is that of the newest checkpoint that has one; stderr tells.

    Raises:
        ConfigError: `path` is not a workdir of `moejax train`, or its config is damaged.
    """
    workdir = Path(path)
    require_own(workdir)
    file = workdir / CONFIG
    try:
        text = read_file(file, 16 * MIB).decode()
    except (FileNotFoundError, NotADirectoryError):
        found = config_of_checkpoint(workdir)
        if found is None:
            raise ConfigError(
                f"{file} does not exist; give a workdir that `moejax train` wrote"
            ) from None
        step, config = found
        _tell_missing(file, step)
        return config
    except OSError as error:
        raise file_error(f"{file} cannot be read: {error}", error) from None
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read: {error}{_way_out(workdir)}") from None
    try:
        return config_from_json(text)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}{_way_out(workdir)}") from None


@functools.cache  # once: `eval --watch` asks again and again
def _tell_missing(file: Path, step: int) -> None:
    print(
        printable(
            f"moejax: {file} is missing; the config is that of the checkpoint of step {step}; "
            "resuming the run writes the file again"
        ),
        file=sys.stderr,
    )


def _way_out(workdir: Path) -> str:
    """Returns what to do about a config.json that is damaged, after a semicolon."""
    found = config_of_checkpoint(workdir)
    if found is None:
        return ""
    return f"; move the file away: the checkpoint of step {found[0]} has the config too"


def config_of_checkpoint(workdir: Path, local: str | None = None) -> tuple[int, Config] | None:
    """Returns step and config of the newest checkpoint whose config is as it was written.

    The manifest has the fingerprint of the config. Nothing else of the checkpoint is read: whether
    the arrays are sound is seen when they are restored.

    Args:
        local: the folder `checkpoint.local`.

    Returns:
        None: no checkpoint has a config that this moejax can use.
    """
    run = read_run(workdir)
    roots = checkpoint_roots(workdir, local, run)
    pairs = sorted(((step, root) for root in roots for step in _finished_steps(root)), reverse=True)
    for step, root in pairs:
        folder = root / str(step)
        with contextlib.suppress(Unsound, OSError, ValueError, KeyError, TypeError, RecursionError):
            manifest = read_manifest(folder)
            stored = json.loads(read_file(folder / META_FILE, 16 * MIB))["config"]
            ours = manifest.step == step and run in (None, manifest.run)
            if ours and manifest.about["config"] == fingerprint(stored):
                return step, config_from_json(_as_file(stored))
    return None


def _as_file(stored: Any) -> str:
    """Returns the config in a checkpoint's meta as config.json has it."""
    return json.dumps({"format": JSON_FORMAT, "config": stored})


def _check_same_run(workdir: Path, config: Config, step: int) -> None:
    if not (workdir / CONFIG).exists():
        found = config_of_checkpoint(workdir, config.checkpoint.local)
        if found is not None:
            require_config_of(found[0], config_to_dict(found[1]), config)
            return
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


def require_config_of(
    step: int, stored: Any, config: Config, may_change: tuple[str, ...] = MAY_CHANGE
) -> None:
    """Checks a config against the one that a checkpoint was written with and has checksums for.

    `config.json` has none: a bit of it would be another model, or another training.

    Args:
        step: of the checkpoint.
        stored: the config in its meta.
        config: the one to use it with.
        may_change: keys that may differ, besides PLACES.

    Raises:
        ConfigError: which other keys differ.
    """
    try:
        difference = config_difference(config_from_json(_as_file(stored)), config)
    except ConfigError as error:
        raise ConfigError(
            f"the checkpoint of step {step} has no usable config in its meta: {error}; move it away"
        ) from None
    rows = [
        f"{key} {had!r} -> {has!r}"
        for key, had, has in difference
        if not matches(key, (*may_change, *PLACES))
    ]
    if rows:
        raise ConfigError(
            f"the checkpoint of step {step} was written with another config ({', '.join(rows)}); "
            f"where {CONFIG} says so it was damaged or changed: give the checkpoint's values back, "
            "there and on the command line"
        )
