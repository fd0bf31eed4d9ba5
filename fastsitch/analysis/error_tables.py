"""Tables 1 and 2 of the paper: statistics over stitches of the distances between representations.

Each stitch counts with one number per measure: its EV, ES and SV. Table 1 is over the cells with i = j, Table 2
over all cells.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsitch.analysis.stitch_errors import MEASURES, StitchErrors
from fastsitch.vocabulary import SETTINGS, Setting

STATISTICS = ("minimum", "mean", "maximum", "standard deviation")
"""The standard deviation is that of the population (NumPy's default, ddof=0)."""

COLOURS = ("red", "yellow", "green")
"""Colours of the highest, the second and the lowest among EV, ES and SV."""

StitchErrorsByPair = Mapping[tuple[str, str, Setting], StitchErrors]
"""By (sender, receiver, setting)."""

Entry = Mapping[str, float]
"""One statistic in one setting: EV, ES, SV."""


@dataclass(frozen=True, kw_only=True)
class ErrorTable:
    """One table: for each setting and statistic the three measures, and how many cells they are over."""

    diagonal: bool
    """Whether over the cells with i = j (Table 1), or over all (Table 2)."""
    normalised: bool
    """Whether errors are divided by the variance of the expected representation."""
    entries: Mapping[Setting, Mapping[str, Entry]]
    """By setting, statistic and measure; NaN where no cell is left. In the order T2T, T2R, R2T, R2R."""
    cells: Mapping[Setting, int]
    """Cells by setting: those whose three errors are all finite, so that all columns are over the same cells."""
    left_out: Mapping[Setting, int]
    """Cells of the run that are not counted, by setting."""

    @property
    def name(self) -> str:
        """The stem of its files: ``table_1``, ``table_2_normalised``."""
        return f"table_{1 if self.diagonal else 2}{'_normalised' if self.normalised else ''}"

    @property
    def title(self) -> str:
        which = "stitches with i = j" if self.diagonal else "all stitches"
        what = "mean squared errors between representations"
        scale = ", over the variance of the expected one" if self.normalised else ""
        return f"Table {1 if self.diagonal else 2}: {what}{scale}; {which}"


TABLE_NAMES = ("table_1", "table_1_normalised", "table_2", "table_2_normalised")


def error_table(errors: StitchErrorsByPair, *, diagonal: bool, normalised: bool = False) -> ErrorTable:
    """One table over the given pairs; settings without a pair have no row."""
    entries, cells, left_out = {}, {}, {}
    for setting in SETTINGS:
        pairs = [pair for (_, _, which), pair in errors.items() if which == setting]
        if not pairs:
            continue
        stacked = np.concatenate([_cells(pair, diagonal=diagonal, normalised=normalised) for pair in pairs], axis=1)
        finite = stacked[:, np.isfinite(stacked).all(0)]
        entries[setting] = _statistics(finite)
        cells[setting] = finite.shape[1]
        left_out[setting] = stacked.shape[1] - finite.shape[1]
    return ErrorTable(diagonal=diagonal, normalised=normalised, entries=entries, cells=cells, left_out=left_out)


def error_tables(errors: StitchErrorsByPair) -> list[ErrorTable]:
    """Tables 1 and 2, each unchanged and normalised."""
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
    """The three measures (3, cells) of the requested cells of one pair."""
    errors = errors.normalised() if normalised else errors
    matrices = np.stack([getattr(errors, measure) for measure in MEASURES])
    requested = np.ones(matrices.shape[1:], bool) if errors.requested is None else errors.requested
    if diagonal:
        return np.asarray(np.diagonal(matrices, axis1=1, axis2=2))[:, np.diagonal(requested)]
    return np.asarray(matrices[:, requested])


def _statistics(cells: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    if cells.size == 0:
        return {statistic: dict.fromkeys(MEASURES, float("nan")) for statistic in STATISTICS}
    results = (cells.min(1), cells.mean(1), cells.max(1), cells.std(1))
    return {
        statistic: dict(zip(MEASURES, map(float, values), strict=True))
        for statistic, values in zip(STATISTICS, results, strict=True)
    }
