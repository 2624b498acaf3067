"""What a sweep came to: a ranking with confidence over seeds, CSV, Markdown and two plots. No JAX.

Intervals are Student's t at 95% over seeds. Differences are paired by seed: trainings with one seed
see the same data and start from the same numbers where their shapes allow.
"""

import csv
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.significance import CONFIDENCE, mean_interval
from moejax.sweep_points import Point, describe_point, point_key, value_text
from moejax.sweep_runs import config_quantities
from moejax.sweep_space import Between, Cases, Sweep, ranges
from moejax.sweep_study import State, Study, TrialRecord

REPORT, TRIALS_CSV, RANKING_CSV = "report.md", "trials.csv", "ranking.csv"
PARALLEL, IMPORTANCE = "parallel.png", "importance.png"
SHOWN = 30  # rows of a table of the report; the CSV files have all


class Estimate(NamedTuple):
    """A mean over seeds, and half of its 95% interval; None for a single seed."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")

    @property
    def below_zero(self) -> bool:
        return self.half is not None and self.mean + self.half < 0


class Ranked(NamedTuple):
    """A point of a sweep over its seeds.

    Attributes:
        name: the point as words.
        values: by seed, each objective.
        means: of each objective.
        difference: of the first objective to the reference, paired by seed; None for itself.
        better: seeds on which it is better than the reference, of `pairs`.
        best: whether no other point is at least as good in every objective.
        failed: trainings of it that failed, which are in no mean.
    """

    name: str
    point: Point
    solved: dict[str, int]
    values: dict[int, tuple[float, ...]]
    means: tuple[Estimate, ...]
    difference: Estimate | None
    better: int
    pairs: int
    best: bool
    failed: int

    @property
    def text(self) -> str:
        """The first objective, with its interval and number of seeds."""
        count, failed = len(self.values), f", {self.failed} failed" if self.failed else ""
        return f"{self.means[0]} ({count} seed{'s' * (count > 1)}{failed})"


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Returns mean and Student's t interval of values that were drawn independently."""
    return Estimate(float(np.mean(values)), mean_interval(values, confidence))


def ranking(records: Sequence[TrialRecord], sweep: Sweep) -> list[Ranked]:
    """Returns the points with complete trials, best first by the first objective.

    After an adaptive search with finalists these are the finalists and the base config, by the
    seeds that the search did not choose by. Differences are to the base config where it ran, else
    to the best point.
    """
    done = [r for r in records if r.values]
    if any(r.stage in ("final", "base") for r in done):
        records = [r for r in records if r.stage in ("final", "base")]
        done = [r for r in records if r.values]
    failed = Counter(point_key(r.point) for r in records if r.state == "failed")
    groups: dict[str, list[TrialRecord]] = {}
    for record in done:
        groups.setdefault(point_key(record.point), []).append(record)
    signs = [1 if o.direction == "min" else -1 for o in sweep.objectives]
    values = {key: {r.seed: r.values for r in group} for key, group in groups.items()}
    means = {
        key: tuple(estimate([v[i] for v in seeds.values()]) for i in range(len(signs)))
        for key, seeds in values.items()
    }
    order = sorted(groups, key=lambda key: signs[0] * means[key][0].mean)
    reference = next((k for k in order if groups[k][0].stage == "base"), order[0] if order else "")
    rows = []
    for key in order:
        pairs = [s for s in values[key] if s in values[reference] and key != reference]
        differences = [values[key][s][0] - values[reference][s][0] for s in pairs]
        scores = tuple(sign * e.mean for sign, e in zip(signs, means[key], strict=True))
        others = [
            tuple(sign * e.mean for sign, e in zip(signs, means[k], strict=True))
            for k in order
            if k != key
        ]
        rows.append(
            Ranked(
                describe_point(groups[key][0].point),
                groups[key][0].point,
                groups[key][0].solved,
                values[key],
                means[key],
                estimate(differences) if differences else None,
                sum(signs[0] * d < 0 for d in differences),
                len(pairs),
                not any(_dominates(other, scores) for other in others),
                failed[key],
            )
        )
    return rows


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def verdict(rows: Sequence[Ranked], sweep: Sweep) -> str:
    """Says whether the search found what is better than the base config, or that it did not.

    The best of several finalists is held to an interval that covers all of them with 95%
    (Bonferroni): one that is equal to the base looks better by chance, the likelier the more are.
    """
    base = next((row for row in rows if not row.point), None)
    finalists = [row for row in rows if row.point]
    if base is None or not finalists:
        return "The search has no finalist and base config to compare yet."
    best = finalists[0]
    difference = best.difference
    if difference is None:
        return f"`{best.name}` and the base config have no seed in common yet."
    sign = 1 if sweep.objectives[0].direction == "min" else -1
    common = sorted(set(best.values) & set(base.values))
    differences = [sign * (best.values[s][0] - base.values[s][0]) for s in common]
    judged = estimate(differences, 1 - (1 - CONFIDENCE) / len(finalists))
    seeds = ", ".join(map(str, common))
    told = (
        f"{sweep.objectives[0].name} {difference.mean:+.4f} to the base config on seeds {seeds}, "
        f"better on {best.better} of {best.pairs}; 95% interval of the paired difference "
        f"± {difference.half:.4f}"
        if difference.half is not None
        else f"{difference.mean:+.4f} on the one seed {seeds}"
    )
    if len(finalists) > 1 and judged.half is not None:
        told += f", ± {judged.half:.4f} as the best of {len(finalists)}"
    if best.failed:
        return (
            f"**The search found nothing that beats the base config on every seed.** Of its best, "
            f"`{best.name}`, {best.failed} failed; the others: {told}."
        )
    if judged.below_zero and best.better == best.pairs:
        return f"**`{best.name}` beats the base config**: {told}."
    if best.better == best.pairs:
        return (
            f"**`{best.name}` is better than the base config on every seed**, by less than so few "
            f"seeds can tell apart from chance: {told}."
        )
    return f"**The search did not beat the base config.** Its best, `{best.name}`: {told}."


# Files


def write_report(study: Study) -> Path:
    """Writes report.md, the CSV files and the plots into the workdir; returns the report."""
    records, sweep = study.records(), study.sweep
    rows = ranking(records, sweep)
    _write_csv(study.workdir / TRIALS_CSV, _trial_rows(study, records))
    _write_csv(study.workdir / RANKING_CSV, _ranking_csv(rows, sweep))
    parts = [f"# {study.workdir.name}", _summary(study, records)]
    if sweep.finalists:
        parts.append(verdict(rows, sweep))
    parts += ["## Ranking", _explanation(sweep, rows), _table(_ranking_rows(rows, sweep))]
    if any(r.stage == "search" for r in records):
        found = [r for r in records if r.stage == "search"]
        parts += ["## Search", _table(_search_rows(found, sweep))]
    if failed := [r for r in records if r.state == "failed"]:
        parts += ["## Failed", _table([_failure(r) for r in failed])]
    parts += _plots(study, records)
    page = study.workdir / REPORT
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _summary(study: Study, records: Sequence[TrialRecord]) -> str:
    states = ("complete", "pruned", "failed", "running", "waiting")
    counts = {state: sum(r.state == state for r in records) for state in states}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    sweep = study.sweep
    goal = ", ".join(f"{o.name} ({o.direction})" for o in sweep.objectives)
    lines = [f"{len(records)} trials of base `{sweep.base}`: {told}. Objective: {goal}."]
    for equal in sweep.equal:
        target = equal.to or config_quantities(study.run({}, sweep.seeds[0]).config)[equal.quantity]
        lines.append(
            f"Every point has {equal.quantity}={target:,.0f} to within {equal.tolerance:.1%}: "
            f"`{equal.solve}` is solved for."
        )
    return " ".join(lines)


def _explanation(sweep: Sweep, rows: Sequence[Ranked]) -> str:
    base = any(not row.point for row in rows)
    text = "± is half of Student's 95% interval over seeds; the difference is paired by seed, to "
    text += "the base config." if base else "the best point."
    if len(sweep.objectives) > 1:
        text += " `best` marks points that no other beats in every objective."
    if len(rows) > 2:
        text += " Many points were compared: the best of many looks better than it is."
    if any(row.failed for row in rows):
        text += " Trainings that failed are in no mean: it is that of the seeds that went well."
    return text


def _ranking_csv(rows: Sequence[Ranked], sweep: Sweep) -> list[dict[str, Any]]:
    """Returns the ranking with a number a cell; `half_interval` is half of the 95% interval."""
    found = []
    for rank, row in enumerate(rows, start=1):
        cells: dict[str, Any] = {"rank": rank, "point": row.name}
        cells |= {f"solved {name}": value for name, value in row.solved.items()}
        cells |= {"seeds": len(row.values), "failed": row.failed}
        for objective, mean in zip(sweep.objectives, row.means, strict=True):
            cells |= {objective.name: mean.mean, f"{objective.name} half_interval": mean.half}
        mean, half = row.difference or (None, None)
        cells |= {"difference": mean, "difference half_interval": half}
        cells |= {"better": row.better, "pairs": row.pairs, "best": int(row.best)}
        found.append(cells)
    return found


def _ranking_rows(rows: Sequence[Ranked], sweep: Sweep) -> list[dict[str, Any]]:
    found = []
    for rank, row in enumerate(rows, start=1):
        cells: dict[str, Any] = {"rank": rank, "point": row.name}
        cells |= {f"solved {name}": value for name, value in row.solved.items()}
        cells["seeds"] = len(row.values)
        if any(other.failed for other in rows):
            cells["failed"] = row.failed
        for objective, mean in zip(sweep.objectives, row.means, strict=True):
            cells[objective.name] = str(mean)
        cells["difference"] = "" if row.difference is None else str(row.difference)
        cells["better on"] = f"{row.better} of {row.pairs}" if row.pairs else ""
        if len(sweep.objectives) > 1:
            cells["best"] = "yes" if row.best else ""
        found.append(cells)
    return found


def _search_rows(records: Sequence[TrialRecord], sweep: Sweep) -> list[dict[str, Any]]:
    sign = 1 if sweep.objectives[0].direction == "min" else -1
    done = sorted((r for r in records if r.values), key=lambda r: sign * r.values[0])
    rest = [r for r in records if not r.values]
    return [
        {
            "trial": f"{r.number:03d}",
            "state": r.state,
            "point": describe_point(r.point),
            **{f"solved {name}": value for name, value in r.solved.items()},
            sweep.objectives[0].name: f"{r.values[0]:.4f}" if r.values else "",
        }
        for r in [*done, *rest]
    ]


def _failure(record: TrialRecord) -> dict[str, Any]:
    point = describe_point(record.point)
    return {
        "trial": f"{record.number:03d}",
        "seed": record.seed,
        "point": point,
        "error": record.error,
    }


def _trial_rows(study: Study, records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    names = [objective.name for objective in study.sweep.objectives]
    rows = []
    for r in records:
        values = r.values or (None,) * len(names)
        cells: dict[str, Any] = {"trial": r.number, "state": r.state, "stage": r.stage}
        cells |= {"seed": r.seed, **{name: value_text(v) for name, v in r.point.items()}}
        cells |= {f"solved {name}": value for name, value in r.solved.items()}
        cells |= dict(zip(names, values, strict=True))
        cells |= config_quantities(study.run(r.point, r.seed).config)
        rows.append({**cells, "error": r.error})
    return rows


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the names of all rows, in the order in which they first stand."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, _columns(rows), restval="")
        writer.writeheader()
        writer.writerows(rows)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "Nothing yet."
    columns = _columns(rows)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows[:SHOWN]:
        cells = (" ".join(str(row.get(name, "")).split()) for name in columns)
        lines.append("| " + " | ".join(re.sub(r"([|<])", r"\\\1", cell) for cell in cells) + " |")
    if len(rows) > SHOWN:
        lines += [
            "",
            f"The first {SHOWN} of {len(rows)}; `{RANKING_CSV}`, `{TRIALS_CSV}` have all.",
        ]
    return "\n".join(lines)


# Plots


def _plots(study: Study, records: Sequence[TrialRecord]) -> list[str]:
    parts = []
    if plot_parallel(records, study.sweep, study.workdir / PARALLEL):
        parts += ["## Parallel coordinates", f"![a line a trial]({PARALLEL})"]
    found = importances(study)
    if found:
        plot_importances(found, study.sweep, study.workdir / IMPORTANCE)
        parts += [
            "## Importance",
            "The share of the variance that a name explains in a random forest (fANOVA). With few "
            "trials it says little.",
            f"![bars]({IMPORTANCE})",
        ]
    else:
        parts.append("Importance needs three complete trials that differ in a name that all vary.")
    return parts


def importances(study: Study) -> dict[str, float]:
    """Returns the share of the first objective's variance by name; empty where it has none."""
    import optuna

    found = study.optuna.get_trials(deepcopy=False, states=(State.COMPLETE,))
    found = [t for t in found if t.params and t.values is not None]
    names = [n for n in (found[0].params if found else ()) if all(n in t.params for t in found)]
    names = [n for n in names if len({str(t.params[n]) for t in found}) > 1]
    if not names or len(found) < 3 or len({t.values[0] for t in found}) < 2:
        return {}
    return optuna.importance.get_param_importances(
        _completed(study, found),
        evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
        params=names,
        target=lambda trial: trial.values[0],
    )


def _completed(study: Study, trials: list) -> Any:
    """Returns a study in memory of these trials: those of the base config have no parameters."""
    import optuna

    copy = optuna.create_study(directions=list(study.optuna.directions))
    copy.add_trials(trials)
    return copy


def plot_importances(found: dict[str, float], sweep: Sweep, path: Path) -> None:
    """Draws a bar a name, the longest on top."""
    figure = _figure(7.0, 1.2 + 0.4 * len(found))
    axes = figure.add_subplot()
    names = sorted(found, key=lambda name: found[name])
    axes.barh(names, [found[name] for name in names], color="#2b6ca3")
    axes.set_xlabel(f"share of the variance of {sweep.objectives[0].name}")
    figure.savefig(path, dpi=150)


def plot_parallel(records: Sequence[TrialRecord], sweep: Sweep, path: Path) -> bool:
    """Draws a line a complete trial over the names that it varies; False: there is nothing to draw.

    Colour is the first objective. An axis of words has one place each, as the sweep lists them, of
    numbers their order of size on an even scale, so that 1e-3, 1e-2 and 1e-1 are equally far.
    """
    done = [r for r in records if r.values and r.point]
    names = list(dict.fromkeys(name for name, _ in ranges(sweep.space)))
    if len(done) < 2:
        return False
    from matplotlib import colormaps

    results = np.array([r.values[0] for r in done])
    low, high = float(results.min()), float(results.max())
    shade_n = (results - low) / ((high - low) or 1.0)
    figure = _figure(max(6.0, 1.8 * (len(names) + 1)), 4.5)
    axes = figure.add_subplot()
    listed = _listed(sweep)
    places = {
        name: _places([r.point[name] for r in done if name in r.point], listed[name])
        for name in names
    }
    for record, shade in sorted(zip(done, shade_n, strict=True), key=lambda pair: -pair[1]):
        y = [
            places[n].get(value_text(record.point[n]), math.nan) if n in record.point else math.nan
            for n in names
        ]
        axes.plot(range(len(names) + 1), [*y, shade], color=colormaps["viridis"](shade), alpha=0.8)
    paper: dict[str, Any] = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1}
    label: dict[str, Any] = {"fontsize": 8, "va": "center", "bbox": paper}
    for x, name in enumerate(names):
        axes.axvline(x, color="#999999", linewidth=0.8)
        shown = list(places[name].items())
        for text, y in shown[:: max(1, len(shown) // 8)]:
            axes.annotate(f" {text}", (x, y), **label)
    for y, value in ((0.0, low), (1.0, high)):
        axes.annotate(f" {value:.4g}", (len(names), y), **label)
    axes.set_xticks(range(len(names) + 1), [*names, sweep.objectives[0].name], fontsize=8)
    axes.set_xlim(-0.2, len(names) + 0.5)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=150)
    return True


def _listed(sweep: Sweep) -> dict[str, list[str]]:
    """Returns the values of each name as the sweep lists them; none of a range."""
    found: dict[str, list[str]] = {}
    for name, values in ranges(sweep.space):
        words = values.cases if isinstance(values, Cases) else values
        texts = [] if isinstance(words, Between) else map(value_text, words)
        found.setdefault(name, []).extend(texts)
    return found


def _places(values: Sequence[Any], listed: Sequence[str]) -> dict[str, float]:
    """Returns where each value lies on its axis, from 0 to 1: numbers by size, words as listed."""
    numbers = all(isinstance(value, int | float) for value in values)
    texts = list(map(value_text, sorted(set(values)) if numbers else values))
    found = dict.fromkeys(texts if numbers else [t for t in [*listed, *texts] if t in texts])
    return {text: i / max(1, len(found) - 1) for i, text in enumerate(found)}


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
