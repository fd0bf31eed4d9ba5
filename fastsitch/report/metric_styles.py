"""Label, colours, scale and number format of each metric."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.colors import Colormap, LogNorm, Normalize
from numpy.typing import NDArray

from fastsitch.errors import ConfigError, argument
from fastsitch.runs.run import Run
from fastsitch.vocabulary import Metric

_LOG_FROM = 100
"""Ratio of largest to smallest value from which the colour scale is logarithmic."""


@dataclass(frozen=True)
class Style:
    """How one metric is drawn; bright is always good."""

    label: str
    limits: tuple[float, float] | None
    """The colour scale, the same in every figure; None takes it from the values."""
    falling: bool = False
    """Whether small values are good."""

    def colours(self) -> Colormap:
        """The colour map; cells without a value are grey."""
        return matplotlib.colormaps["viridis_r" if self.falling else "viridis"].with_extremes(bad="0.85")

    def text(self, value: float) -> str:
        """A value in at most five characters."""
        if self.limits is not None or 0.0095 <= abs(value) < 100 or value == 0:
            # + 0.0 turns -0.00 into 0.00
            return f"{round(value, 2) + 0.0:.2f}"
        if 100 <= abs(value) < 1e4:
            return f"{value:.0f}"
        mantissa, _, exponent = f"{value:.0e}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa

    def scale(self, matrices: Sequence[NDArray[np.float64]]) -> Normalize:
        """One scale for matrices that are compared with each other."""
        if self.limits is not None:
            return Normalize(*self.limits)
        values = np.concatenate([matrix[np.isfinite(matrix)] for matrix in matrices])
        if values.size == 0:
            return Normalize(0, 1)
        low, high = float(values.min()), float(values.max())
        if low > 0 and high / low >= _LOG_FROM:
            return LogNorm(low, high)
        return Normalize(low, high if high > low else low + 1)


STYLES = {
    "accuracy": Style("accuracy of the stitched network", (0, 1)),
    "accuracy_ratio": Style("accuracy, as a share of the receiver's", (0, 1)),
    "accuracy_drop": Style("accuracy lost against the receiver", (0, 1), falling=True),
    "loss": Style("test loss of the stitched network", None, falling=True),
    "train_loss": Style("training loss", None, falling=True),
    "matched_error": Style("mean squared error of the matched stitch", None, falling=True),
}


def style_of(run: Run, metric: Metric) -> Style:
    """The style of a metric that this run has; raises ConfigError listing those that it has."""
    known = [name for name in STYLES if name in run.metrics]
    if metric not in known:
        raise ConfigError(f"{argument('metric', metric)}: expected one of {', '.join(known)}")
    return STYLES[metric]
