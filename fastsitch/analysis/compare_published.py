"""Compare a run with the published matrices of the same pairs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsitch.analysis.published import DATASET, WIDTH, PublishedMatrix, published_accuracies, published_matrices
from fastsitch.errors import RunError
from fastsitch.network_names import BLOCKS, NetworkName
from fastsitch.runs.run import Run
from fastsitch.vocabulary import Setting


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One published matrix and the run's matrix of the same pair and setting."""

    published: PublishedMatrix
    sender: str
    """Its name in the run, with its seed; so too ``receiver``."""
    receiver: str
    accuracy: NDArray[np.float64]
    """Of the run, the mean over its seeds; NaN where a cell is not done or diverged."""
    cells: int
    """Cells that count: those with a value on both sides."""
    rank_correlation: float
    """Spearman's, over cells; NaN with fewer than two cells, or where one side is constant."""
    mean_difference: float | None
    """Mean absolute difference of accuracies over cells; None where the run has another width or data set."""


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """All pairs and settings that a run and the published study share."""

    run: str
    reason: str
    """Why accuracies cannot be compared; empty where they can."""
    accuracies: dict[str, tuple[float, float]]
    """Accuracies of the trained networks, published and in the run, by name; empty where they cannot be compared."""
    matrices: list[Comparison]


def compare_run(run: Run) -> RunComparison:
    """Compare a run with the published matrices of the same architectures and settings.

    Vanilla runs are compared with Figure 2 and the logs, matched ones with Figure 5. Networks of any seed count, but a
    published pair of one network with itself only with such a pair.

    Args:
        run: the run.

    Returns:
        Rank correlations of every matrix that both share, and differences of accuracies where the run is of the
        published scale and data.

    Raises:
        RunError: nothing is shared.
    """
    matched = run.config.loss == "match"
    published = [matrix for matrix in published_matrices() if matrix.matched == matched]
    reason = scale_reason(run)
    shared = [
        _compare(run, matrix, pair, comparable=not reason)
        for matrix in published
        for pair in run.pairs()
        if _same_pair(matrix, *pair)
    ]
    if not shared:
        known = dict.fromkeys(f"{each.sender}--{each.receiver}.{each.setting}" for each in published)
        raise RunError(
            f"run {run.name!r} shares no pair and setting with the published "
            f"{'matched' if matched else 'vanilla'} matrices: those are {', '.join(known)}"
        )
    return RunComparison(run=run.name, reason=reason, accuracies={} if reason else _accuracies(run), matrices=shared)


def scale_reason(run: Run) -> str:
    """Why accuracies of a run cannot be compared with the published ones; empty when they can."""
    widths = sorted({network.width for network in run.networks.values()})
    reasons = []
    if run.config.dataset != DATASET:
        reasons.append(f"its data set is {run.config.dataset}, the published one {DATASET}")
    if widths != [WIDTH]:
        reasons.append(f"its networks have width {', '.join(map(str, widths))}, the published ones {WIDTH}")
    return "; ".join(reasons)


def spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's rank correlation of values (n,); equal values share the mean of their ranks.

    NaN with fewer than two values, or where one side is constant.
    """
    if len(a) < 2:
        return float("nan")
    first, second = (ranks(values) - (len(values) + 1) / 2 for values in (a, b))
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum() / scale) if scale else float("nan")


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1 (smallest) to n; equal values share the mean of their ranks."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return np.asarray((last - (count - 1) / 2)[group], np.float64)


def _compare(run: Run, published: PublishedMatrix, pair: tuple[str, str, Setting], *, comparable: bool) -> Comparison:
    sender, receiver, setting = pair
    accuracy = run.matrix(sender, receiver, "accuracy", setting=setting)
    if accuracy.shape != published.accuracy.shape:
        raise RunError(
            f"{sender} -> {receiver}: the run has {accuracy.shape[0]} x {accuracy.shape[1]} positions, the published "
            f"matrix {published.accuracy.shape[0]} x {published.accuracy.shape[1]}"
        )
    both = np.isfinite(accuracy) & np.isfinite(published.accuracy)
    a, b = accuracy[both], published.accuracy[both]
    difference = float(np.abs(a - b).mean()) if a.size else float("nan")
    return Comparison(
        published=published,
        sender=sender,
        receiver=receiver,
        accuracy=accuracy,
        cells=int(both.sum()),
        rank_correlation=spearman(a, b),
        mean_difference=difference if comparable else None,
    )


def _same_pair(published: PublishedMatrix, sender: str, receiver: str, setting: Setting) -> bool:
    """Whether a pair of the run has the architectures and the setting of a published matrix."""
    names = (NetworkName.parse(sender), NetworkName.parse(receiver))
    blocks = tuple(BLOCKS.get(name.architecture) for name in names)
    if setting != published.setting or blocks != (BLOCKS[published.sender], BLOCKS[published.receiver]):
        return False
    # sender and receiver have different random weights, so only T2T stitches a network to itself
    return setting != "T2T" or (blocks[0] == blocks[1]) == (names[0] == names[1])


def _accuracies(run: Run) -> dict[str, tuple[float, float]]:
    by_blocks = {BLOCKS[name]: value for name, value in published_accuracies().items()}
    return {
        str(name): (by_blocks[BLOCKS[name.architecture]], network.accuracy)
        for name, network in run.networks.items()
        if name.built_in and not name.random and BLOCKS[name.architecture] in by_blocks
    }
