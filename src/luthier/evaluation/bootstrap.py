"""Confidence intervals by the bootstrap over rows (percentile method; Efron, 1979; Koehn, 2004, for texts).

Every metric here is a function of sums over the rows: exact match of (right, 1), perplexity of (negative
log-likelihood, tokens), F1 of (true positives, predicted, wanted). So one row is a vector of k counts, a
resample is how often each row was drawn, and all resamples are one product of matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
_BLOCK = 1 << 22  # draws held at once: 32 MiB of counts


@dataclass(frozen=True)
class Metric:
    """A value, its confidence interval (95% unless asked otherwise) and the number of rows behind it."""

    value: float
    low: float
    high: float
    n: int


Statistic = Callable[[np.ndarray], np.ndarray]


def ratio(sums: np.ndarray) -> np.ndarray:
    """First sum over the second, (..., 2) -> (...); 0 where there is nothing to divide by."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] != 0)


def mean(values: np.ndarray) -> np.ndarray:
    """Rows for `ratio` from one score a row: (n,) -> (n, 2)."""
    return np.stack([values, np.ones_like(values)], axis=1)


def interval(
    rows: np.ndarray,
    statistic: Statistic = ratio,
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Metric:
    """The statistic of all rows, with its bootstrap interval.

    Args:
        rows: (n, k) counts, n >= 1.
        statistic: from sums over rows (..., k) to values (...).
        seed: of the draws; metrics on the same rows with the same seed are resampled alike.
    """
    rows = np.asarray(rows, dtype=np.float64)
    n = len(rows)
    rng = np.random.default_rng(seed)
    sums = []
    for start in range(0, resamples, step := max(1, _BLOCK // n)):
        draws = rng.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))  # (block, n)
        sums.append(draws @ rows)  # (block, k)
    values = statistic(np.concatenate(sums))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Metric(float(statistic(rows.sum(0))), float(low), float(high), n)
