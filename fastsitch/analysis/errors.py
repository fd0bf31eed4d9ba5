"""How far the representations of stitches lie from the expected ones, and from each other."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

MEASURES = ("EV", "ES", "SV")


@dataclass(frozen=True, kw_only=True)
class StitchErrors:
    """Mean squared errors of all cells of one unit, each (sender positions, receiver positions), float64.

    NaN where the vanilla stitch diverged, all three where the cell was not asked for. Source: Hernandez et al. 2022,
    Tables 1 and 2.
    """

    EV: Matrix
    """Between the expected representation and the vanilla stitch's."""
    ES: Matrix
    """Between the expected representation and the matched (similarity-trained) stitch's."""
    SV: Matrix
    """Between the matched stitch's representation and the vanilla stitch's."""
    variance: Matrix
    """Of the expected representation about its mean in each channel, a mean over channels (receiver positions,)."""
    asked: NDArray[np.bool_] | None = None
    """The cells that the run was asked for; None: all."""

    def normalised(self) -> "StitchErrors":
        """The errors over the variance of the expected representation; NaN where that does not vary."""
        scale = np.where(self.variance > 0, self.variance, np.nan)
        scaled = {name: getattr(self, name) / scale for name in (*MEASURES, "variance")}
        return replace(self, **scaled)
