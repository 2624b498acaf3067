"""The tests of significance, against those of scipy.stats."""

import math

import pytest
import scipy.stats

from moejax.significance import mean_interval, paired, spread, welch


def test_significance_is_that_of_scipy_stats():
    a, b = [1.51, 1.53, 1.49], [1.57, 1.56, 1.54, 1.58]
    oracle = scipy.stats.ttest_ind(a, b, equal_var=False)
    interval, p = welch(a, b)
    assert p == pytest.approx(oracle.pvalue)
    low, high = oracle.confidence_interval(0.95)
    assert interval == pytest.approx((high - low) / 2)
    pairs = [x - y for x, y in zip(a, b, strict=False)]
    assert paired(pairs) == pytest.approx(scipy.stats.ttest_rel(a, b[:3]).pvalue)
    assert welch([1.0], b) == (None, None)
    assert welch([1.0, 1.0], [2.0, 2.0]) == (None, None)  # nothing varies: no test
    assert welch([1.0, math.nan], b) == (None, None)
    assert paired([0.1]) is None


def test_the_interval_of_a_mean_is_that_of_scipy_stats():
    values = [1.51, 1.53, 1.49, 1.58]
    for confidence in (0.95, 0.99):
        low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(confidence)
        assert mean_interval(values, confidence) == pytest.approx((high - low) / 2)
    assert mean_interval([1.0]) is None


def test_spread_is_over_seeds_and_unknown_below_two():
    assert spread([1.0, 2.0, 4.0]) == pytest.approx(math.sqrt(7 / 3))  # 14 / 3 over n - 1
    assert spread([1.0]) is None
    assert spread([1.0, math.nan]) is None
