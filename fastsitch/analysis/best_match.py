"""Whether every sender position fits one receiver position best, and no two sender positions the same one.

The paper began with this expectation: similar networks correspond position by position, so stitching should single out
one receiver position for each sender position. It found the triangle instead.

Definition. Let A (I, J) be a matrix of accuracies, row i a sender position. The best match of row i is the receiver
position where A[i] is largest; its gap is that largest value minus the second largest of the row. Row i *holds* at
epsilon >= 0 when

- its best match is unique: the gap is above 0,
- no other row has its largest value at the same receiver position (a row with ties has it at each of them), so that the
  rows that hold map to receiver positions injectively, and
- the gap is at least epsilon.

A pair holds when all its rows do. Where I > J no pair can: there are fewer receiver positions than rows. Cells that are
not finite are left out, and so are rows with fewer than two finite cells and columns without any.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastsitch.analysis.bootstrap import Estimate, mean_estimate
from fastsitch.identity import numpy_generator
from fastsitch.runs.run import Run
from fastsitch.vocabulary import Metric, Setting

EPSILONS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Gaps in accuracy at which the expectation is examined."""


@dataclass(frozen=True, kw_only=True)
class BestMatchRow:
    """How often the expectation holds at one epsilon, in one pair or over all pairs of one or all settings."""

    setting: Setting | Literal["all"]
    """``all`` in rows over all pairs of all settings."""
    pair: tuple[str, str] | None
    """Sender and receiver; None for all pairs."""
    epsilon: float
    rows: Estimate
    """Share of rows that hold. For one pair its rows are resampled; over pairs it is the mean of their shares, and
    pairs are resampled."""
    pairs: Estimate
    """Share of pairs that hold."""
    possible: int
    """Pairs in which all rows could hold: no more sender than receiver positions."""
    counted: int
    """Pairs that count: those with a row that counts."""


def margins(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each row of a matrix the largest epsilon at which it holds (rows,); 0 where it never does, NaN if left out.

    Rounded to twelve decimals, so that 0.3 - 0.2 is at least 0.1.
    """
    values = np.where(np.isfinite(matrix), matrix, -np.inf)
    counts = np.isfinite(matrix).sum(1) >= 2
    # the columns where a row has its largest value: several in a tie
    best = (values == values.max(1, keepdims=True)) & np.isfinite(matrix)
    unshared = best & (best.sum(0) == 1)
    ordered = np.sort(values, 1)
    gaps = np.full(len(values), np.nan)
    gaps[counts] = np.round(ordered[counts, -1] - ordered[counts, -2], 12)
    return np.where(unshared.any(1) | ~counts, gaps, 0.0)


def holds(margin: NDArray[np.float64], epsilon: float) -> NDArray[np.float64]:
    """1 for each row that holds at ``epsilon``, 0 for each that does not; without the rows that are left out."""
    counted = margin[~np.isnan(margin)]
    return np.asarray((counted > 0) & (counted >= epsilon), np.float64)


def run_best_matches(
    run: Run, metric: Metric = "accuracy", epsilons: tuple[float, ...] = EPSILONS
) -> list[BestMatchRow]:
    """For each setting of a run, and each epsilon, one row per pair, then one over all pairs.

    With several settings the last rows, one per epsilon, are over all pairs of all of them. Intervals are made as in
    :func:`fastsitch.analysis.triangle.run_triangles`: seeded by the names, and over all pairs as if pairs were
    independent.
    """
    found: list[BestMatchRow] = []
    all_pairs: list[_PairMargins] = []
    for setting in run.config.settings:
        pairs = [
            _PairMargins(setting, (sender, receiver), run.matrix(sender, receiver, metric, setting=setting))
            for sender, receiver, which in run.pairs()
            if which == setting
        ]
        all_pairs += pairs
        for epsilon in epsilons:
            found += [pair.row(epsilon) for pair in pairs]
            found.append(_over_pairs(setting, pairs, epsilon))
    if len(run.config.settings) > 1:
        found += [_over_pairs("all", all_pairs, epsilon) for epsilon in epsilons]
    return found


class _PairMargins:
    """The margins of one pair's matrix."""

    def __init__(self, setting: Setting, names: tuple[str, str], matrix: NDArray[np.float64]) -> None:
        self.setting = setting
        self.names = names
        self.margins = margins(matrix)
        self.counts = not np.isnan(self.margins).all()
        columns = int(np.isfinite(matrix).any(0).sum())
        self.possible = int(self.counts and (~np.isnan(self.margins)).sum() <= columns)

    def row(self, epsilon: float) -> BestMatchRow:
        held = holds(self.margins, epsilon)
        return BestMatchRow(
            setting=self.setting,
            pair=self.names,
            epsilon=epsilon,
            rows=mean_estimate(held, numpy_generator("rows", self.setting, *self.names)),
            pairs=Estimate(float(held.all()) if len(held) else np.nan, np.nan, np.nan),
            possible=self.possible,
            counted=int(self.counts),
        )


def _over_pairs(setting: Setting | Literal["all"], pairs: list[_PairMargins], epsilon: float) -> BestMatchRow:
    held = [holds(pair.margins, epsilon) for pair in pairs if pair.counts]
    return BestMatchRow(
        setting=setting,
        pair=None,
        epsilon=epsilon,
        rows=mean_estimate(np.array([rows.mean() for rows in held]), numpy_generator("rows", setting)),
        pairs=mean_estimate(np.array([float(rows.all()) for rows in held]), numpy_generator("pairs", setting)),
        possible=sum(pair.possible for pair in pairs),
        counted=len(held),
    )
