"""Matched stitches evaluated with the running statistics that training vanilla stitches left behind.

So the published study obtained its Figure 5: its receivers were never put back to what they had been.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fastsitch.data import load_dataset
from fastsitch.errors import RunError
from fastsitch.machine import DTYPES
from fastsitch.networks.batch_statistics import BatchStatisticsNetwork
from fastsitch.networks.checkpoint import Network, load_network, require_fit
from fastsitch.networks.names import NetworkName
from fastsitch.root import Root
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import evaluate_with_statistics
from fastsitch.sweep.plan import PlannedUnit, split_groups
from fastsitch.sweep.results import Run
from fastsitch.sweep.senders import Representations

Pair = tuple[str, str, str, int]
"""Sender, receiver, setting, seed."""


@torch.no_grad()
def leftover_accuracy(
    root: Root,
    vanilla: Run,
    matched: Run,
    *,
    device: torch.device,
    report: Callable[[Pair], None] | None = None,
) -> dict[Pair, NDArray[np.float64]]:
    """Accuracy of the matched stitches of one run, with the running statistics of the same cells of another.

    ``vanilla`` was made with ``--receiver-bn batch``, ``matched`` with ``--loss match``. For every sender, receiver,
    setting and seed that is done in both: a matrix (sender positions, receiver positions), NaN where outputs are not
    finite and at cells that not both were asked for. Nothing but the classifier lies behind the last column, which is
    therefore the matched run's own. ``report`` is told each pair as it is done. Raises RunError when a run is of
    another kind, or both share no such cell or joined other networks or images.
    """
    shared = _shared_units(vanilla, matched)
    dataset = load_dataset(vanilla.config.dataset, root.data_dir)
    folder = root.models(dataset.name)

    def load(name: NetworkName) -> Network:
        network = load_network(folder, name)
        require_fit(network.record, dataset)
        if network.record.weights_hash != vanilla.networks[name].weights_hash:
            raise RunError(f"{name} was trained again since run {vanilla.name!r} began: expected the same weights")
        return network

    resolved = vanilla.resolved
    dtype = DTYPES[resolved.precision]
    representations = Representations(root, dataset, load, source=matched.resolved.source, dtype=dtype, device=device)
    accuracies: dict[Pair, NDArray[np.float64]] = {}
    for sender in dict.fromkeys(planned.sender for planned in shared):
        source, _, origin = representations.sender(sender)
        for planned in (planned for planned in shared if planned.sender == sender):
            origin.require_same(vanilla, "store_hash", [planned])
            origin.require_same(matched, "store_hash", [_counterpart(planned)])
            receiver = BatchStatisticsNetwork(load(planned.receiver).chain, dtype=dtype, device=device)
            unit = planned.unit
            matrix = np.full((len(source.shapes), len(receiver.positions)), np.nan)
            for group in split_groups(_shared_cells(vanilla, matched, planned), resolved.group_size):
                found = evaluate_with_statistics(
                    receiver,
                    source,
                    {cell: matched.stitch(_matched_cell(cell)) for cell in group},
                    {cell: vanilla.running_statistics(cell) for cell in group},
                    # as in training: a group that fitted there fits here
                    images=2 * vanilla.config.recipe.batch_size,
                    kernel=resolved.kernel,
                    rules=vanilla.config.rules,
                )
                for cell, accuracy in found.items():
                    matrix[cell.i, cell.j] = accuracy
            pair = (unit.sender, unit.receiver, unit.setting, unit.seed)
            accuracies[pair] = matrix
            if report is not None:
                report(pair)
    return accuracies


def _counterpart(planned: PlannedUnit) -> PlannedUnit:
    """The matched unit of a vanilla one."""
    return replace(planned, unit=replace(planned.unit, loss="match"))


def _matched_cell(cell: Cell) -> Cell:
    """The matched cell of a vanilla one."""
    return replace(cell, unit=replace(cell.unit, loss="match"))


def _shared_cells(vanilla: Run, matched: Run, planned: PlannedUnit) -> list[Cell]:
    """The cells of a vanilla unit that the matched run has too."""
    there = set(matched.cells(_counterpart(planned)))
    return [cell for cell in vanilla.cells(planned) if _matched_cell(cell) in there]


def _shared_units(vanilla: Run, matched: Run) -> list[PlannedUnit]:
    """The units of the vanilla run that are done, and whose counterparts are."""
    if vanilla.config.receiver_bn != "batch":
        raise RunError(f"run {vanilla.name!r} has no running statistics: expected one made with --receiver-bn batch")
    if matched.config.loss != "match":
        raise RunError(f"run {matched.name!r} has no matched stitches: expected one made with --loss match")
    if vanilla.data_hash != matched.data_hash:
        raise RunError(f"runs {vanilla.name!r} and {matched.name!r} are on other images: expected the same data set")
    there: set[Unit] = {planned.unit for planned in matched.units if matched.done(planned.unit)}
    shared = [p for p in vanilla.units if vanilla.done(p.unit) and _counterpart(p).unit in there]
    if not any(_shared_cells(vanilla, matched, planned) for planned in shared):
        raise RunError(
            f"no sender, receiver, setting and seed is done in both {vanilla.name!r} and {matched.name!r}: "
            "expected runs of the same pairs and positions"
        )
    for name in dict.fromkeys(name for planned in shared for name in (planned.sender, planned.receiver)):
        if vanilla.networks[name] != matched.networks[name]:
            raise RunError(f"{name} is not the same network in runs {vanilla.name!r} and {matched.name!r}")
    return shared
