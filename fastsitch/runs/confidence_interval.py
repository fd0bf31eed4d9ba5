"""How far the mean over seeds may lie from the true mean: Student's t interval."""

import math

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""Coverage of every interval that is reported."""


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t for which Student's distribution with so many degrees of freedom lies within -t and t with ``level``.

    From the distribution's closed form for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4), by
    bisection to the last bit. Raises ValueError unless freedom >= 1 and 0 < level < 1.
    """
    if freedom < 1 or not 0 < level < 1:
        raise ValueError(f"{freedom} degrees of freedom, level {level}: expected at least 1, and between 0 and 1")
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(high)


def half_width(by_seed: NDArray[np.float64], level: float = LEVEL) -> NDArray[np.float64]:
    """Half the width of the interval about the mean over seeds (axis 0); the other axes stay.

    NaN with a single seed, and where any seed's value is not finite.
    """
    seeds = by_seed.shape[0]
    if seeds < 2:
        return np.full(by_seed.shape[1:], np.nan)
    finite = np.isfinite(by_seed).all(0)
    deviation = np.where(finite, by_seed, 0.0).std(0, ddof=1)
    return np.where(finite, t_quantile(seeds - 1, level) * deviation / math.sqrt(seeds), np.nan)


def _within(angle: float, freedom: int) -> float:
    """Probability of -t to t, where t = sqrt(freedom) tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    total, term = 0.0, cosine if odd else 1.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total
