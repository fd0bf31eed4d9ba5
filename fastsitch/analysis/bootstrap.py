"""Percentile intervals by bootstrap."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsitch.runs.confidence_interval import LEVEL

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; ``low`` and ``high`` are NaN where there are too few values to resample."""

    value: float
    low: float
    high: float


def resampled_means(values: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Means (RESAMPLES,) of as many values as there are, drawn with replacement from ``values`` (n,)."""
    drawn = generator.integers(len(values), size=(RESAMPLES, len(values)))
    return np.asarray(values[drawn].mean(1))


def percentile_interval(resampled: NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 % of a statistic over resamples."""
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_estimate(values: NDArray[np.float64], generator: np.random.Generator) -> Estimate:
    """Mean of values (n,) with an interval from resampling them; NaN without any, no interval with fewer than two."""
    if len(values) == 0:
        return Estimate(np.nan, np.nan, np.nan)
    if len(values) == 1:
        return Estimate(float(values[0]), np.nan, np.nan)
    return Estimate(float(values.mean()), *percentile_interval(resampled_means(values, generator)))
