"""A comparison with the published study as text."""

import numpy as np
from numpy.typing import NDArray

from fastsitch.analysis.compare import Comparison, RunComparison

_GAP = " " * 6


def comparison_text(comparison: RunComparison) -> str:
    """For each shared matrix the published one and the run's side by side, then what the two have in common."""
    parts = []
    if comparison.reason:
        parts.append(
            f"run {comparison.run} is of another kind than the published one: {comparison.reason}.\n"
            "Accuracies are not comparable then; only the order of the cells is: rank correlation alone is given."
        )
    if comparison.accuracies:
        lines = [f"{name:14}{published:>11.4f}{own:>11.4f}" for name, (published, own) in comparison.accuracies.items()]
        parts.append("\n".join([f"{'network':14}{'published':>11}{'this run':>11}", *lines]))
    parts += [matrix_text(matrix) for matrix in comparison.matrices]
    return "\n\n".join(parts)


def matrix_text(comparison: Comparison) -> str:
    """One published matrix and the run's own; rows are sender positions, columns receiver positions."""
    published = comparison.published
    kind = "matched" if published.matched else "vanilla"
    head = f"{comparison.sender} -> {comparison.receiver}, {published.setting}, {kind}: {published.source}"
    left, right = _lines(published.accuracy), _lines(comparison.own)
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
