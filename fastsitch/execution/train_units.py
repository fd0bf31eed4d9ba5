"""The work of a sweep: load each sender once, train every missing unit into every receiver, save unit by unit."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from fastsitch.activations.ordered_split import OrderedSplit
from fastsitch.activations.representations import ExpectedSources, Origin
from fastsitch.activations.source import Source
from fastsitch.execution.cell_count import CellCount
from fastsitch.execution.matched_stitches import MatchedStitches
from fastsitch.network_names import NetworkName
from fastsitch.progress import Report, ignore
from fastsitch.runs.continue_run import require_same_origin
from fastsitch.runs.run import Run
from fastsitch.runs.workbench import Workbench
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.matching import Matched
from fastsitch.stitching.output_errors import direct_errors
from fastsitch.stitching.train_groups import StitchWork, Work, train_in_groups
from fastsitch.vocabulary import Status

log = logging.getLogger(__name__)


class UnitResults(NamedTuple):
    """What is saved of a unit; see :meth:`fastsitch.runs.run.Run.save`."""

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


class UnitTrainer:
    """Trains units that a run misses, one by one; ``missing`` are all of those, whoever trains them.

    The representations of a sender are kept until a unit of another sender comes.
    """

    def __init__(self, workbench: Workbench, missing: Sequence[Unit]) -> None:
        self._workbench = workbench
        self._run = workbench.run
        self._missing = missing
        self._group_size = workbench.run.resolved.group_size
        self._held: tuple[NetworkName, _Sender] | None = None

    def train(self, unit: Unit, report: Report = ignore) -> UnitResults:
        """Train a missing unit; ``report`` gets the unit's cells."""
        config, cells = self._run.config, self._run.cells(unit)
        sender = self._sender(unit.sender_network)
        work = StitchWork(
            receiver=self._workbench.receiver(unit.receiver_network),
            source=sender.source,
            recipe=config.recipe,
            order=config.order_of(unit.seed),
            kernel=self._run.resolved.kernel,
            rules=config.rules,
        )
        provided = sender.origin.identity.hash
        if config.regresses:
            results, origin = self._regress(unit, work, sender, report)
            return UnitResults(results, provided, origin.identity.hash)
        if not config.matches:
            return UnitResults(self._in_groups(cells, work.train(), report), provided)
        matched, origin = self._match(unit, sender, report)
        how = work.evaluate(matched) if config.loss == "match" else work.train(matched)
        return UnitResults(self._in_groups(cells, how, report), provided, origin.identity.hash)

    def _sender(self, name: NetworkName) -> _Sender:
        """A sender as its units need it; that of the units before is let go first."""
        if self._held is None or self._held[0] != name:
            self._held = None
            representations = self._workbench.representations
            source, ordered, origin = representations.sender(name)
            finished = self._finished(lambda unit: unit.sender_network == name)
            require_same_origin(self._run, finished, "store_hash", origin)
            stitches = MatchedStitches(ordered, self._run.config.rules)
            receivers = ExpectedSources(representations, name, source, ordered, origin)
            self._held = name, _Sender(source, ordered, origin, stitches, receivers)
        return self._held[1]

    def _match(self, unit: Unit, sender: _Sender, report: Report) -> tuple[dict[Cell, Matched], Origin]:
        """The matched stitches of a unit, exact."""
        expected, origin = self._workbench.representations.expected(unit.receiver_network)
        self._require_same_receiver(unit, origin)
        return sender.stitches.of(unit, self._run.cells(unit), expected, report), origin

    def _regress(
        self, unit: Unit, work: StitchWork, sender: _Sender, report: Report
    ) -> tuple[dict[Cell, CellResult], Origin]:
        """Train a unit's matched stitches and measure their errors over the training images."""
        expected, expected_ordered, origin = sender.receivers.of(unit.receiver_network)
        self._require_same_receiver(unit, origin)
        results = self._in_groups(self._run.cells(unit), work.regress(expected), report)
        stitches = {(cell.i, cell.j): [(result.weight_FD, result.bias_D)] for cell, result in results.items()}
        errors = direct_errors(sender.ordered, expected_ordered, stitches, rules=work.rules).error[0]
        return {
            cell: replace(
                result,
                matched_error=errors[cell.i, cell.j].item() if result.status == Status.DONE else float("nan"),
            )
            for cell, result in results.items()
        }, origin

    def _in_groups(self, cells: Sequence[Cell], work: Work, report: Report) -> dict[Cell, CellResult]:
        results, self._group_size = train_in_groups(cells, self._group_size, work, report)
        return results

    def _require_same_receiver(self, unit: Unit, origin: Origin) -> None:
        finished = self._finished(lambda other: other.receiver_network == unit.receiver_network)
        require_same_origin(self._run, finished, "receiver_store_hash", origin)

    def _finished(self, wanted: Callable[[Unit], bool]) -> list[Unit]:
        """The units of some kind that were finished before."""
        return [unit for unit in self._run.units if unit not in self._missing and wanted(unit)]


def missing_units(run: Run) -> list[Unit]:
    """The units that are still to be trained; how many are done is logged."""
    missing = [unit for unit in run.units if not run.intact(unit)]
    if len(missing) < len(run.units):
        log.info("%d of %d units are done already", len(run.units) - len(missing), len(run.units))
    return missing


def train_units(workbench: Workbench, missing: Sequence[Unit], report: Report = ignore) -> None:
    """Train units of a run on this machine and save each as it is done."""
    trainer, count = UnitTrainer(workbench, missing), CellCount(workbench.run, missing, report)
    for unit in missing:
        count.begin(unit)
        results = trainer.train(unit, lambda progress, unit=unit: count.report(unit, progress))  # type: ignore[misc]
        workbench.run.save(unit, *results)
        count.finish(unit, len(results.cells))
