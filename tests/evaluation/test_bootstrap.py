"""Bootstrap intervals: right value, right width, the same for the same seed."""

import numpy as np

from luthier.evaluation import bootstrap


def test_interval_of_a_mean_agrees_with_the_normal_one():
    values = np.random.default_rng(0).normal(2.0, 1.0, 500)
    found = bootstrap.mean(values)
    half = 1.96 * values.std() / np.sqrt(500)
    assert abs(found.value - values.mean()) < 1e-12
    assert abs(found.low - (values.mean() - half)) < 0.02
    assert abs(found.high - (values.mean() + half)) < 0.02
    assert found.n == 500


def test_a_ratio_is_of_sums_not_a_mean_of_ratios():
    counts = np.array([[10.0, 1.0], [1.0, 10.0]])
    assert bootstrap.bootstrap(counts, lambda s: s[:, 0] / s[:, 1]).value == 1.0


def test_same_seed_same_interval_whatever_the_chunk(monkeypatch):
    values = np.arange(50.0)
    whole = bootstrap.mean(values, seed=1)
    assert whole == bootstrap.mean(values, seed=1)
    assert whole != bootstrap.mean(values, seed=2)
    monkeypatch.setattr(bootstrap, "_CHUNK_ITEMS", 700)
    chunked = bootstrap.mean(values, seed=1)
    assert (chunked.low, chunked.high) == (whole.low, whole.high)
