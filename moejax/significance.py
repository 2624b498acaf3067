"""Whether a difference of means over seeds is more than chance: Student's and Welch's t. No JAX."""

import math
from collections.abc import Sequence
from statistics import mean, stdev, variance

CONFIDENCE = 0.95


def spread(values: Sequence[float]) -> float | None:
    """Returns the standard deviation over seeds, with n - 1; None below 2, or not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return stdev(values)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> float | None:
    """Returns half of Student's interval of a mean over seeds; None as `spread`."""
    error = spread(values)
    return (
        None
        if error is None
        else _half(error / math.sqrt(len(values)), len(values) - 1, confidence)
    )


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
    from scipy.special import stdtr  # not scipy.stats, which takes a second to import

    return _half(error, freedom), 2 * float(stdtr(freedom, -abs(difference) / error))


def _half(error: float, freedom: float, confidence: float = CONFIDENCE) -> float:
    from scipy.special import stdtrit

    return error * float(stdtrit(freedom, (1 + confidence) / 2))
