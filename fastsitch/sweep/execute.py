"""Carry out a sweep: load each sender once, train every missing unit into every receiver, save unit by unit."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from fastsitch.activations.order import ImageOrder
from fastsitch.activations.precompute import ensure_store, open_fitting, store_identity
from fastsitch.activations.resident import ResidentSource
from fastsitch.activations.store import ActivationStore
from fastsitch.advice import command
from fastsitch.data import Dataset, load_dataset
from fastsitch.errors import ConfigError, NetworkError, RunError
from fastsitch.files import exclusive
from fastsitch.machine import (
    DTYPES,
    available_memory,
    configure,
    resolve_compile,
    resolve_device,
    resolve_kernel,
    resolve_precision,
)
from fastsitch.networks.checkpoint import Network, load_network, namesake, read_record, require_fit
from fastsitch.networks.compiled import compile_blocks
from fastsitch.networks.frozen import FrozenNetwork
from fastsitch.networks.names import NetworkName
from fastsitch.networks.training import evaluate_network
from fastsitch.root import Root
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.engine import CellResult, StepReport, evaluate_matched, train_group
from fastsitch.stitching.geometry import Geometry
from fastsitch.stitching.matching import Matched
from fastsitch.sweep.config import SweepConfig, checked_run_name
from fastsitch.sweep.matched import MatchedStitches
from fastsitch.sweep.plan import PlannedUnit, automatic_group_size, plan_units, split_groups, unit_cells
from fastsitch.sweep.profile import find_tuning, tuned_compile, tuned_group_size
from fastsitch.sweep.results import NetworkInput, Resolved, Run

log = logging.getLogger(__name__)

_MEMORY_SHARE = 0.4
"""Share of the free memory that a group's training step may take when the group size is automatic."""


@dataclass(frozen=True)
class SweepReport:
    """Progress of a sweep: cells done (partial ones count in part), cells in all, what is being trained."""

    cells: float
    total: int
    unit: str


Report = Callable[[SweepReport], None]


@torch.no_grad()
def run_sweep(
    root: Root,
    config: SweepConfig,
    *,
    run: str | None = None,
    device: str = "auto",
    report: Report | None = None,
) -> Run:
    """Train all cells of ``config`` that the run does not have yet; return the run.

    Networks have to be trained (NetworkError otherwise); stores that are missing are made. Raises RunError when the
    run of that name has another configuration, or began on another kind of device.
    """
    name = checked_run_name(config.default_run_name if run is None else run)
    units = plan_units(config)
    require_networks(root, config)
    torch_device = resolve_device(device)
    configure(torch_device)
    dataset = load_dataset(config.dataset, root.data_dir)
    if config.loss == "task" and len(dataset.train) < config.recipe.batch_size:
        raise ConfigError(
            f"{len(dataset.train)} training images are fewer than one batch of {config.recipe.batch_size} images: "
            f"use --batch-size {len(dataset.train)} or less"
        )
    networks = _Networks(root, dataset, torch_device)
    inputs = {
        network: networks.describe(network)
        for network in dict.fromkeys(name for planned in units for name in (planned.sender, planned.receiver))
    }
    _check_geometries(units, inputs)
    path = root.run(config.dataset, name)
    finished = _existing_run(path, config, inputs, dataset, torch_device)
    _check_stores(root, config, units, networks, torch_device)
    if finished is not None and all(finished.intact(planned.unit) for planned in finished.units):
        log.info("all %d units of run %s are done already", len(units), name)
        return finished
    with exclusive(path / "lock", f"run {name!r}"):
        current = _existing_run(path, config, inputs, dataset, torch_device) or _new_run(
            path, config, inputs, dataset, torch_device
        )
        log.info("run %s: %s", name, _describe(current.resolved))
        _Execution(root, current, dataset, networks, torch_device, report).carry_out()
    return current


class _Execution:
    def __init__(
        self,
        root: Root,
        run: Run,
        dataset: Dataset,
        networks: "_Networks",
        device: torch.device,
        report: Report | None,
    ) -> None:
        self.root = root
        self.run = run
        self.dataset = dataset
        self.networks = networks
        self.device = device
        self.report = report
        self.dtype = DTYPES[run.resolved.precision]
        self.total = sum(self._cells(planned) for planned in run.units)
        self.missing = [planned for planned in run.units if not run.intact(planned.unit)]
        self.finished = self.total - sum(self._cells(planned) for planned in self.missing)

    def carry_out(self) -> None:
        done = len(self.run.units) - len(self.missing)
        if done:
            log.info("%d of %d units are done already", done, len(self.run.units))
        for sender, group in groupby(self.missing, key=lambda planned: planned.sender):
            store = self._store(sender)
            self._require_same_store("store_hash", store, [p for p in self.run.units if p.sender == sender])
            source = ResidentSource.load(store, dtype=self.dtype, device=self.device)
            stitches = MatchedStitches(source, dtype=self.dtype, device=self.device)
            for planned in group:
                if self.run.config.matches:
                    wanted = self._expected(planned, store)
                    matched = stitches.of(planned, wanted, lambda part, p=planned: self._tell(part, p))  # type: ignore[misc]
                    results = self._train(planned, source, matched)
                    self.run.save(planned.unit, results, store.identity.hash, wanted.identity.hash)
                else:
                    results = self._train(planned, source, None)
                    self.run.save(planned.unit, results, store.identity.hash)
                self.finished += len(results)
                self._tell(0.0, planned)

    def _store(self, name: NetworkName) -> ActivationStore:
        """A network's store, made when it is missing."""
        path = self.root.store(self.run.config.dataset, name)
        if not path.exists():
            log.info("%s has no activation store yet: making %s", name, path)
        return ensure_store(path, self.dataset, self.networks.load(name), device=self.device, content_only=True)[0]

    def _expected(self, planned: PlannedUnit, sender: ActivationStore) -> ActivationStore:
        """The store with the receiver's own representations."""
        store = sender if planned.receiver == planned.sender else self._store(planned.receiver)
        same = [p for p in self.run.units if p.receiver == planned.receiver]
        self._require_same_store("receiver_store_hash", store, same)
        return store

    def _require_same_store(self, key: str, store: ActivationStore, units: list[PlannedUnit]) -> None:
        """Raise RunError when one of these units is done and came from another store."""
        for planned in units:
            if planned not in self.missing and str(self.run.read(planned.unit)[key]) != store.identity.hash:
                raise RunError(
                    f"unit {planned.unit.name} of run {self.run.name!r} was trained on another store than "
                    f"{store.path} ({store.identity.dtype}, computed in {store.identity.compute}): "
                    "make the store as it was, or use another --run name"
                )

    def _train(
        self, planned: PlannedUnit, source: ResidentSource, matched: dict[Cell, Matched] | None
    ) -> dict[Cell, CellResult]:
        """Train and evaluate a unit; with the matching loss there is nothing left to train."""
        config, resolved = self.run.config, self.run.resolved
        receiver = self.networks.frozen(planned.receiver, resolved)
        cells = unit_cells(planned.unit, len(source.shapes), len(receiver.positions))
        order = ImageOrder(seed=planned.unit.seed, block=config.block, window=config.window)
        results: dict[Cell, CellResult] = {}
        for group in split_groups(cells, resolved.group_size):
            if config.loss == "match":
                assert matched is not None
                own = {cell: matched[cell] for cell in group}
                results |= evaluate_matched(
                    receiver, source, own, images=2 * config.recipe.batch_size, kernel=resolved.kernel
                )
                continue

            def tell(step: StepReport, before: int = len(results), size: int = len(group)) -> None:
                self._tell(before + size * step.step / step.steps, planned)

            results |= train_group(
                receiver, source, group, config.recipe, order, kernel=resolved.kernel, init=matched, report=tell
            )
        return results

    def _tell(self, partial: float, planned: PlannedUnit) -> None:
        if self.report is not None:
            self.report(SweepReport(self.finished + partial, self.total, planned.unit.name))

    def _cells(self, planned: PlannedUnit) -> int:
        networks = self.run.networks
        return len(networks[planned.sender].positions) * len(networks[planned.receiver].positions)


class _Networks:
    """Networks of one data set, each loaded once and, as a receiver, frozen once."""

    def __init__(self, root: Root, dataset: Dataset, device: torch.device) -> None:
        self._folder = root.models(dataset.name)
        self.dataset = dataset
        self._device = device
        self._loaded: dict[NetworkName, Network] = {}
        self._frozen: dict[NetworkName, FrozenNetwork] = {}

    def load(self, name: NetworkName) -> Network:
        if name not in self._loaded:
            network = load_network(self._folder, name)
            require_fit(network, self.dataset)
            self._loaded[name] = network
        return self._loaded[name]

    def frozen(self, name: NetworkName, resolved: Resolved) -> FrozenNetwork:
        if name not in self._frozen:
            network = FrozenNetwork(self.load(name).chain, dtype=DTYPES[resolved.precision], device=self._device)
            self._frozen[name] = compile_blocks(network) if resolved.compile == "on" else network
        return self._frozen[name]

    def describe(self, name: NetworkName) -> NetworkInput:
        """What the run records; the accuracy of an untrained control is measured here."""
        network = self.load(name)
        accuracy = network.record.accuracy
        if accuracy is None:
            chain = network.chain.to(self._device)
            test = self.dataset.test.to(self._device)
            accuracy, _ = evaluate_network(chain, test, network.record.normalisation)
            chain.cpu()
        positions = tuple((position.name, position.shape) for position in network.chain.positions)
        return NetworkInput(
            weights_hash=network.record.weights_hash,
            width=network.record.width,
            accuracy=accuracy,
            positions=positions,
        )


def require_networks(root: Root, config: SweepConfig) -> None:
    """Raise NetworkError with the exact command line when a network of the sweep was never trained."""
    folder = root.models(config.dataset)
    missing = []
    for planned in plan_units(config):
        for name in (planned.sender, planned.receiver):
            if name.random:
                # refuses controls that would be ambiguous
                namesake(folder, name)
        trained = (NetworkName.parse(planned.unit.sender), NetworkName.parse(planned.unit.receiver))
        missing += [name for name in trained if read_record(folder, name) is None]
    if missing:
        names = sorted(set(missing))
        line = command("train", *names, dataset=config.dataset, root=root.path)
        raise NetworkError(
            f"not trained yet on {config.dataset}: {', '.join(map(str, names))}; train first with\n  {line}"
        )


def _check_stores(
    root: Root, config: SweepConfig, units: list[PlannedUnit], networks: "_Networks", device: torch.device
) -> None:
    """Refuse a store that is stale or damaged before any work begins, not when its network's turn comes."""
    names = [planned.sender for planned in units]
    if config.matches:
        names += [planned.receiver for planned in units]
    for name in dict.fromkeys(names):
        path = root.store(config.dataset, name)
        if path.exists():
            network = networks.load(name)
            identity = store_identity(networks.dataset, network, dtype="bf16", compress="none", device=device)
            open_fitting(path, identity, content_only=True)


def _existing_run(
    path: Path,
    config: SweepConfig,
    inputs: dict[NetworkName, NetworkInput],
    dataset: Dataset,
    device: torch.device,
) -> Run | None:
    """The run at ``path``, if there is one; raises RunError when it is not the one asked for."""
    if not (path / "run.json").is_file():
        return None
    run = Run.open(path)
    run.require(config, inputs, dataset.hash)
    if run.resolved.device != device.type:
        raise RunError(
            f"run {run.name!r} began on {run.resolved.device}: continue it with --device {run.resolved.device}, "
            "or use another --run name"
        )
    return run


def _new_run(
    path: Path,
    config: SweepConfig,
    inputs: dict[NetworkName, NetworkInput],
    dataset: Dataset,
    device: torch.device,
) -> Run:
    """Create the run, with everything that ``auto`` chooses on this machine frozen into it."""
    precision = resolve_precision(config.precision, device)
    itemsize = DTYPES[precision].itemsize
    pairs = [
        (len(inputs[planned.sender].positions), [shape for _, shape in inputs[planned.receiver].positions])
        for planned in plan_units(config)
    ]
    images = len(dataset.train) + len(dataset.test)
    resident = max(
        sum(shape[0] * shape[1] * shape[2] for _, shape in network.positions) * images * itemsize
        for network in inputs.values()
    )
    budget = int(_MEMORY_SHARE * max(0, available_memory(device) - resident))
    tuning = find_tuning(
        path.parents[2],
        device,
        width=max(network.width for network in inputs.values()),
        batch_size=config.recipe.batch_size,
        precision=precision,
    )
    group_size = (
        tuned_group_size(tuning, automatic_group_size(pairs, config.recipe.batch_size, itemsize, budget))
        if config.group_size == "auto"
        else int(config.group_size)
    )
    resolved = Resolved(
        device=device.type,
        precision=precision,
        kernel=resolve_kernel(config.kernel, device),
        compile=resolve_compile(tuned_compile(tuning, config.compile), device),
        group_size=group_size,
        source="resident",
    )
    return Run.create(path, config, resolved, inputs, dataset.hash)


def _check_geometries(units: list[PlannedUnit], inputs: dict[NetworkName, NetworkInput]) -> None:
    for planned in units:
        for _, sender in inputs[planned.sender].positions:
            for _, receiver in inputs[planned.receiver].positions:
                Geometry.between(sender, receiver)


def _describe(resolved: Resolved) -> str:
    return (
        f"{resolved.device}, {resolved.precision}, {resolved.kernel} kernel, compile {resolved.compile}, "
        f"groups of up to {resolved.group_size} cells, {resolved.source} representations"
    )
