"""A comparison with the published study as text."""

import numpy as np
from numpy.typing import NDArray

from fastsitch.analysis.compare_published import Comparison, RunComparison

_GAP = " " * 6


def comparison_text(comparison: RunComparison) -> str:
    """For each shared pair the published matrix and the run's side by side, then how well they agree."""
    blocks = []
    if comparison.reason:
        blocks.append(
            f"run {comparison.run} cannot be compared with the published study cell by cell: {comparison.reason}.\n"
            "Only the order of the cells can: rank correlation alone is given."
        )
    if comparison.accuracies:
        lines = [
            f"{name:14}{published:>11.4f}{measured:>11.4f}"
            for name, (published, measured) in comparison.accuracies.items()
        ]
        blocks.append("\n".join([f"{'network':14}{'published':>11}{'this run':>11}", *lines]))
    blocks += [matrix_text(matrix) for matrix in comparison.matrices]
    return "\n\n".join(blocks)


def matrix_text(comparison: Comparison) -> str:
    """One published matrix beside the run's; rows are sender positions, columns receiver positions."""
    published = comparison.published
    kind = "matched" if published.matched else "vanilla"
    head = f"{comparison.sender} -> {comparison.receiver}, {published.setting}, {kind}: {published.source}"
    left, right = _lines(published.accuracy), _lines(comparison.accuracy)
    width = max(map(len, left))
    titles = f"{'published':{width}}{_GAP}this run"
    body = [f"{a:{width}}{_GAP}{b}" for a, b in zip(left, right, strict=True)]
    total = published.accuracy.size
    measures = [f"Spearman rank correlation {_value(comparison.rank_correlation, '+.3f')}"]
    if comparison.mean_difference is not None:
        measures.append(f"mean absolute difference {_value(comparison.mean_difference, '.4f')}")
    measures.append(f"over {comparison.cells} of {total} cells")
    return "\n".join([head, titles, *body, ", ".join(measures)])


def _lines(matrix: NDArray[np.float64]) -> list[str]:
    head = "   " + "".join(f"{j:>5}" for j in range(matrix.shape[1]))
    return [head, *(f"{i:>3}" + "".join(f"{_value(value, '.2f'):>5}" for value in row) for i, row in enumerate(matrix))]


def _value(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else "–"
