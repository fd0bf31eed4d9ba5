"""Tables 1 and 2 of the published study: statistics of the errors between representations, over stitches.

One scalar per stitch goes in (its EV, ES or SV). Table 1 is over the cells with i = j, Table 2 over all cells.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsitch.analysis.errors import MEASURES, StitchErrors
from fastsitch.sweep.config import SETTINGS

STATISTICS = ("minimum", "mean", "maximum", "standard deviation")
"""The standard deviation is that of the stitches at hand (NumPy's default, ddof=0)."""

COLOURS = ("red", "yellow", "green")
"""Of the highest, the second and the lowest among EV, ES and SV."""

Errors = Mapping[tuple[str, str, str], StitchErrors]
"""Errors of units by (sender, receiver, setting)."""

Entry = Mapping[str, float]
"""One statistic in one setting: EV, ES, SV."""


@dataclass(frozen=True, kw_only=True)
class ErrorTable:
    """One table: for each setting and statistic the three measures, and how many cells they are of."""

    diagonal: bool
    """Over the cells with i = j (Table 1), or over all (Table 2)."""
    normalised: bool
    """Errors over the variance of the expected representation."""
    entries: Mapping[str, Mapping[str, Entry]]
    """Setting, then statistic, then measure; NaN where no cell is left. In the order T2T, T2R, R2T, R2R."""
    cells: Mapping[str, int]
    """Cells that count, by setting: those whose three errors are all finite, so that columns are of the same cells."""
    left_out: Mapping[str, int]
    """Cells that do not, of those that the run asked for."""

    @property
    def name(self) -> str:
        """``table_1``, ``table_2_normalised``; what its files are called."""
        return f"table_{1 if self.diagonal else 2}{'_normalised' if self.normalised else ''}"

    @property
    def title(self) -> str:
        which = "stitches with i = j" if self.diagonal else "all stitches"
        what = "mean squared errors between representations"
        scale = ", over the variance of the expected one" if self.normalised else ""
        return f"Table {1 if self.diagonal else 2}: {what}{scale}; {which}"


def error_table(errors: Errors, *, diagonal: bool, normalised: bool = False) -> ErrorTable:
    """One table over the units at hand; settings without any unit have no row."""
    entries, cells, left_out = {}, {}, {}
    for setting in SETTINGS:
        units = [unit for (_, _, which), unit in errors.items() if which == setting]
        if not units:
            continue
        stacked = np.concatenate([_cells(unit, diagonal=diagonal, normalised=normalised) for unit in units], axis=1)
        finite = stacked[:, np.isfinite(stacked).all(0)]
        entries[setting] = _statistics(finite)
        cells[setting] = finite.shape[1]
        left_out[setting] = stacked.shape[1] - finite.shape[1]
    return ErrorTable(diagonal=diagonal, normalised=normalised, entries=entries, cells=cells, left_out=left_out)


def error_tables(errors: Errors) -> list[ErrorTable]:
    """Tables 1 and 2, each as it is and normalised."""
    return [
        error_table(errors, diagonal=diagonal, normalised=normalised)
        for diagonal in (True, False)
        for normalised in (False, True)
    ]


def colours(entry: Entry) -> dict[str, str]:
    """The colour of each measure of one entry: highest red, second yellow, lowest green; none for NaN.

    Equal values have the same colour: that of the highest where they are the highest, else of the lowest.
    """
    values = {measure: value for measure, value in entry.items() if not np.isnan(value)}
    if not values:
        return {}
    highest, lowest = max(values.values()), min(values.values())
    red, yellow, green = COLOURS
    return {
        measure: red if value == highest else green if value == lowest else yellow for measure, value in values.items()
    }


def _cells(errors: StitchErrors, *, diagonal: bool, normalised: bool) -> NDArray[np.float64]:
    """The three measures (3, cells) of the cells of one unit that were asked for."""
    own = errors.normalised() if normalised else errors
    matrices = np.stack([getattr(own, measure) for measure in MEASURES])
    counts = np.ones(matrices.shape[1:], bool) if own.asked is None else own.asked
    if diagonal:
        return np.asarray(np.diagonal(matrices, axis1=1, axis2=2))[:, np.diagonal(counts)]
    return np.asarray(matrices[:, counts])


def _statistics(cells: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    if cells.size == 0:
        return {statistic: dict.fromkeys(MEASURES, float("nan")) for statistic in STATISTICS}
    results = (cells.min(1), cells.mean(1), cells.max(1), cells.std(1))
    return {
        statistic: dict(zip(MEASURES, map(float, values), strict=True))
        for statistic, values in zip(STATISTICS, results, strict=True)
    }
