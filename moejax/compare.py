"""Which run is better, and at what cost: arithmetic over workdirs alone. No JAX.

Runs that differ in nothing but their seed are one *arm*. The first arm is the *baseline*, and all
others are compared with it at the largest cost that both have paid, in tokens, seconds or FLOPs.
docs/compare.md says what the numbers mean.
"""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev, variance
from typing import Any, NamedTuple

import numpy as np

from moejax.config import Config, ConfigError
from moejax.flops import flops_per_token
from moejax.ledger import Totals, totals
from moejax.manifest import Unsound, read_manifest
from moejax.metrics import read_metrics
from moejax.overrides import config_values
from moejax.workdir import CHECKPOINTS, CONFIG, committed_steps, matches, read_config

AXES = {
    "tokens": "tokens seen",
    "seconds": "seconds in training steps",
    "flops": "model FLOPs",
}
METRICS = ("loss", "bits_per_byte", "loss_at_capacity")  # of evaluation; less is better
TRIALS = "trials"  # in the folder of a sweep: its workdirs
# What does not tell arms apart: the seed, and how often a run is looked at and saved.
SAME_ARM = (
    *("seed", "logging.*", "checkpoint.*", "watchdog.*"),
    *("eval.every", "data.timeout_seconds"),
)
TEXT = ("data.source", "data.path")
VOCABULARY = ("data.tokenizer", "model.vocab_size")
SAME_COST = 1e-3  # relative; seeds differ by a few tokens, for documents are cut elsewhere
CONFIDENCE = 0.95


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


class Arm(NamedTuple):
    """Runs that differ only in their seed, in its order."""

    name: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def losses(self) -> list[float]:
        return [run.loss for run in self.runs]

    @property
    def loss(self) -> float:
        return mean(self.losses)

    def cost(self, axis: str) -> float:
        return mean(run.cost(axis) for run in self.runs)


class Ratio(NamedTuple):
    """A cost over the baseline's, to the baseline's last loss: the mean of `of`, if all got there.

    `reached` of them did; the value is None unless all did.
    """

    value: float | None
    reached: int
    of: int


class Versus(NamedTuple):
    """An arm against the baseline, at the largest cost that all runs of both have paid.

    Attributes:
        budget: that cost, on the chosen axis.
        difference: mean loss of the arm, minus that of the baseline; NaN where one has none there.
        interval: half the width of the 95% confidence interval of Welch's t; None below 2 seeds.
        p_welch: two-sided, of Welch's t-test over the seeds of both.
        p_paired: two-sided, of the paired t-test over the seeds that both have.
        seeds: of the arm, and of the baseline.
        by_seed: the difference for each seed that both have.
        ratios: for each of AXES.
    """

    budget: float
    difference: float
    interval: float | None
    p_welch: float | None
    p_paired: float | None
    seeds: tuple[int, int]
    by_seed: dict[int, float]
    ratios: dict[str, Ratio]


class Comparison(NamedTuple):
    """What `compare` finds.

    Attributes:
        arms: the baseline first.
        axis: one of AXES, for equal cost.
        metric: one of METRICS.
        versus: for each arm but the baseline.
        keys: of the config, those that differ: a value an arm.
        notes: what a reader has to know.
    """

    arms: tuple[Arm, ...]
    axis: str
    metric: str
    versus: tuple[Versus, ...]
    keys: dict[str, tuple[Any, ...]]
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for arm in self.arms for run in arm.runs]


def compare(
    paths: Sequence[str | os.PathLike], axis: str = "tokens", metric: str = "loss"
) -> Comparison:
    """Compares the runs under `paths`: workdirs, sweeps, or folders of workdirs.

    Raises:
        ConfigError: there is no run, or only one, or their losses say nothing about each other.
    """
    runs, notes = load_runs(paths, metric)
    if len(runs) < 2:
        others = f" ({'; '.join(notes[:3])})" if notes else ""
        raise ConfigError(
            f"only one run to compare, {runs[0].workdir}{others}; give another workdir, or a sweep"
        )
    notes += check_comparable(runs, metric)
    found = arms(runs)
    others = tuple(versus(arm, found[0], axis) for arm in found[1:])
    if any(_cuts(row, (arm, found[0]), axis) for arm, row in zip(found[1:], others, strict=True)):
        notes.append(
            f"at equal {axis} some complete runs are read before their end, where their learning "
            "rate had not come down yet: that favours the shorter one"
        )
    return Comparison(tuple(found), axis, metric, others, differing_keys(found), tuple(notes))


def _cuts(row: Versus, both: tuple[Arm, Arm], axis: str) -> bool:
    """Whether a complete run is read well before its end."""
    runs = [run for arm in both for run in arm.runs if run.complete]
    return any(run.cost(axis) > 1.01 * row.budget for run in runs)


# Reading


def find_workdirs(path: Path) -> list[Path]:
    """Returns the workdirs that a path stands for: itself, a sweep's trials, or what is inside.

    Raises:
        ConfigError: there is none.
    """
    if (path / CONFIG).is_file() and not (path / TRIALS).is_dir():
        return [path]
    folder = path / TRIALS if (path / TRIALS).is_dir() else path
    found = sorted(file.parent for file in folder.glob(f"*/{CONFIG}"))
    if not found:
        what = "has no run in it" if path.is_dir() else "does not exist"
        raise ConfigError(
            f"{path} {what}; give a workdir of `moejax train`, a sweep's folder, or a folder of "
            "workdirs"
        )
    return found


def load_runs(
    paths: Sequence[str | os.PathLike], metric: str = "loss"
) -> tuple[list[Run], list[str]]:
    """Returns the runs under `paths`, each once, and notes on those that were left out.

    A run that is named itself must have an evaluation; one of a folder or a sweep without any, such
    as a trial that failed, is left out.

    Raises:
        ConfigError: as `find_workdirs` and `load_run`; or no run is left.
    """
    runs: list[Run] = []
    notes, seen = [], set()
    for source, path in enumerate(map(Path, paths)):
        workdirs = find_workdirs(path)
        for workdir in workdirs:
            if (real := workdir.resolve()) in seen:
                continue
            seen.add(real)
            try:
                runs.append(load_run(workdir, source, metric))
            except NothingToCompare as error:
                if workdirs == [path]:
                    raise
                notes.append(f"left out: {error}")
    if not runs:
        raise ConfigError(
            f"no run under {', '.join(map(str, paths))} can be compared: {'; '.join(notes[:3])}"
        )
    return runs, notes


class NothingToCompare(ConfigError):
    """A run has no value of the metric yet."""


def load_run(workdir: Path, source: int = 0, metric: str = "loss") -> Run:
    """Reads one workdir; it may be in training, resumed, or torn by a crash.

    Raises:
        ConfigError: it is no workdir, is damaged, or was never evaluated.
    """
    config = read_config(workdir)
    try:
        records = kept_records(read_metrics(workdir))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"{workdir} cannot be read: {error}") from None
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
    for step in reversed(committed_steps(root)):
        with contextlib.suppress(Unsound, OSError):
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


# Arms


def arms(runs: Sequence[Run]) -> list[Arm]:
    """Returns the arms: in the order of the command line, those of one path by their mean loss.

    Runs that are equal to the seed are told apart by the path under which they were found.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_identity(run.config), []).append(run)
    separate = [part for group in groups.values() for part in _without_doubles(group)]
    separate = [sorted(part, key=lambda run: run.config.seed) for part in separate]
    names = _names(separate)
    found = [Arm(name, tuple(part)) for name, part in zip(names, separate, strict=True)]
    return sorted(found, key=_rank)


def _rank(arm: Arm) -> tuple[int, bool, float]:
    source = min(run.source for run in arm.runs)
    return source, math.isnan(arm.loss), 0.0 if math.isnan(arm.loss) else arm.loss


def _identity(config: Config) -> str:
    values = config_values(config)
    return repr([value for name, value in values.items() if not matches(name, SAME_ARM)])


def _without_doubles(group: list[Run]) -> list[list[Run]]:
    """Splits a group in which a seed occurs twice, by path, and where that is not enough by run."""

    def unique(runs: list[Run]) -> bool:
        return len({run.config.seed for run in runs}) == len(runs)

    if unique(group):
        return [group]
    by_source: dict[int, list[Run]] = {}
    for run in group:
        by_source.setdefault(run.source, []).append(run)
    if all(map(unique, by_source.values())):
        return list(by_source.values())
    return [[run] for run in group]


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Returns a name each: the folder's without its seed, or the keys that differ, or the path."""
    stems = [_stem([run.workdir.name for run in group]) for group in groups]
    if len(set(stems)) == len(stems) and not any(re.fullmatch(r"\d*", stem) for stem in stems):
        return stems
    keys = _differing_values([group[0].config for group in groups])
    if 0 < len(keys) <= 3:
        rows = zip(*keys.values(), strict=True)
        names = [" ".join(f"{k}={v}" for k, v in zip(keys, row, strict=True)) for row in rows]
        if len(set(names)) == len(names):
            return names
    return [_stem([str(run.workdir) for run in group]) or str(group[0].workdir) for group in groups]


def _stem(names: list[str]) -> str:
    end = r"[\s_.=-]*seed[\s_.=-]*\d*$" if len(names) == 1 else r"[\s_.=-]*(seed)?[\s_.=-]*\d*$"
    alike = itertools.takewhile(lambda c: len(set(c)) == 1, zip(*names, strict=False))
    return re.sub(end, "", "".join(letters[0] for letters in alike))


def differing_keys(found: Sequence[Arm]) -> dict[str, tuple[Any, ...]]:
    """Returns the keys in which arms differ, with a value an arm; seeds and the like are not."""
    return _differing_values([arm.config for arm in found])


def _differing_values(configs: Sequence[Config]) -> dict[str, tuple[Any, ...]]:
    columns = [config_values(config) for config in configs]
    rows = {name: tuple(column[name] for column in columns) for name in columns[0]}
    return {
        name: row
        for name, row in rows.items()
        if len(set(map(repr, row))) > 1 and not matches(name, SAME_ARM)
    }


# Arithmetic


def loss_at(run: Run, axis: str, budget: float) -> float:
    """Returns the loss when `budget` was paid, interpolated between evaluations.

    The last loss where the run ended within SAME_COST of it; NaN where it had paid more before its
    first evaluation, or never paid as much.
    """
    cost_n = run.cost_n[axis]
    if abs(cost_n[-1] - budget) <= SAME_COST * budget:
        return run.loss
    return float(np.interp(budget, cost_n, run.loss_n, left=math.nan, right=math.nan))


def cost_to_reach(run: Run, axis: str, loss: float) -> float | None:
    """Returns the cost at which the loss first was `loss`, interpolated, or None.

    That of the first evaluation where it was lower already.
    """
    cost_n, loss_n = run.cost_n[axis], run.loss_n
    reached = np.flatnonzero(loss_n <= loss)
    if not reached.size:
        return None
    n = int(reached[0])
    if n == 0 or not math.isfinite(loss_n[n - 1]):
        return float(cost_n[n])
    part = (loss_n[n - 1] - loss) / (loss_n[n - 1] - loss_n[n])
    return float(cost_n[n - 1] + part * (cost_n[n] - cost_n[n - 1]))


def mean_cost_to_reach(arm: Arm, axis: str, loss: float) -> Ratio:
    """Returns the mean cost of an arm's runs to a loss; its `value` is a cost."""
    costs = [cost_to_reach(run, axis, loss) for run in arm.runs]
    reached = [cost for cost in costs if cost is not None]
    value = mean(reached) if len(reached) == len(costs) else None
    return Ratio(value, len(reached), len(costs))


def pairs(arm: Arm, baseline: Arm) -> list[tuple[Run, Run]]:
    """Returns the runs of equal seeds."""
    by_seed = {run.config.seed: run for run in baseline.runs}
    return [(run, by_seed[run.config.seed]) for run in arm.runs if run.config.seed in by_seed]


def relative_cost(arm: Arm, baseline: Arm, axis: str) -> Ratio:
    """Returns the arm's cost over the baseline's, at the baseline's last loss, seed by seed.

    Without a seed in common, each run is held to the means of the baseline.
    """
    goals = [(run, base.loss, base.cost(axis)) for run, base in pairs(arm, baseline)]
    goals = goals or [(run, baseline.loss, baseline.cost(axis)) for run in arm.runs]
    costs = [(cost_to_reach(run, axis, loss), cost) for run, loss, cost in goals]
    ratios = [reached / cost for reached, cost in costs if reached is not None and cost > 0]
    return Ratio(mean(ratios) if len(ratios) == len(goals) else None, len(ratios), len(goals))


def versus(arm: Arm, baseline: Arm, axis: str) -> Versus:
    """Compares an arm with the baseline at equal cost on `axis`; see `Versus`."""
    budget = min(run.cost(axis) for run in (*arm.runs, *baseline.runs))
    ours, theirs = ([loss_at(run, axis, budget) for run in a.runs] for a in (arm, baseline))
    by_seed = {
        run.config.seed: loss_at(run, axis, budget) - loss_at(base, axis, budget)
        for run, base in pairs(arm, baseline)
    }
    interval, p_welch = welch(ours, theirs)
    return Versus(
        budget=budget,
        difference=mean(ours) - mean(theirs),
        interval=interval,
        p_welch=p_welch,
        p_paired=paired([*by_seed.values()]),
        seeds=(len(ours), len(theirs)),
        by_seed=by_seed,
        ratios={name: relative_cost(arm, baseline, name) for name in AXES},
    )


def spread(values: Sequence[float]) -> float | None:
    """Returns the standard deviation over seeds, with n - 1; None below 2, or not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return stdev(values)


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns half the 95% interval of the difference of means, and the two-sided p of Welch's t.

    Variances may differ; degrees of freedom by Satterthwaite (Welch, Biometrika 34, 1947). None
    where a side has less than 2 values, one is not finite, or nothing varies.
    """
    if min(len(a), len(b)) < 2 or not all(map(math.isfinite, (*a, *b))):
        return None, None
    parts = [(variance(side) / len(side), len(side)) for side in (a, b)]
    error = sum(part for part, _ in parts)
    if error <= 0:
        return None, None
    freedom = error**2 / sum(part**2 / (n - 1) for part, n in parts)
    return _t_test(mean(a) - mean(b), math.sqrt(error), freedom)


def paired(differences: Sequence[float]) -> float | None:
    """Returns the two-sided p of the paired t-test; None as `welch`."""
    error = spread(differences)
    if not error:
        return None
    n = len(differences)
    return _t_test(mean(differences), error / math.sqrt(n), n - 1)[1]


def _t_test(difference: float, error: float, freedom: float) -> tuple[float, float]:
    from scipy.special import stdtr, stdtrit  # not scipy.stats, which takes a second to import

    half = error * float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
    return half, 2 * float(stdtr(freedom, -abs(difference) / error))
