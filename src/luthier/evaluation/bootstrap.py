"""Bootstrap confidence intervals (Efron, 1979): resample the examples, take percentiles of the metric."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
# Resamples drawn at once: bounds the memory of the index matrix.
_CHUNK_ITEMS = 2_000_000


@dataclass(frozen=True)
class Metric:
    """A value with its 95% interval; `n` is the number of examples it rests on."""

    value: float
    low: float
    high: float
    n: int


def bootstrap(counts: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int = 0) -> Metric:
    """The statistic of summed counts, and its percentile interval.

    Args:
        counts: (n, k), what each example adds, such as (negative log-likelihood, tokens).
        statistic: sums (b, k) to values (b,), such as `exp(s[:, 0] / s[:, 1])`.
    """
    n = len(counts)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ITEMS // max(n, 1))
    sums = [
        counts[rng.integers(0, n, size=(min(chunk, RESAMPLES - start), n))].sum(axis=1)
        for start in range(0, RESAMPLES, chunk)
    ]
    values = statistic(np.concatenate(sums))
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Metric(float(statistic(counts.sum(axis=0, keepdims=True))[0]), float(low), float(high), n)


def mean(values: np.ndarray, *, seed: int = 0) -> Metric:
    """The mean of one number an example (n,), with its interval."""
    counts = np.stack([values, np.ones(len(values))], axis=1).astype(np.float64)
    return bootstrap(counts, lambda s: s[:, 0] / s[:, 1], seed=seed)
