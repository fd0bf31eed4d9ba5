"""The work of a sweep: load each sender once, train every missing unit into every receiver, save unit by unit."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from fastsitch.activations.order import ImageOrder
from fastsitch.activations.ordered import OrderedSplit
from fastsitch.activations.source import Source
from fastsitch.advice import command
from fastsitch.data import Dataset, Transform
from fastsitch.errors import NetworkError, RunError
from fastsitch.machine import (
    DTYPES,
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
from fastsitch.stitching.matching import Matched
from fastsitch.stitching.regression import regress_group
from fastsitch.sweep.config import SweepConfig
from fastsitch.sweep.groups import train_in_groups
from fastsitch.sweep.matched import MatchedStitches
from fastsitch.sweep.plan import PlannedUnit, plan_units
from fastsitch.sweep.results import NetworkInput, Resolved, Run
from fastsitch.sweep.senders import ExpectedSources, Origin, Representations

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepReport:
    """Progress of a sweep: cells done (partial ones count in part), cells in all, what is being trained."""

    cells: float
    total: int
    unit: str


Report = Callable[[SweepReport], None]


class UnitResults(NamedTuple):
    """What is saved of a unit; see :meth:`fastsitch.sweep.results.Run.save`."""

    cells: dict[Cell, CellResult]
    store_hash: str
    receiver_store_hash: str | None = None


class _Sender(NamedTuple):
    """What the units of one sender share."""

    source: Source
    ordered: OrderedSplit
    origin: Origin
    stitches: MatchedStitches
    receivers: ExpectedSources


class Execution:
    """The units that a run misses, trained one by one.

    ``report`` counts units as finished that :meth:`carry_out` has saved.
    """

    def __init__(
        self,
        root: Root,
        run: Run,
        dataset: Dataset,
        networks: "Networks",
        device: torch.device,
        missing: Sequence[PlannedUnit],
        report: Report | None = None,
    ) -> None:
        self.run = run
        self.missing = missing
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
        self.total = count_cells(run, run.units)
        self.finished = self.total - count_cells(run, missing)
        self._held: tuple[NetworkName, _Sender] | None = None

    def carry_out(self) -> None:
        """Train and save them all."""
        for planned in self.missing:
            results = self.train(planned)
            self.run.save(planned.unit, *results)
            self.finished += len(results.cells)
            self._tell(0.0, planned)

    def train(self, planned: PlannedUnit) -> UnitResults:
        """Train a missing unit. The representations of its sender are kept for the units that follow it."""
        source, ordered, origin, stitches, receivers = self._sender(planned.sender)
        if self.run.config.regresses:
            results, expected_origin = self._regress(planned, source, ordered, receivers)
            return UnitResults(results, origin.identity.hash, expected_origin.identity.hash)
        if self.run.config.matches:
            receiver = planned.receiver
            expected, expected_origin = self.representations.expected(receiver)
            self._require_same_receiver(expected_origin, receiver)
            matched = stitches.of(planned, self.run.cells(planned), expected, lambda part: self._tell(part, planned))
            results = self._train(planned, source, matched)
            return UnitResults(results, origin.identity.hash, expected_origin.identity.hash)
        return UnitResults(self._train(planned, source, None), origin.identity.hash)

    def _sender(self, name: NetworkName) -> "_Sender":
        """A sender as its units need it; that of the units before is let go first."""
        if self._held is None or self._held[0] != name:
            self._held = None
            source, ordered, origin = self.representations.sender(name)
            origin.require_same(self.run, "store_hash", self._done(lambda planned: planned.sender == name))
            stitches = MatchedStitches(ordered, self.run.config.rules)
            receivers = ExpectedSources(self.representations, name, source, ordered, origin)
            self._held = name, _Sender(source, ordered, origin, stitches, receivers)
        return self._held[1]

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
        cells = self.run.cells(planned)
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


def missing_units(run: Run) -> list[PlannedUnit]:
    """The units that are still to be trained; how many are done is logged."""
    missing = [planned for planned in run.units if not run.intact(planned.unit)]
    if len(missing) < len(run.units):
        log.info("%d of %d units are done already", len(run.units) - len(missing), len(run.units))
    return missing


def count_cells(run: Run, units: Iterable[PlannedUnit]) -> int:
    """Cells of some units of a run, those that it asks for."""
    return sum(len(run.cells(planned)) for planned in units)


class Networks:
    """Networks of one data set, each loaded once and, as a receiver, frozen once.

    Those of a ``run`` that began earlier have to be the ones it began with: RunError otherwise.
    """

    def __init__(self, root: Root, dataset: Dataset, device: torch.device, run: Run | None = None) -> None:
        self._run = run
        self._folder = root.models(dataset.name)
        self.dataset = dataset
        self._device = device
        self._loaded: dict[NetworkName, Network] = {}
        self._receivers: dict[NetworkName, Receiver] = {}

    def load(self, name: NetworkName) -> Network:
        if name not in self._loaded:
            network = load_network(self._folder, name)
            require_fit(network.record, self.dataset)
            began = None if self._run is None else self._run.networks.get(name)
            if began is not None and network.record.weights_hash != began.weights_hash:
                assert self._run is not None
                raise RunError(
                    f"{name} is not what run {self._run.name!r} began with: it was trained again, or this machine "
                    "builds it otherwise; use another --run name, or the same versions everywhere"
                )
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
