"""The pattern of a stitching matrix: earlier receiver positions can stand on later sender positions."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Triangle:
    """Mean over the lower-left cells (j/J <= i/I), mean over the others; NaN where there are no such cells."""

    lower_left: float
    rest: float

    @property
    def gap(self) -> float:
        return self.lower_left - self.rest


def lower_left_mask(senders: int, receivers: int) -> NDArray[np.bool_]:
    """Where j/J <= i/I, for so many sender (rows) and receiver (columns) positions; I and J are the last indices."""
    i, j = np.arange(senders)[:, None], np.arange(receivers)[None, :]
    # compared without division: exact, and right for a network with a single position
    return np.asarray(j * (senders - 1) <= i * (receivers - 1))


def triangle(matrix: NDArray[np.float64]) -> Triangle:
    """Means over both regions of a matrix (sender positions, receiver positions), ignoring NaN cells."""
    mask = lower_left_mask(*matrix.shape)
    return Triangle(_mean(matrix[mask]), _mean(matrix[~mask]))


def _mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
