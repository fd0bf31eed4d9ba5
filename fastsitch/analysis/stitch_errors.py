"""Distances between the representations that stitches provide and the expected ones: what Tables 1 and 2 hold."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

MEASURES = ("EV", "ES", "SV")


@dataclass(frozen=True, kw_only=True)
class StitchErrors:
    """Mean squared errors of all cells of one unit, each (sender positions, receiver positions), float64.

    NaN where the vanilla stitch diverged, all three where the cell is not part of the run. Source: Hernandez et
    al. 2022, Tables 1 and 2.

    Attributes:
        EV: between the expected representation and the vanilla stitch's.
        ES: between the expected representation and the matched (similarity-trained) stitch's.
        SV: between the matched stitch's representation and the vanilla stitch's.
        variance: of the expected representation about its mean in each channel, a mean over channels (receiver
            positions,).
        requested: the cells that are part of the run; None: all.
    """

    EV: Matrix
    ES: Matrix
    SV: Matrix
    variance: Matrix
    requested: NDArray[np.bool_] | None = None

    def normalised(self) -> "StitchErrors":
        """The errors divided by the variance of the expected representation; NaN where it does not vary.

        Returns:
            The same errors without a unit; 1 is what a constant stitch, the mean, would have.
        """
        scale = np.where(self.variance > 0, self.variance, np.nan)
        scaled = {name: getattr(self, name) / scale for name in (*MEASURES, "variance")}
        return replace(self, **scaled)
