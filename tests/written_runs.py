"""Runs on disk with given accuracies, in the format that a sweep writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from fastsitch.network_names import BLOCKS, NetworkName
from fastsitch.networks.resnet import position_shapes
from fastsitch.runs.run import Run
from fastsitch.runs.run_record import NetworkInput, Resolved, RunRecord
from fastsitch.runs.sweep_config import sweep_config
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell, Unit

Accuracies = Mapping[tuple[str, str, str, int], ArrayLike]
"""Matrices by (sender, receiver, setting, seed); units without one stay undone."""


def written_run(
    path: Path,
    accuracies: Accuracies,
    *,
    dataset: str = "cifar10",
    width: int = 64,
    loss: str = "task",
    network_accuracy: float = 0.9,
    **options: Any,
) -> Run:
    """A run of the pairs, settings and seeds in ``accuracies``; cells of NaN diverged."""
    senders, receivers, settings, seeds = (list(dict.fromkeys(column)) for column in zip(*accuracies, strict=True))
    config = sweep_config(
        dataset=dataset, senders=senders, receivers=receivers, settings=settings, seeds=seeds, loss=loss, **options
    )
    names = {name for unit in config.units for name in (unit.sender_network, unit.receiver_network)}
    resolved = Resolved(device="cpu", precision="fp32", kernel="torch", compile="off", group_size=1, source="live")
    networks = {name: _network(name, width, network_accuracy) for name in names}
    run = Run.create(path, RunRecord(config=config, resolved=resolved, networks=networks, data_hash="data"))
    for (sender, receiver, setting, seed), matrix in accuracies.items():
        unit = Unit(sender=sender, receiver=receiver, setting=setting, loss=loss, seed=seed)
        results = {Cell(unit, i, j): _result(float(value)) for (i, j), value in np.ndenumerate(np.asarray(matrix))}
        run.save(unit, results, "store", "store" if config.matches else None)
    return run


def _network(name: NetworkName, width: int, accuracy: float) -> NetworkInput:
    positions = tuple(position_shapes(BLOCKS[name.architecture], width, (32, 32)))
    return NetworkInput(weights_hash=f"weights of {name}", width=width, accuracy=accuracy, positions=positions)


def _result(accuracy: float) -> CellResult:
    return CellResult(
        accuracy=accuracy,
        loss=1 - accuracy,
        train_loss=1 - accuracy,
        status=1 if np.isfinite(accuracy) else 2,
        weight_FD=torch.zeros(1, 1),
        bias_D=torch.zeros(1),
    )
