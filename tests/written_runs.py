"""Runs on disk with accuracies of a test's choice, in the form in which a sweep leaves them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from fastsitch.networks.names import BLOCKS, NetworkName
from fastsitch.networks.resnet import position_shapes
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import CellResult
from fastsitch.sweep.config import sweep_config
from fastsitch.sweep.plan import plan_units
from fastsitch.sweep.results import NetworkInput, Resolved, Run

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
    names = {name for planned in plan_units(config) for name in (planned.sender, planned.receiver)}
    resolved = Resolved(device="cpu", precision="fp32", kernel="torch", compile="off", group_size=1, source="live")
    run = Run.create(path, config, resolved, {name: _network(name, width, network_accuracy) for name in names}, "data")
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
