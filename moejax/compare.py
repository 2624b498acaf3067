"""Which run is better, and at what cost: arithmetic over workdirs alone. No JAX.

Runs that differ in nothing but their seed are one *arm*. The first arm is the *baseline*, and all
others are compared with it at the largest cost that both have paid, in tokens, seconds or FLOPs.
docs/compare.md says what the numbers mean.
"""

import itertools
import math
import os
import re
from collections.abc import Sequence
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from moejax.compare_runs import AXES, Run, check_comparable, load_runs
from moejax.config import Config, ConfigError
from moejax.overrides import config_values
from moejax.significance import paired, welch
from moejax.workdir import matches

# What does not tell arms apart: the seed, and how often a run is looked at and saved.
SAME_ARM = (
    *("seed", "logging.*", "checkpoint.*", "watchdog.*"),
    *("eval.every", "data.timeout_seconds"),
)
SAME_COST = 1e-3  # relative; seeds differ by a few tokens, for documents are cut elsewhere


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
    goals = [(run, base.loss, _own_cost(base, axis)) for run, base in pairs(arm, baseline)]
    own = mean(_own_cost(base, axis) for base in baseline.runs)
    goals = goals or [(run, baseline.loss, own) for run in arm.runs]
    costs = [(cost_to_reach(run, axis, loss), cost) for run, loss, cost in goals]
    ratios = [reached / cost for reached, cost in costs if reached is not None and cost > 0]
    return Ratio(mean(ratios) if len(ratios) == len(goals) else None, len(ratios), len(goals))


def _own_cost(run: Run, axis: str) -> float:
    """Returns the cost at which a run first had its last loss: one that rises again had it before.

    All runs are read by the same rule, so that a run costs itself 1.
    """
    cost = cost_to_reach(run, axis, run.loss)
    return run.cost(axis) if cost is None else cost


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
