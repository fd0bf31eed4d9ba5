"""Evaluate matched stitches with the running statistics that the training of vanilla stitches left in the receiver.

This is how the paper obtained its Figure 5: its receivers were not restored after training.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fastsitch.activations.source import Source
from fastsitch.errors import RunError, argument
from fastsitch.progress import Progress, Report, ignore
from fastsitch.receivers.batch_statistics_network import BatchStatisticsNetwork
from fastsitch.root import Root
from fastsitch.runs.continue_run import require_same_origin
from fastsitch.runs.run import Run
from fastsitch.runs.workbench import Workbench
from fastsitch.stitching.cells import Cell, Unit, split_groups
from fastsitch.stitching.engine import evaluate_with_statistics

Pair = tuple[str, str, str, int]
"""Sender, receiver, setting, seed."""


@torch.no_grad()
def leftover_accuracy(
    root: Root,
    vanilla: Run,
    matched: Run,
    *,
    device: torch.device,
    report: Report = ignore,
) -> dict[Pair, NDArray[np.float64]]:
    """Accuracy of the matched stitches of one run, with the running statistics of the same cells of another.

    ``vanilla`` was made with ``--receiver-bn batch``, ``matched`` with ``--loss match``. For every sender, receiver,
    setting and seed that is done in both: a matrix (sender positions, receiver positions), NaN where outputs are not
    finite and at cells that not both runs have. Behind the last position there is only the classifier, without
    statistics: that column is the matched run's. ``report`` gets the units done. Raises RunError
    when a run is of another kind, or both share no such cell or stitched other networks or images.
    """
    shared = _shared_units(vanilla, matched)
    workbench = Workbench.open(root, vanilla, device, matched.resolved.source_of)
    accuracies: dict[Pair, NDArray[np.float64]] = {}
    for sender in dict.fromkeys(unit.sender_network for unit in shared):
        source, _, origin = workbench.representations.sender(sender)
        for unit in (unit for unit in shared if unit.sender_network == sender):
            require_same_origin(vanilla, [unit], "store_hash", origin)
            require_same_origin(matched, [_counterpart(unit)], "store_hash", origin)
            pair = (unit.sender, unit.receiver, unit.setting, unit.seed)
            receiver = workbench.receiver(unit.receiver_network)
            assert isinstance(receiver, BatchStatisticsNetwork)
            accuracies[pair] = _evaluate(vanilla, matched, unit, receiver, source)
            report(Progress(len(accuracies), len(shared), "units", "leftover statistics", unit.name))
    return accuracies


def _evaluate(
    vanilla: Run, matched: Run, unit: Unit, receiver: BatchStatisticsNetwork, source: Source
) -> NDArray[np.float64]:
    """The matrix of one unit of the vanilla run."""
    matrix = np.full((len(source.shapes), len(receiver.positions)), np.nan)
    for group in split_groups(_shared_cells(vanilla, matched, unit), vanilla.resolved.group_size):
        found = evaluate_with_statistics(
            receiver,
            source,
            {cell: matched.read_stitch(_matched_cell(cell)) for cell in group},
            {cell: vanilla.read_statistics(cell) for cell in group},
            # what fitted in memory in training fits here
            images=2 * vanilla.config.recipe.batch_size,
            kernel=vanilla.resolved.kernel,
            rules=vanilla.config.rules,
        )
        for cell, accuracy in found.items():
            matrix[cell.i, cell.j] = accuracy
    return matrix


def _counterpart(unit: Unit) -> Unit:
    """The matched unit of a vanilla one."""
    return replace(unit, loss="match")


def _matched_cell(cell: Cell) -> Cell:
    """The matched cell of a vanilla one."""
    return replace(cell, unit=replace(cell.unit, loss="match"))


def _shared_cells(vanilla: Run, matched: Run, unit: Unit) -> list[Cell]:
    """The cells of a vanilla unit that the matched run has too."""
    available = set(matched.cells(_counterpart(unit)))
    return [cell for cell in vanilla.cells(unit) if _matched_cell(cell) in available]


def _shared_units(vanilla: Run, matched: Run) -> list[Unit]:
    """The finished units of the vanilla run whose counterparts are finished too."""
    if vanilla.config.receiver_bn != "batch":
        raise RunError(
            f"run {vanilla.name!r} has no running statistics: expected one made with {argument('receiver_bn', 'batch')}"
        )
    if matched.config.loss != "match":
        raise RunError(
            f"run {matched.name!r} has no matched stitches: expected one made with {argument('loss', 'match')}"
        )
    if vanilla.data_hash != matched.data_hash:
        raise RunError(f"runs {vanilla.name!r} and {matched.name!r} have different images: expected the same data set")
    finished: set[Unit] = {unit for unit in matched.units if matched.done(unit)}
    shared = [p for p in vanilla.units if vanilla.done(p) and _counterpart(p) in finished]
    if not any(_shared_cells(vanilla, matched, unit) for unit in shared):
        raise RunError(
            f"no sender, receiver, setting and seed is done in both {vanilla.name!r} and {matched.name!r}: "
            "expected runs of the same pairs and positions"
        )
    for name in dict.fromkeys(name for unit in shared for name in (unit.sender_network, unit.receiver_network)):
        if vanilla.networks[name] != matched.networks[name]:
            raise RunError(f"{name} is not the same network in runs {vanilla.name!r} and {matched.name!r}")
    return shared
