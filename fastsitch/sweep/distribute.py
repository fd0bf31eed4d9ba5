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
from fastsitch.cluster.crew import Places
from fastsitch.cluster.worker import Tell
from fastsitch.data import load_dataset
from fastsitch.machine import configure, resolve_device
from fastsitch.networks.names import NetworkName
from fastsitch.root import Root
from fastsitch.sweep.config import SweepConfig
from fastsitch.sweep.execute import (
    Execution,
    Networks,
    Report,
    SweepReport,
    UnitResults,
    count_cells,
    missing_units,
)
from fastsitch.sweep.plan import PlannedUnit
from fastsitch.sweep.prepare import Preparation
from fastsitch.sweep.results import Run

log = logging.getLogger(__name__)


def sweep_on(
    cluster: Cluster,
    root: Root,
    config: SweepConfig,
    path: Path,
    *,
    device: str,
    memory: str,
    report: Report | None,
) -> Run:
    """Train all units that the run at ``path`` does not have yet; the caller holds its lock.

    First one worker begins the run, then stores that are missing are made, one per worker, then units are trained.
    """
    root, path = root.absolute(), path.absolute()
    places = cluster.places(device)
    begin = partial(_Beginning, root, config, path, places, memory)
    for _ in cluster.carry_out(begin, [path], places, name=lambda path: f"run {path.name}"):
        pass
    run = Run.open(path)
    missing = missing_units(run)
    _make_stores(cluster, root, run, missing, places)
    _train(cluster, root, run, missing, places, report)
    return run


class _Beginning:
    """For a worker: begins the run, or finds that it exists and can be continued."""

    @torch.no_grad()
    def __init__(self, root: Root, config: SweepConfig, path: Path, places: Places, memory: str) -> None:
        workers = 1 if places.device == "cuda" else places.per_machine
        self._preparation = Preparation(root, config, device=places.device, memory=memory, workers=workers)

    @torch.no_grad()
    def __call__(self, path: Path, tell: Tell) -> None:
        self._preparation.existing(path)
        self._preparation.begin(path)


def _make_stores(cluster: Cluster, root: Root, run: Run, missing: list[PlannedUnit], places: Places) -> None:
    """Make the stores that are missing, so that no worker has to wait for one."""
    if run.resolved.source == "live":
        return
    config = run.config
    names = [planned.sender for planned in missing]
    if config.matches:
        names += [planned.receiver for planned in missing]
    names = [name for name in dict.fromkeys(names) if not root.store(config.dataset, name).exists()]
    if not names:
        return
    log.info("making the activation stores of %s", ", ".join(map(str, names)))
    make = partial(StoreMaker, root, config.dataset, device=places.device, content_only=True)
    for name, (store, _) in cluster.carry_out(make, names, places, name=_store_of):
        log.info("made the activation store of %s: %s", name, store.path)


def _store_of(name: NetworkName) -> str:
    return f"the store of {name}"


def _train(
    cluster: Cluster, root: Root, run: Run, missing: list[PlannedUnit], places: Places, report: Report | None
) -> None:
    """Train the units; those of one sender are kept together. Each is saved as it is done."""
    total = count_cells(run, run.units)
    finished = total - count_cells(run, missing)
    under_way: dict[PlannedUnit, float] = {}

    def tell(planned: PlannedUnit, cells: float) -> None:
        under_way[planned] = cells
        if report is not None:
            report(SweepReport(finished + sum(under_way.values()), total, planned.unit.name))

    make = partial(UnitStation, root, run.path, places.device, missing)
    results = cluster.carry_out(
        make, missing, places, name=lambda own: f"unit {own.unit.name}", key=lambda own: own.sender, report=tell
    )
    with closing(results):
        for planned, own in results:
            run.save(planned.unit, *own)
            under_way.pop(planned, None)
            finished += len(own.cells)
            if report is not None:
                report(SweepReport(finished + sum(under_way.values()), total, planned.unit.name))


class UnitStation:
    """For a worker: trains units of a run, and keeps the representations of one sender."""

    def __init__(self, root: Root, path: Path, device: str, missing: list[PlannedUnit]) -> None:
        run = Run.open(path)
        torch_device = resolve_device(device)
        configure(torch_device)
        dataset = load_dataset(run.config.dataset, root.data_dir)
        networks = Networks(root, dataset, torch_device, run)
        self._execution = Execution(root, run, dataset, networks, torch_device, missing)

    @torch.no_grad()
    def __call__(self, planned: PlannedUnit, tell: Tell) -> UnitResults:
        execution = self._execution
        execution.report = lambda step: tell(step.cells - execution.finished)
        return execution.train(planned)
