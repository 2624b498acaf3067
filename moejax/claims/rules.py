"""How a claim is judged: checks on the numbers of several seeds, paired where arms are compared."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Student's t: 97.5% quantile by number of seeds, for a two-sided interval of 95%
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}

Result = Mapping[str, Any]
Results = Mapping[str, Result]


@dataclasses.dataclass(frozen=True)
class Check:
    """One condition of a claim, what was found, and whether it holds."""

    rule: str
    found: str
    passed: bool


def measured(
    results: Results, arm: str, evaluation: str = "as trained", field: str = "loss"
) -> np.ndarray:
    """Returns a number of an arm by seed; of one that exists by layer, the mean over layers."""
    values = np.asarray(results[arm]["evaluations"][evaluation][field], np.float64)
    return values if values.ndim == 1 else values.mean(axis=1)


def probed(results: Results, arm: str, field: str) -> np.ndarray:
    """Returns a number of the router on fixed sequences, by seed: the mean over layers."""
    return np.asarray(results[arm]["probe"][field], np.float64).mean(axis=1)


def curve(results: Results, arm: str, field: str = "loss") -> tuple[np.ndarray, np.ndarray]:
    """Returns steps [N] and a number by step and seed [N, seeds]; see `training`."""
    values = results[arm]["curve"]
    return np.asarray(values["step"]), np.asarray(values[field], np.float64)


def half_width(values: np.ndarray) -> float:
    """Returns half the width of the 95% confidence interval of the mean."""
    count = len(values)
    if count < 2:
        return math.inf
    return STUDENT[count] * float(np.std(values, ddof=1)) / math.sqrt(count)


def spread(values: np.ndarray, digits: int = 3) -> str:
    """Returns `mean ± standard deviation` over seeds."""
    if len(values) < 2:
        return f"{values.mean():.{digits}f}"
    return f"{values.mean():.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def lower(rule: str, ours: np.ndarray, theirs: np.ndarray, margin: float = 0.0) -> Check:
    """Checks that `ours` is lower by more than `margin` in every seed, beyond chance.

    Beyond chance: the 95% interval of the mean paired difference excludes 0.
    """
    difference = ours - theirs
    half = half_width(difference)
    passed = bool((difference < -margin).all() and difference.mean() + half < 0)
    seeds = ", ".join(f"{d:+.3f}" for d in difference)
    return Check(rule, f"{difference.mean():+.3f} ± {half:.3f} ({seeds})", passed)


def not_worse(rule: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> Check:
    """Checks that the mean of `ours` is above that of `theirs` by `tolerance` at most."""
    difference = ours - theirs
    seeds = ", ".join(f"{d:+.3f}" for d in difference)
    return Check(rule, f"{difference.mean():+.3f} ({seeds})", bool(difference.mean() <= tolerance))


def holds(rule: str, found: str, conditions: Sequence[bool] | np.ndarray | bool) -> Check:
    """Checks a condition, or the same one in every seed."""
    return Check(rule, found, bool(np.all(conditions)))


def random_drop(capacity_factor: float, tokens: int, num_experts: int, top_k: int) -> float:
    """Returns the share dropped if tokens chose experts at random, by the normal approximation.

    The load of an expert has mean m = k T / E and variance T p (1 - p) with p = k / E; what is
    above the capacity c * m is dropped, E[max(0, load - c m)] / m.
    """
    share = top_k / num_experts
    mean = tokens * share
    deviation = math.sqrt(tokens * share * (1 - share))
    z = (capacity_factor - 1) * mean / deviation
    density = math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    above = math.erfc(z / math.sqrt(2)) / 2
    return deviation * (density - z * above) / mean


def steps_to_reach(steps: np.ndarray, loss_ns: np.ndarray, goal_s: np.ndarray) -> np.ndarray:
    """Returns by seed the step, interpolated, at which a curve first is at `goal_s`; NaN if never.

    Args:
        loss_ns: [points of the curve, seeds].
    """
    found = np.full(len(goal_s), np.nan)
    for seed, goal in enumerate(goal_s):
        loss_n = loss_ns[:, seed]
        at = int(np.argmax(loss_n <= goal))
        if loss_n[at] > goal:
            continue
        if at == 0:
            found[seed] = steps[0]
            continue
        part = (loss_n[at - 1] - goal) / (loss_n[at - 1] - loss_n[at])
        found[seed] = steps[at - 1] + part * (steps[at] - steps[at - 1])
    return found
