"""Bootstrap intervals: right value, right width, the same for the same seed."""

import numpy as np
import pytest

from luthier.evaluation import bootstrap
from luthier.evaluation.bootstrap import interval, mean


def test_interval_of_a_mean_agrees_with_the_normal_one():
    values = np.random.default_rng(0).normal(2.0, 1.0, 500)
    found = interval(mean(values), resamples=4000)
    half = 1.96 * values.std() / np.sqrt(500)
    assert found.value == pytest.approx(values.mean())
    assert abs(found.low - (values.mean() - half)) < 0.02
    assert abs(found.high - (values.mean() + half)) < 0.02
    assert found.n == 500


def test_equals_a_loop_that_draws_rows():
    rows = np.random.default_rng(1).integers(1, 9, (40, 2)).astype(float)
    rng = np.random.default_rng(2)
    slow = []
    for _ in range(3000):
        drawn = rows[rng.integers(0, 40, 40)]
        slow.append(drawn[:, 0].sum() / drawn[:, 1].sum())
    found = interval(rows, resamples=3000)
    np.testing.assert_allclose([found.low, found.high], np.quantile(slow, [0.025, 0.975]), rtol=0.02)


def test_a_ratio_is_of_sums_not_a_mean_of_ratios():
    assert interval(np.array([[10.0, 1.0], [1.0, 10.0]])).value == 1.0


def test_same_seed_same_interval_and_blocks_hold_at_least_one_resample(monkeypatch):
    rows = mean(np.arange(50.0))
    assert interval(rows, seed=1) == interval(rows, seed=1)
    assert interval(rows, seed=1) != interval(rows, seed=2)
    whole = interval(rows, seed=1)
    monkeypatch.setattr(bootstrap, "_BLOCK", 7)
    assert interval(rows, seed=1) == whole


def test_one_row_has_no_spread():
    assert interval(mean(np.array([0.5]))) == bootstrap.Metric(0.5, 0.5, 0.5, 1)
