"""A scaling law over runs: loss against active parameters N, tokens D and expansion E. No JAX.

    L = c + A / (N^alpha * E^delta) + B / D^beta

The form for dense models, and its fit by a Huber loss of log L, are those of Chinchilla
(arXiv:2203.15556, appendix D.3); E lowers the part of N, as in Clark et al. (arXiv:2202.01169) and,
with more interactions, in the joint law of Ludziejewski et al. (arXiv:2502.05172). What does not
vary over the runs is left out of the law. Only the end of a complete run is a point: within a run
the learning rate has not come down yet. Of arms of one N, D and E only the best is fitted: the law
is of what is reached there, not of how well a learning rate was chosen. docs/compare.md says how to
read it.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moejax.compare import Arm, Comparison
from moejax.compare_runs import Run
from moejax.config import Config, ConfigError
from moejax.flops import active_counts, parameter_counts

AXES = {"N": "active parameters without embeddings", "D": "tokens seen", "E": "expansion"}
EXPONENTS = {"N": "alpha", "D": "beta", "E": "delta"}
SWEPT = {"N": "model.d_model", "D": "train.steps", "E": "moe.num_experts"}
HUBER = 1e-3  # of the residual of log L, as in Chinchilla
STEEPEST = 3.0  # exponent; one that ends here, or at 0, is not determined by the runs
RESAMPLES = 200
INTERVAL = (2.5, 97.5)  # percentiles
LISTED = 6  # arms that a note names
BEYOND = 10.0  # times the largest N and D, to which the law is drawn and told


class Point(NamedTuple):
    """One complete run."""

    N: float
    D: float
    E: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        axes: the letters that vary, of "NDE".
        points: that it was fitted to.
        theta_p: [P] its parameters, as `_unpack` reads them.
        theta_sp: [S, P] the same of every resample.
        error: root mean square of log L, what is left of the points.
        notes: which runs were left out, and which are worse than the law lets a run be.
    """

    axes: str
    points: tuple[Point, ...]
    theta_p: np.ndarray
    theta_sp: np.ndarray
    error: float
    notes: tuple[str, ...] = ()

    def value(self, N: float, D: float, E: float) -> tuple[float, float, float]:
        """Returns the loss that the law gives, and its interval (95% of the resamples)."""
        value, low, high = self.values([(N, D, E)])[0]
        return float(value), float(low), float(high)

    def values(self, asked: Sequence[tuple[float, float, float]]) -> np.ndarray:
        """Returns [n, 3] what `value` does for each of `asked`."""
        x_an = _inputs(self.axes, self.points, [Point(*place, math.nan) for place in asked])
        value_n = _log_loss(self.theta_p, self.axes, x_an)
        drawn_sn = np.stack([_log_loss(theta_p, self.axes, x_an) for theta_p in self.theta_sp])
        low_n, high_n = np.percentile(drawn_sn, INTERVAL, axis=0)
        return np.exp(np.stack([value_n, low_n, high_n], axis=1))

    def beyond(self, N: float, D: float, E: float) -> float:
        """Returns how many times outside of the runs a point lies, on its worst axis; 1 inside.

        Where N and D vary, compute is an axis too, as the root of N * D: of runs that were given
        the same FLOPs none is near to the largest N with the largest D.
        """
        rows = np.array([point[:3] for point in (*self.points, Point(N, D, E, math.nan))])
        rows = np.column_stack([rows, np.sqrt(rows[:, 0] * rows[:, 1])])
        runs, asked = rows[:-1], rows[-1]
        return float(max(1.0, *(asked / runs.max(0)), *(runs.min(0) / asked)))

    def parameters(self) -> dict[str, tuple[float, float, float]]:
        """Returns c and the exponents by name: value and interval (95% of the resamples)."""
        names = _names(self.axes)
        told: dict[str, tuple[float, float, float]] = {}
        for name in ("c", *(EXPONENTS[axis] for axis in self.axes)):
            index = names.index(name)
            values = [self.theta_p[index], *np.percentile(self.theta_sp[:, index], INTERVAL)]
            value, low, high = (math.exp(v) if name == "c" else float(v) for v in values)
            told[name] = (value, low, high)
        return told

    def at_edge(self) -> list[str]:
        """Returns the exponents that the runs do not determine."""
        told = self.parameters()
        names = [EXPONENTS[axis] for axis in self.axes]
        return [n for n in names if not 1e-3 < told[n][0] < STEEPEST - 1e-3]

    def reference(self) -> Point:
        """The largest of each axis."""
        N, D, E = (max(getattr(point, axis) for point in self.points) for axis in AXES)
        return Point(N, D, E, math.nan)


def sizes(config: Config) -> tuple[float, float]:
    """Returns N, active parameters without embeddings, and E, the expansion: the parameters of all
    feed-forward networks over those that a token uses; 1 for a dense model."""
    used, whole = active_counts(config), parameter_counts(config)
    networks = ("dense", "experts", "shared")
    expansion = sum(whole[kind] for kind in networks) / sum(used[kind] for kind in networks)
    return float(sum(used.values()) - used["embeddings"]), expansion


def fit(comparison: Comparison) -> Law:
    """Fits the law to the complete runs of a comparison, of one N, D and E those of the best arm.

    Raises:
        ConfigError: they are too few, or nothing that the law knows varies enough among them.
    """
    found = [arm._replace(runs=tuple(filter(_usable, arm.runs))) for arm in comparison.arms]
    best, others = frontier([arm for arm in found if arm.runs])
    points = tuple(_point(run) for arm in best for run in arm.runs)
    law = fit_points(points, varying(points))
    notes = []
    if others:
        notes.append(
            "Left out of the fit, for another arm of the same N, D and E is better: "
            f"{_listed(others)}."
        )
    if worse := dominated(best):
        notes.append(
            "Fitted, though a run of no more N, D and E has a lower loss, as by chance or for a "
            f"learning rate that suits it less: {_listed(worse)}."
        )
    return dataclasses.replace(law, notes=tuple(notes))


def _usable(run: Run) -> bool:
    return run.complete and math.isfinite(run.loss)


def frontier(arms: Sequence[Arm]) -> tuple[list[Arm], list[Arm]]:
    """Returns the arm with the least mean loss of each N, D and E, and the others.

    The mean over seeds chooses, and all seeds of the chosen arm stay: the best single run would be
    the luckiest one.
    """
    places = [_place(arm) for arm in arms]
    axes = [distinct(values) for values in zip(*places, strict=True)]
    best: dict[tuple[int, ...], Arm] = {}
    for arm, place in zip(arms, places, strict=True):
        kind = tuple(bisect.bisect(a, x) for a, x in zip(axes, place, strict=True))
        if kind not in best or arm.loss < best[kind].loss:
            best[kind] = arm
    chosen = list(best.values())
    return chosen, [arm for arm in arms if not any(arm is other for other in chosen)]


def dominated(arms: Sequence[Arm]) -> list[Arm]:
    """Returns the arms that are worse than one of no more N, D and E: no law as this has such."""
    places = np.array([_place(arm) for arm in arms])
    losses = np.array([arm.loss for arm in arms])
    return [
        arm
        for arm, place in zip(arms, places, strict=True)
        if np.any((places <= 1.001 * place).all(axis=1) & (losses < arm.loss))
    ]


def _place(arm: Arm) -> tuple[float, float, float]:
    active, expansion = sizes(arm.config)
    return active, arm.cost("tokens"), expansion


def _listed(arms: Sequence[Arm]) -> str:
    shown = [f"{arm.name} ({arm.loss:.4f})" for arm in arms[:LISTED]]
    return ", ".join(shown) + (f" and {len(arms) - LISTED} more" if len(arms) > LISTED else "")


def _point(run: Run) -> Point:
    active, expansion = sizes(run.config)
    return Point(active, run.cost("tokens"), expansion, run.loss)


def varying(points: Sequence[Point]) -> str:
    """Returns the letters of the axes on which points differ, by more than a thousandth.

    Raises:
        ConfigError: there is none, or one has too few values for a power law with an offset.
    """
    values = {axis: distinct([getattr(p, axis) for p in points]) for axis in AXES}
    axes = "".join(axis for axis in AXES if len(values[axis]) > 1)
    if not axes:
        raise ConfigError(
            f"{len(points)} complete runs have the same N, D and E: no law to fit; give runs that "
            f"differ in {', '.join(SWEPT.values())}"
        )
    for axis in axes:
        least = 2 if axis == "E" and "N" in axes else 3
        if len(values[axis]) < least:
            told = ", ".join(f"{value:.4g}" for value in values[axis])
            raise ConfigError(
                f"{axis} ({AXES[axis]}) has {len(values[axis])} values ({told}) and a power law "
                f"needs {least}; give runs with more of {SWEPT[axis]}, or only those of one {axis}"
            )
    return axes


def distinct(values: Sequence[float]) -> list[float]:
    """Returns the values in order, those within a thousandth of one another once."""
    found: list[float] = []
    for value in sorted(values):
        if not found or value > found[-1] * 1.001:
            found.append(value)
    return found


def fit_points(points: Sequence[Point], axes: str, resamples: int = RESAMPLES) -> Law:
    """Fits the law of `axes` to points, and again to each resample of its residuals.

    Residuals are resampled, not points: the runs of a sweep are a design, and a part of a small one
    does not determine the law. They are widened by sqrt(n / (n - P)), what the fit took from them.

    Raises:
        ConfigError: there are not more kinds of points than parameters.
    """
    names = _names(axes)
    kinds = {tuple(round(math.log(getattr(p, a)), 2) for a in axes) for p in points}
    if len(kinds) <= len(names):
        raise ConfigError(
            f"{len(kinds)} kinds of runs do not determine the {len(names)} parameters "
            f"({', '.join(names)}) of a law in {', '.join(axes)}; give at least {len(names) + 1}"
        )
    x_an = _inputs(axes, points, points)
    log_n = np.log([point.loss for point in points])
    solved = [_solve(axes, x_an, log_n, start_p) for start_p in _starts(axes, log_n)]
    theta_p = min(solved, key=lambda solution: solution[1])[0]
    fitted_n = _log_loss(theta_p, axes, x_an)
    left_n = log_n - fitted_n
    wider_n = (left_n - left_n.mean()) * math.sqrt(len(points) / (len(points) - len(names)))
    random = np.random.default_rng(0)
    drawn = (random.choice(wider_n, len(points)) for _ in range(resamples))
    theta_sp = np.stack([_solve(axes, x_an, fitted_n + e_n, theta_p)[0] for e_n in drawn])
    return Law(axes, tuple(points), theta_p, theta_sp, float(np.sqrt(np.mean(left_n**2))))


def _names(axes: str) -> list[str]:
    """Parameters in their order: logarithms of c, of A and of B where they are, and exponents."""
    names = ["c"]
    if set(axes) & {"N", "E"}:
        names += ["A", *(EXPONENTS[axis] for axis in axes if axis != "D")]
    return names + (["B", "beta"] if "D" in axes else [])


def _inputs(axes: str, points: Sequence[Point], asked: Sequence[Point]) -> np.ndarray:
    """Returns [A, n] logarithms, less those of the mean point: A and B are then of its size."""
    rows = []
    for axis in axes:
        centre = np.mean(np.log([getattr(point, axis) for point in points]))
        rows.append(np.log([getattr(point, axis) for point in asked]) - centre)
    return np.array(rows)


def _log_loss(theta_p: np.ndarray, axes: str, x_an: np.ndarray) -> np.ndarray:
    """Returns [n] log L."""
    theta = dict(zip(_names(axes), theta_p, strict=True))
    zero_n = np.zeros(x_an.shape[1])
    terms = {"c": zero_n + theta["c"]}
    for axis, x_n in zip(axes, x_an, strict=True):
        name = "B" if axis == "D" else "A"
        terms[name] = terms.get(name, zero_n + theta[name]) - theta[EXPONENTS[axis]] * x_n
    return np.logaddexp.reduce(list(terms.values()), axis=0)


def _starts(axes: str, log_n: np.ndarray) -> list[np.ndarray]:
    """Initial values: what of the mean loss is irreducible, and how steep the rest falls."""
    level, names = float(log_n.mean()), _names(axes)
    parts = sum(name in ("A", "B") for name in names)
    starts = []
    for irreducible in (0.2, 0.5, 0.8, 0.95):
        for steep in (0.1, 0.4, 1.0):
            rest = level + math.log((1 - irreducible) / parts)
            values = {"c": level + math.log(irreducible), "A": rest, "B": rest}
            starts.append(np.array([values.get(name, steep) for name in names]))
    return starts


def _solve(
    axes: str, x_an: np.ndarray, log_n: np.ndarray, start_p: np.ndarray
) -> tuple[np.ndarray, float]:
    """Returns the parameters of the least Huber loss from a start, and that loss."""
    from scipy.optimize import least_squares

    names, top = _names(axes), float(log_n.max()) + 2
    low = [0.0 if name in EXPONENTS.values() else -20.0 for name in names]
    high = [STEEPEST if name in EXPONENTS.values() else top for name in names]
    high[0] = float(log_n.min())  # no run is below what cannot be reduced
    inside_p = np.clip(start_p, np.array(low) + 1e-6, np.array(high) - 1e-6)
    solution = least_squares(
        lambda theta_p: _log_loss(theta_p, axes, x_an) - log_n,
        inside_p,
        bounds=(low, high),
        loss="huber",
        f_scale=HUBER,
        x_scale="jac",
        max_nfev=400,
    )
    return solution.x, float(solution.cost)


# Telling


def describe(law: Law) -> list[str]:
    """Returns what the law says, a sentence a line."""
    first = "A / N^alpha" if law.axes.startswith("N") else "A"
    if "E" in law.axes:
        first = "A / (N^alpha E^delta)" if "N" in law.axes else "A / E^delta"
    terms = ["c"] + ([first] if set(law.axes) & {"N", "E"} else [])
    terms += ["B / D^beta"] if "D" in law.axes else []
    told = [
        f"{name} {value:.3f} ({low:.3f} to {high:.3f})"
        for name, (value, low, high) in law.parameters().items()
    ]
    lines = [
        f"L = {' + '.join(terms)}: {', '.join(told)}; fitted to {len(law.points)} complete runs, "
        f"of which it misses the loss by {law.error:.2%} (root mean square).",
        "N: active parameters without embeddings; D: tokens; E: feed-forward parameters over those "
        "that a token uses. In brackets 95% of "
        f"{len(law.theta_sp)} resamples of the residuals.",
    ]
    if edge := law.at_edge():
        lines.append(f"Not determined by these runs: {', '.join(edge)}.")
    if {"N", "D"} <= set(law.axes) and not {"alpha", "beta"} & set(law.at_edge()):
        names = _names(law.axes)
        alpha_s, beta_s = (law.theta_sp[:, names.index(name)] for name in ("alpha", "beta"))
        share_s = beta_s / np.maximum(alpha_s + beta_s, 1e-9)
        low, high = np.percentile(share_s, INTERVAL)
        alpha, beta = law.parameters()["alpha"][0], law.parameters()["beta"][0]
        lines.append(
            f"At the least loss for C FLOPs, N grows as C^{beta / (alpha + beta):.2f} "
            f"({low:.2f} to {high:.2f})."
        )
    return [*lines, *law.notes]


def predictions(law: Law) -> list[tuple[Point, float, float, float]]:
    """Returns points at and beyond the largest run, each with how far it is extrapolated, and the
    interval: (point with the law's loss, times beyond, low, high)."""
    end = law.reference()
    found = []
    for factor in (1.0, 2.0, BEYOND):
        grown = {axis: getattr(end, axis) * (factor if axis in law.axes else 1) for axis in "ND"}
        asked = (grown["N"], grown["D"], end.E)
        value, low, high = law.value(*asked)
        found.append((Point(*asked, value), law.beyond(*asked), low, high))
        if not set(law.axes) & {"N", "D"}:
            break  # no number of experts is taken for granted
    return found


def plot(law: Law, path: Path) -> None:
    """Draws a panel an axis; other axes at their largest, to which the points are moved by the law.

    Beyond the runs the line is dashed, on a shaded ground that says so.
    """
    from matplotlib.figure import Figure

    width = 1.0 + 4.6 * len(law.axes)
    figure = Figure(figsize=(width, 4.4), dpi=130, layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(law.axes), sharey=True, squeeze=False)[0]
    for axes, letter in zip(panels, law.axes, strict=True):
        _draw(axes, law, letter)
    panels[0].set_ylabel("loss at the end of a run")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _draw(axes: Any, law: Law, letter: str) -> None:
    end, here = law.reference(), [getattr(point, letter) for point in law.points]
    own = law.values([point[:3] for point in law.points])[:, 0]
    moved = law.values([_at(end, letter, x) for x in here])[:, 0] / own
    moved = moved * np.array([point.loss for point in law.points])
    x_n = np.geomspace(min(here), max(here) * BEYOND, 41)
    band = law.values([_at(end, letter, x) for x in x_n])
    known = [x for x in (*x_n, max(here)) if law.beyond(*_at(end, letter, x)) <= 1.001]
    edge = max(known, default=min(here))
    inside_n = x_n <= edge * 1.001
    axes.fill_between(x_n, band[:, 1], band[:, 2], color="#2b6ca3", alpha=0.15, linewidth=0)
    axes.plot(x_n[inside_n], band[inside_n, 0], color="#2b6ca3", label="law, 95% of resamples")
    last = int(inside_n.sum()) - 1
    axes.plot(x_n[last:], band[last:, 0], "--", color="#2b6ca3", label="extrapolated")
    axes.axvspan(edge, x_n[-1], color="#888888", alpha=0.12, linewidth=0)
    axes.text(x_n[-1], band[:, 2].max(), "extrapolation ", ha="right", va="top", fontsize=8)
    axes.plot(here, moved, "o", color="#c8452e", markersize=4, label="runs, moved by the law")
    fixed = ", ".join(f"{o}={getattr(end, o):.3g}" for o in law.axes if o != letter)
    axes.set(xscale="log", xlabel=f"{letter}: {AXES[letter]}{f'  (at {fixed})' if fixed else ''}")
    axes.grid(alpha=0.3, which="both")


def _at(point: Point, letter: str, x: float) -> tuple[float, float, float]:
    values = {"N": point.N, "D": point.D, "E": point.E, letter: x}
    return values["N"], values["D"], values["E"]
