"""The triangle in a stitching matrix: later sender positions can be stitched to earlier receiver positions."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastsitch.analysis.bootstrap import Estimate, mean_estimate, percentile_interval, resampled_means
from fastsitch.identity import numpy_generator
from fastsitch.runs.run import Run
from fastsitch.vocabulary import Metric, Setting


@dataclass(frozen=True)
class Triangle:
    """Mean over the lower-left cells (j/J <= i/I), mean over the others; NaN where there are no such cells."""

    lower_left: float
    rest: float

    @property
    def gap(self) -> float:
        return self.lower_left - self.rest


@dataclass(frozen=True, kw_only=True)
class TriangleRow:
    """Both regions and their difference, for one pair or over all pairs of a setting or of all settings."""

    setting: Setting | Literal["all"]
    """``all`` in the row over all pairs of all settings."""
    pair: tuple[str, str] | None
    """Sender and receiver; None for all pairs."""
    pairs: int
    """Pairs that count: those with finished cells in both regions."""
    regions: Triangle
    gap: Estimate


def lower_left_mask(senders: int, receivers: int) -> NDArray[np.bool_]:
    """Where j/J <= i/I, for so many sender (rows) and receiver (columns) positions; I and J are the last indices."""
    i, j = np.arange(senders)[:, None], np.arange(receivers)[None, :]
    # compared without division: exact, and right for a network with a single position
    return np.asarray(j * (senders - 1) <= i * (receivers - 1))


def triangle(matrix: NDArray[np.float64]) -> Triangle:
    """Means over both regions of a matrix (sender positions, receiver positions), ignoring NaN cells."""
    return Triangle(*(float(cells.mean()) if cells.size else float("nan") for cells in _regions(matrix)))


def gap_over_cells(matrix: NDArray[np.float64], generator: np.random.Generator) -> Estimate:
    """Lower left minus rest of one matrix; for its interval the cells of each region are resampled."""
    lower_left, rest = _regions(matrix)
    if min(lower_left.size, rest.size) < 2:
        return Estimate(triangle(matrix).gap, np.nan, np.nan)
    resampled = resampled_means(lower_left, generator) - resampled_means(rest, generator)
    return Estimate(triangle(matrix).gap, *percentile_interval(resampled))


def run_triangles(run: Run, metric: Metric = "accuracy") -> list[TriangleRow]:
    """For each setting of a run one row per pair, then one over all pairs in which every pair counts the same.

    With several settings a last row is over all pairs of all of them.

    The interval over all pairs resamples pairs as if they were independent. Pairs that share a network are not quite:
    with few networks it is rather too narrow. Generators are seeded by the names, so the same run gives the same
    intervals.
    """
    rows: list[TriangleRow] = []
    for setting in run.config.settings:
        found = []
        for sender, receiver, _ in (pair for pair in run.pairs() if pair[2] == setting):
            matrix = run.matrix(sender, receiver, metric, setting=setting)
            regions = triangle(matrix)
            gap = gap_over_cells(matrix, numpy_generator("triangle", setting, sender, receiver))
            count = int(np.isfinite(regions.gap))
            found.append(TriangleRow(setting=setting, pair=(sender, receiver), pairs=count, regions=regions, gap=gap))
        rows += [*found, _over_pairs(setting, found)]
    if len(run.config.settings) > 1:
        rows.append(_over_pairs("all", [row for row in rows if row.pair is not None]))
    return rows


def _over_pairs(setting: Setting | Literal["all"], rows: list[TriangleRow]) -> TriangleRow:
    regions = [row.regions for row in rows if row.pairs]
    values = np.array([(pair.lower_left, pair.rest) for pair in regions]).reshape(-1, 2)
    means = Triangle(*map(float, values.mean(0))) if regions else Triangle(np.nan, np.nan)
    gap = mean_estimate(values[:, 0] - values[:, 1], numpy_generator("triangle", setting))
    return TriangleRow(setting=setting, pair=None, pairs=len(regions), regions=means, gap=gap)


def _regions(matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The finite cells of the lower left, and the others."""
    mask, finite = lower_left_mask(*matrix.shape), np.isfinite(matrix)
    return matrix[mask & finite], matrix[~mask & finite]
