"""Carry out a sweep: load each sender once, train every missing unit into every receiver, save unit by unit."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from fastsitch.activations.order import ImageOrder
from fastsitch.activations.ordered import OrderedSplit
from fastsitch.activations.precompute import open_fitting, store_identity
from fastsitch.activations.source import Source
from fastsitch.advice import command
from fastsitch.data import Dataset, Transform, load_dataset
from fastsitch.errors import ConfigError, NetworkError, RunError
from fastsitch.files import exclusive
from fastsitch.machine import (
    DTYPES,
    available_memory,
    configure,
    resolve_device,
    resolve_precision,
)
from fastsitch.networks.batch_statistics import BatchStatisticsNetwork
from fastsitch.networks.checkpoint import Network, load_network, namesake, read_record, require_fit
from fastsitch.networks.compiled import compile_blocks
from fastsitch.networks.definition import require_defined
from fastsitch.networks.frozen import FrozenNetwork, Receiver
from fastsitch.networks.names import NetworkName
from fastsitch.networks.training import evaluate_network
from fastsitch.root import Root
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.direct import direct_errors
from fastsitch.stitching.engine import DONE, CellResult, StepReport, evaluate_matched, train_group
from fastsitch.stitching.geometry import Geometry, Rules
from fastsitch.stitching.matching import Matched
from fastsitch.stitching.regression import regress_group
from fastsitch.sweep.config import SweepConfig, checked_run_name
from fastsitch.sweep.groups import train_in_groups
from fastsitch.sweep.matched import MatchedStitches
from fastsitch.sweep.memory import memory_budget
from fastsitch.sweep.plan import PlannedUnit, plan_units, unit_cells
from fastsitch.sweep.resolve import resolve
from fastsitch.sweep.results import NetworkInput, Resolved, Run
from fastsitch.sweep.senders import ExpectedSources, Origin, Representations
from fastsitch.sweep.source_rates import choose_measured

log = logging.getLogger(__name__)


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
    memory: str = "auto",
    report: Report | None = None,
) -> Run:
    """Train all cells of ``config`` that the run does not have yet; return the run.

    ``memory`` bounds what a run that begins now may take on the device: ``auto``, or a size such as ``8GB``.
    Networks have to be trained (NetworkError otherwise); stores that are missing are made. Raises RunError when the
    run of that name has another configuration, or began on another kind of device.
    """
    name = checked_run_name(config.default_run_name if run is None else run)
    units = plan_units(config)
    require_networks(root, config)
    torch_device = resolve_device(device)
    # what is wrong is said even where a run that exists needs no budget
    memory_budget(memory, available_memory(torch_device), torch_device.type)
    configure(torch_device)
    dataset = load_dataset(config.dataset, root.data_dir)
    if config.trains and len(dataset.train) < config.recipe.batch_size:
        raise ConfigError(
            f"{len(dataset.train)} training images are fewer than one batch of {config.recipe.batch_size} images: "
            f"use --batch-size {len(dataset.train)} or less"
        )
    networks = _Networks(root, dataset, torch_device)
    inputs = {
        network: networks.describe(network)
        for network in dict.fromkeys(name for planned in units for name in (planned.sender, planned.receiver))
    }
    _check_geometries(units, inputs, config.rules)
    path = root.run(config.dataset, name)
    finished = _existing_run(path, config, inputs, dataset, torch_device)
    source = "live" if config.augments else config.source if finished is None else finished.resolved.source
    if source != "live":
        _check_stores(root, config, units, networks, torch_device)
    if finished is not None and all(finished.intact(planned.unit) for planned in finished.units):
        log.info("all %d units of run %s are done already", len(units), name)
        return finished
    with exclusive(path / "lock", f"run {name!r}"), _no_trace_of_refusal(path):
        current = _existing_run(path, config, inputs, dataset, torch_device) or _new_run(
            root, path, config, inputs, networks, torch_device, memory
        )
        log.info("run %s: %s", name, _describe(current.resolved))
        _Execution(root, current, dataset, networks, torch_device, report).carry_out()
    return current


@contextmanager
def _no_trace_of_refusal(path: Path) -> Iterator[None]:
    """Remove the folder of a run that was refused before it began: it holds nothing but the lock."""
    try:
        yield
    except BaseException:
        if [entry.name for entry in path.iterdir()] == ["lock"]:
            (path / "lock").unlink()
            path.rmdir()
        raise


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
        self.run = run
        self.networks = networks
        self.group_size = run.resolved.group_size
        self.report = report
        self.representations = Representations(
            root,
            dataset,
            networks.load,
            source=run.resolved.source,
            dtype=DTYPES[run.resolved.precision],
            device=device,
        )
        self.total = sum(self._cells(planned) for planned in run.units)
        self.missing = [planned for planned in run.units if not run.intact(planned.unit)]
        self.finished = self.total - sum(self._cells(planned) for planned in self.missing)

    def carry_out(self) -> None:
        done = len(self.run.units) - len(self.missing)
        if done:
            log.info("%d of %d units are done already", done, len(self.run.units))
        for sender, group in groupby(self.missing, key=lambda planned: planned.sender):
            self._sweep(sender, list(group))

    def _sweep(self, name: NetworkName, units: list[PlannedUnit]) -> None:
        """All missing units of one sender, whose representations are let go before those of the next one come."""
        source, ordered, origin = self.representations.sender(name)
        origin.require_same(self.run, "store_hash", self._done(lambda planned: planned.sender == name))
        stitches = MatchedStitches(ordered, self.run.config.rules)
        receivers = ExpectedSources(self.representations, name, source, ordered, origin)
        for planned in units:
            if self.run.config.regresses:
                results, expected_origin = self._regress(planned, source, ordered, receivers)
                self.run.save(planned.unit, results, origin.identity.hash, expected_origin.identity.hash)
            elif self.run.config.matches:
                receiver = planned.receiver
                expected, expected_origin = self.representations.expected(receiver)
                self._require_same_receiver(expected_origin, receiver)
                matched = stitches.of(planned, expected, lambda part, p=planned: self._tell(part, p))  # type: ignore[misc]
                results = self._train(planned, source, matched)
                self.run.save(planned.unit, results, origin.identity.hash, expected_origin.identity.hash)
            else:
                results = self._train(planned, source, None)
                self.run.save(planned.unit, results, origin.identity.hash)
            self.finished += len(results)
            self._tell(0.0, planned)

    def _regress(
        self, planned: PlannedUnit, source: Source, ordered: OrderedSplit, receivers: ExpectedSources
    ) -> tuple[dict[Cell, CellResult], Origin]:
        """Train a unit's matched stitches and measure their errors over the training images."""
        expected, expected_ordered, origin = receivers.of(planned.receiver)
        self._require_same_receiver(origin, planned.receiver)
        results = self._train(planned, source, None, expected)
        stitches = {(cell.i, cell.j): [(own.weight_FD, own.bias_D)] for cell, own in results.items()}
        error = direct_errors(ordered, expected_ordered, stitches, rules=self.run.config.rules).error[0]
        return {
            cell: replace(own, matched_error=error[cell.i, cell.j].item() if own.status == DONE else float("nan"))
            for cell, own in results.items()
        }, origin

    def _require_same_receiver(self, origin: Origin, receiver: NetworkName) -> None:
        done = self._done(lambda planned: planned.receiver == receiver)
        origin.require_same(self.run, "receiver_store_hash", done)

    def _done(self, of: Callable[[PlannedUnit], bool]) -> list[PlannedUnit]:
        """The units of some kind that were finished when this execution began."""
        return [planned for planned in self.run.units if planned not in self.missing and of(planned)]

    def _train(
        self,
        planned: PlannedUnit,
        source: Source,
        matched: dict[Cell, Matched] | None,
        expected: Source | None = None,
    ) -> dict[Cell, CellResult]:
        """Train and evaluate a unit, on the ``expected`` representations where they are given.

        With the matching loss and its exact solutions, ``matched``, there is nothing left to train.
        """
        config, resolved = self.run.config, self.run.resolved
        receiver = self.networks.receiver(planned.receiver, resolved, config.receiver_bn)
        cells = unit_cells(planned.unit, len(source.shapes), len(receiver.positions))
        order = ImageOrder(seed=planned.unit.seed, block=config.block, window=config.window)
        how: dict[str, Any] = {"kernel": resolved.kernel, "rules": config.rules}
        done = 0

        def train(group: list[Cell]) -> dict[Cell, CellResult]:
            nonlocal done
            if expected is not None:
                assert isinstance(receiver, FrozenNetwork), "batch statistics are for the task loss"
                results = regress_group(receiver, source, expected, group, config.recipe, order, report=tell, **how)
            elif config.loss == "match":
                assert matched is not None
                own = {cell: matched[cell] for cell in group}
                images = 2 * config.recipe.batch_size
                results = evaluate_matched(receiver, source, own, images=images, **how)
            else:
                results = train_group(receiver, source, group, config.recipe, order, init=matched, report=tell, **how)
            done += len(group)
            return results

        def tell(step: StepReport) -> None:
            self._tell(done + step.cells * step.step / step.steps, planned)

        results, self.group_size = train_in_groups(cells, self.group_size, train)
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
        self._receivers: dict[NetworkName, Receiver] = {}

    def load(self, name: NetworkName) -> Network:
        if name not in self._loaded:
            network = load_network(self._folder, name)
            require_fit(network.record, self.dataset)
            self._loaded[name] = network
        return self._loaded[name]

    def receiver(self, name: NetworkName, resolved: Resolved, receiver_bn: str) -> Receiver:
        if name not in self._receivers:
            chain, dtype = self.load(name).chain, DTYPES[resolved.precision]
            if receiver_bn == "batch":
                self._receivers[name] = BatchStatisticsNetwork(chain, dtype=dtype, device=self._device)
            else:
                network = FrozenNetwork(chain, dtype=dtype, device=self._device)
                self._receivers[name] = compile_blocks(network) if resolved.compile == "on" else network
        return self._receivers[name]

    def describe(self, name: NetworkName) -> NetworkInput:
        """What the run records; the accuracy of an untrained control is measured here."""
        network = self.load(name)
        accuracy = network.record.accuracy
        if accuracy is None:
            chain = network.chain.to(self._device)
            test = self.dataset.test.to(self._device)
            accuracy, _ = evaluate_network(chain, test, network.record.transform)
            chain.cpu()
        positions = tuple((position.name, position.rows) for position in network.chain.positions)
        size = self.dataset.input_shape[1:]
        own, usual = (x.to_dict(size) for x in (network.record.transform, Transform(self.dataset.normalisation)))
        return NetworkInput(
            weights_hash=network.record.weights_hash,
            width=network.record.width,
            accuracy=accuracy,
            positions=positions,
            transform=None if own == usual else own,
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
        require_defined(root, config.dataset, names)
        line = command("train", *names, dataset=config.dataset, root=root.path)
        raise NetworkError(
            f"not trained yet on {config.dataset}: {', '.join(map(str, names))}; train first with\n  {line}"
        )


def _check_stores(
    root: Root, config: SweepConfig, units: list[PlannedUnit], networks: "_Networks", device: torch.device
) -> None:
    """Refuse a store that is stale, damaged or of other samples before any work begins, not when its turn comes."""
    names = [planned.sender for planned in units]
    if config.matches:
        names += [planned.receiver for planned in units]
    for name in dict.fromkeys(names):
        path = root.store(config.dataset, name)
        if path.exists():
            network = networks.load(name)
            identity = store_identity(networks.dataset, network, dtype="bf16", compress="none", device=device)
            open_fitting(path, identity, networks.dataset, content_only=True)


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
    root: Root,
    path: Path,
    config: SweepConfig,
    inputs: dict[NetworkName, NetworkInput],
    networks: "_Networks",
    device: torch.device,
    memory: str,
) -> Run:
    """Create the run, with everything that ``auto`` chooses on this machine frozen into it."""
    shapes = {name: [shape for _, shape in network.positions] for name, network in inputs.items()}
    budget = memory_budget(memory, available_memory(device), device.type)
    dtype = DTYPES[resolve_precision(config.precision, device)]
    source = choose_measured(
        root, config, shapes, networks.dataset, networks.load, dtype=dtype, device=device, budget=budget
    )
    log.info("source %s", source.reason)
    resolved = resolve(root.path, config, shapes, source, device, memory=memory, budget=budget)
    return Run.create(path, config, resolved, inputs, networks.dataset.hash)


def _check_geometries(units: list[PlannedUnit], inputs: dict[NetworkName, NetworkInput], rules: Rules) -> None:
    for planned in units:
        for _, sender in inputs[planned.sender].positions:
            for _, receiver in inputs[planned.receiver].positions:
                Geometry.between(sender, receiver, rules)


def _describe(resolved: Resolved) -> str:
    return (
        f"{resolved.device}, {resolved.precision}, {resolved.kernel} kernel, compile {resolved.compile}, "
        f"groups of up to {resolved.group_size} cells, {resolved.source} representations"
    )
