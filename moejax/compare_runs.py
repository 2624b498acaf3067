"""The runs of a comparison: found, read from workdirs alone, checked against each other. No JAX.

A run's losses are those of its evaluations; what they cost is in tokens, seconds and FLOPs.
docs/compare.md says what the numbers mean.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.config import Config, ConfigError
from moejax.errors import StorageError, file_error
from moejax.flops import flops_per_token
from moejax.ledger import Totals, totals
from moejax.manifest import Unsound, read_manifest
from moejax.metrics import read_metrics
from moejax.overrides import config_values
from moejax.workdir import (
    CHECKPOINTS,
    CONFIG,
    committed_steps,
    config_of_checkpoint,
    read_config,
)

AXES = {
    "tokens": "tokens seen",
    "seconds": "seconds in training steps",
    "flops": "model FLOPs",
}
METRICS = ("loss", "bits_per_byte", "loss_at_capacity")  # of evaluation; less is better
TRIALS = "trials"  # in the folder of a sweep: its workdirs
TEXT = ("data.source", "data.path")
VOCABULARY = ("data.tokenizer", "model.vocab_size")


class Run(NamedTuple):
    """One run, as its workdir tells it.

    Attributes:
        workdir: its folder.
        source: which path of the command line it was found under, from 0.
        config: of its last start.
        step_n: [n] steps at which it was evaluated.
        loss_n: [n] the metric there; NaN where it was not finite.
        cost_n: [n] what was paid until then, for each of AXES.
        last_step: that it has recorded.
        tokens_per_second: median of its train records; None before there are any.
        spent: its ledger; all 0 for a run that has none.
        forced_routing: the router that takes away what is learned about routing, or None.
        text: fingerprint of its validation text and tokens; None before its first checkpoint.
    """

    workdir: Path
    source: int
    config: Config
    step_n: np.ndarray
    loss_n: np.ndarray
    cost_n: dict[str, np.ndarray]
    last_step: int
    tokens_per_second: float | None
    spent: Totals
    forced_routing: str | None
    text: str | None

    @property
    def loss(self) -> float:
        """At the last evaluation."""
        return float(self.loss_n[-1])

    @property
    def complete(self) -> bool:
        return self.last_step >= self.config.train.steps

    def cost(self, axis: str) -> float:
        """What was paid until the last evaluation."""
        return float(self.cost_n[axis][-1])


def find_workdirs(path: Path) -> list[Path]:
    """Returns the workdirs that a path stands for: itself, a sweep's trials, or what is inside.

    Raises:
        ConfigError: there is none, or the path cannot be read.
    """
    try:
        return _find_workdirs(path)
    except OSError as error:
        raise _unread(path, error) from None


def _find_workdirs(path: Path) -> list[Path]:
    if not (path / TRIALS).is_dir() and _is_run(path):
        return [path]
    folder = path / TRIALS if (path / TRIALS).is_dir() else path
    found = sorted(inside for inside in folder.glob("*") if _is_run(inside))
    if not found:
        what = "has no run in it" if path.is_dir() else "does not exist"
        raise ConfigError(
            f"{path} {what}; give a workdir of `moejax train`, a sweep's folder, or a folder of "
            "workdirs"
        )
    return found


def _is_run(path: Path) -> bool:
    try:
        return (path / CONFIG).is_file() or config_of_checkpoint(path) is not None
    except (OSError, StorageError):
        return True  # reading it tells what is wrong


def load_runs(
    paths: Sequence[str | os.PathLike], metric: str = "loss"
) -> tuple[list[Run], list[str]]:
    """Returns the runs under `paths`, each once, and notes on those that were left out.

    A run that is named itself must have an evaluation and a disk that answers; one of a folder or a
    sweep without, such as a trial that failed, is left out.

    Raises:
        ConfigError: as `find_workdirs` and `load_run`; or no run is left.
    """
    runs: list[Run] = []
    notes, seen = [], set()
    for source, path in enumerate(map(Path, paths)):
        workdirs = find_workdirs(path)
        for workdir in workdirs:
            real = os.path.realpath(workdir)
            if real in seen:
                continue
            seen.add(real)
            try:
                runs.append(load_run(workdir, source, metric))
            except (NothingToCompare, StorageError) as error:
                if workdirs == [path]:
                    raise
                notes.append(f"left out: {error}")
    if not runs:
        raise ConfigError(
            f"no run under {', '.join(map(str, paths))} can be compared: {'; '.join(notes[:3])}"
        )
    return runs, notes


class NothingToCompare(ConfigError):
    """A run has no value of the metric yet, or none that this user may see."""


def load_run(workdir: Path, source: int = 0, metric: str = "loss") -> Run:
    """Reads one workdir; it may be in training, resumed, or torn by a crash.

    Raises:
        ConfigError: it is no workdir, is damaged, or was never evaluated; a StorageError where its
            disk or file server fails.
    """
    try:
        return _load_run(workdir, source, metric)
    except OSError as error:
        raise _unread(workdir, error) from None


def _unread(path: Path, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    message = f"{path} cannot be read: {reason}; see whether its disk answers, or leave it out"
    return file_error(message, error)


def _load_run(workdir: Path, source: int, metric: str) -> Run:
    if workdir.is_dir() and not os.access(workdir, os.X_OK):  # lost+found, or somebody else's
        raise NothingToCompare(f"{workdir} is not yours to read; ask its owner, or leave it out")
    config = read_config(workdir)
    try:
        records = kept_records(read_metrics(workdir))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    evals = [r for r in records if r["split"] == "eval" and metric in r]
    if not evals:
        raise NothingToCompare(_why_nothing(workdir, config, records, metric))
    step_n = np.array([record["step"] for record in evals])
    tokens_n = np.array([record["tokens_seen"] for record in evals], np.float64)
    speeds = [r.get("tokens_per_second") for r in records if r["split"] == "train"]
    speeds = [speed for speed in speeds if speed]
    return Run(
        workdir=workdir,
        source=source,
        config=config,
        step_n=step_n,
        loss_n=np.array([record[metric] for record in evals], np.float64),  # null becomes NaN
        cost_n={
            "tokens": tokens_n,
            "seconds": seconds_at(records, step_n),
            "flops": tokens_n * flops_per_token(config),
        },
        last_step=records[-1]["step"],
        tokens_per_second=float(np.median(speeds)) if speeds else None,
        spent=totals(workdir),
        forced_routing=evals[-1].get("forced_routing"),
        text=_text_of(workdir),
    )


def _why_nothing(workdir: Path, config: Config, records: list, metric: str) -> str:
    if not records:
        return (
            f"{workdir} has no metrics yet; train it with `moejax train`, or leave it out of the "
            "comparison"
        )
    if any(record["split"] == "eval" for record in records):
        return f"{workdir} has no {metric}; give another --metric, or leave it out"
    return (
        f"{workdir} was not evaluated up to step {records[-1]['step']}, with eval.every="
        f"{config.eval.every} and train.steps={config.train.steps}; wait for it, or leave it out"
    )


def kept_records(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the records of the steps that the run kept: the last one of a step counts.

    A process that went on from an earlier step may have left what came after it.
    """
    kept: list[dict[str, Any]] = []
    for record in records:
        while kept and _replaces(record, kept[-1]):
            kept.pop()
        kept.append(record)
    return kept


def _replaces(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether the step of `new` is done again; its evaluation comes after its train record."""

    def place(record: dict[str, Any]) -> tuple[int, bool]:
        return record["step"], record["split"] == "eval"

    return place(new) <= place(old)


def seconds_at(records: Sequence[dict[str, Any]], step_n: np.ndarray) -> np.ndarray:
    """Returns [n] seconds spent in training steps until `step_n`: those of `step_seconds`.

    A line's seconds stand for all steps since the line before. Those of a process's first step are
    not known, for it compiles: the ones before stand for them, and nothing for the run's first.
    """
    steps, seconds, pace = [0], [0.0], 0.0
    for record in records:
        if record["split"] == "train":
            pace = record.get("step_seconds") or pace
            seconds.append(seconds[-1] + pace * (record["step"] - steps[-1]))
            steps.append(record["step"])
    behind_n = np.maximum(step_n - steps[-1], 0)  # evaluated, and no line since
    return np.interp(step_n, steps, seconds) + pace * behind_n


def _text_of(workdir: Path) -> str | None:
    """Returns the fingerprint of the validation text, from the newest checkpoint that has one."""
    root = workdir / CHECKPOINTS
    with contextlib.suppress(OSError):
        for step in reversed(committed_steps(root)):
            with contextlib.suppress(Unsound, StorageError):
                return read_manifest(root / str(step)).about.get("validation")
    return None


# What may be compared


def check_comparable(runs: Sequence[Run], metric: str) -> list[str]:
    """Returns notes on what weakens a comparison.

    Raises:
        ConfigError: of two runs with another vocabulary or another text, whose losses per token say
            nothing about each other.
    """
    first = runs[0]
    for run in runs[1:]:
        if first.text is not None and run.text is not None:
            same = first.text == run.text
        else:
            same = not _differing(first, run, (*TEXT, "data.tokenizer"))
        if not same and metric != "bits_per_byte":
            _refuse(first, run)
    return _notes(runs, metric)


def _differing(a: Run, b: Run, names: Sequence[str]) -> list[str]:
    values_a, values_b = config_values(a.config), config_values(b.config)
    return [
        f"{name} {values_a[name]!r} and {values_b[name]!r}"
        for name in names
        if values_a[name] != values_b[name]
    ]


def _refuse(a: Run, b: Run) -> None:
    if vocabulary := _differing(a, b, VOCABULARY):
        raise ConfigError(
            f"{a.workdir} and {b.workdir} have another vocabulary ({', '.join(vocabulary)}): a "
            "loss per token says nothing between them; compare --metric bits_per_byte, which is "
            "per byte of text, or runs of one tokenizer"
        )
    told = ", ".join(_differing(a, b, TEXT)) or f"fingerprints {_short(a)} and {_short(b)}"
    raise ConfigError(
        f"{a.workdir} and {b.workdir} were evaluated on another text ({told}): their losses say "
        "nothing about each other; compare runs of the same data.source and data.path, trained "
        "with the same Python where the text is the embedded one"
    )


def _short(run: Run) -> str:
    return (run.text or "unknown")[:12]


def _notes(runs: Sequence[Run], metric: str) -> list[str]:
    notes = []
    if metric == "bits_per_byte" and len({run.text for run in runs}) > 1:
        notes.append("validation texts or tokenizers differ: that the text is the same is on you")
    elif any(run.text is None for run in runs):
        without = _listed([run for run in runs if run.text is None])
        notes.append(
            f"no checkpoint says yet which text was evaluated: {without}; the keys data.* agree"
        )
    sizes = {_validation_size(run.config) for run in runs}
    if len(sizes) > 1:
        notes.append(
            "runs were evaluated on different numbers of tokens, for eval.batches, "
            "train.batch_size or data.sequence_length differ"
        )
    if unfinished := [run for run in runs if not run.complete]:
        notes.append(
            f"not complete: {_listed(unfinished)}; a learning rate that has not come down yet "
            "makes a loss look worse"
        )
    if forced := [run for run in runs if run.forced_routing]:
        notes.append(f"routing was forced, its loss means nothing: {_listed(forced)}")
    if bad := [run for run in runs if not math.isfinite(run.loss)]:
        notes.append(f"the last loss is not finite: {_listed(bad)}")
    return notes


def _validation_size(config: Config) -> tuple[int | None, int, int]:
    return config.eval.batches, config.train.batch_size, config.data.sequence_length


def _listed(runs: Sequence[Run]) -> str:
    shown = [str(run.workdir) for run in runs[:4]]
    return ", ".join(shown) + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")
