"""A sweep on the machines of a cluster: its workers train, the driver holds the lock and saves.

What depends on the machine is decided by a worker, for the driver's may be of another kind. Only the driver writes
results, so that a worker which was given up but still runs does no harm.
"""

import logging
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from fastsitch.activations.precompute import StoreMaker
from fastsitch.cluster.cluster import Cluster
from fastsitch.cluster.worker_pool import WorkerSlots
from fastsitch.execution.cell_count import CellCount
from fastsitch.execution.prepare_sweep import Preparation
from fastsitch.execution.train_units import UnitResults, UnitTrainer, missing_units
from fastsitch.machine import configure, resolve_device
from fastsitch.network_names import NetworkName
from fastsitch.progress import Report
from fastsitch.root import Root
from fastsitch.runs.run import Run
from fastsitch.runs.sweep_config import SweepConfig
from fastsitch.runs.workbench import Workbench
from fastsitch.stitching.cells import Unit

log = logging.getLogger(__name__)


def sweep_on(
    cluster: Cluster, root: Root, config: SweepConfig, path: Path, *, device: str, memory: str, report: Report
) -> Run:
    """Train all units that the run at ``path`` does not have yet; the caller holds its lock.

    First one worker begins the run, then stores that are missing are made, one per worker, then units are trained.
    """
    root, path = root.absolute(), path.absolute()
    slots = cluster.worker_slots(device)
    begin = partial(_BeginTask, root, config, slots, memory)
    for _ in cluster.run_jobs(begin, [path], slots, name=lambda path: f"run {path.name}"):
        pass
    run = Run.open(path)
    missing = missing_units(run)
    _make_stores(cluster, root, run, missing, slots)
    _train(cluster, root, run, missing, slots, report)
    return run


class _BeginTask:
    """For a worker: begins the run, or finds that it exists and can be continued."""

    @torch.no_grad()
    def __init__(self, root: Root, config: SweepConfig, slots: WorkerSlots, memory: str) -> None:
        workers = 1 if slots.device == "cuda" else slots.per_machine
        self._preparation = Preparation(root, config, device=slots.device, memory=memory, workers=workers)

    @torch.no_grad()
    def __call__(self, path: Path, report: Report) -> None:
        self._preparation.existing(path)
        self._preparation.begin(path)


def _make_stores(cluster: Cluster, root: Root, run: Run, missing: list[Unit], slots: WorkerSlots) -> None:
    """Make the stores that are missing, so that no worker has to wait for one."""
    config = run.config
    names = [
        name
        for name in config.stored_networks(missing)
        if run.resolved.source_of(name) != "live" and not root.store(config.dataset, name).exists()
    ]
    if not names:
        return
    log.info("making the activation stores of %s", ", ".join(map(str, names)))
    make = partial(StoreMaker, root, config.dataset, device=slots.device, content_only=True, positions=config.positions)
    for name, (store, _) in cluster.run_jobs(make, names, slots, name=_store_of):
        log.info("made the activation store of %s: %s", name, store.path)


def _store_of(name: NetworkName) -> str:
    return f"the store of {name}"


def _train(cluster: Cluster, root: Root, run: Run, missing: list[Unit], slots: WorkerSlots, report: Report) -> None:
    """Train the units; those of one sender are kept together. Each is saved as it is done."""
    count = CellCount(run, missing, report)
    make = partial(UnitTask, root, run.path, slots.device, missing)
    trained = cluster.run_jobs(
        make,
        missing,
        slots,
        name=lambda unit: f"unit {unit.name}",
        key=lambda unit: unit.sender_network,
        report=count.report,
    )
    with closing(trained):
        for unit, results in trained:
            run.save(unit, *results)
            count.finish(unit, len(results.cells))


class UnitTask:
    """For a worker: trains units of a run, and keeps the representations of one sender."""

    def __init__(self, root: Root, path: Path, device: str, missing: list[Unit]) -> None:
        torch_device = resolve_device(device)
        configure(torch_device)
        self._trainer = UnitTrainer(Workbench.open(root, Run.open(path), torch_device), missing)

    @torch.no_grad()
    def __call__(self, unit: Unit, report: Report) -> UnitResults:
        return self._trainer.train(unit, report)
