"""EV, ES and SV of every cell of a run: one pass per pair over the training images, one over the test images."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import numpy as np
import torch

from fastsitch.activations.ordered import OrderedSplit
from fastsitch.analysis.error_files import load_errors, measured, save_errors
from fastsitch.analysis.errors import StitchErrors
from fastsitch.data import load_dataset
from fastsitch.errors import RunError
from fastsitch.files import exclusive
from fastsitch.machine import DTYPES, configure, resolve_device
from fastsitch.networks.checkpoint import Network, load_network, require_fit
from fastsitch.networks.names import NetworkName
from fastsitch.root import Root
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.direct import Stitch, direct_errors
from fastsitch.stitching.engine import DIVERGED
from fastsitch.stitching.matching import Matched, match
from fastsitch.stitching.moments import CellMoments, SenderMoments, pair_moments
from fastsitch.sweep.plan import PlannedUnit
from fastsitch.sweep.results import Run
from fastsitch.sweep.senders import Origin, Representations

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasureReport:
    """Progress: units done (the one at hand in part), units in all, the name of the unit."""

    units: float
    total: int
    unit: str


Report = Callable[[MeasureReport], None]


@torch.no_grad()
def measure_errors(root: Root, run: Run, *, device: str = "auto", report: Report | None = None) -> None:
    """Measure the errors of all finished units of a vanilla run, on the training and on the test images; save them.

    Matched stitches are the exact ones of the training images. Errors are those of the exact affine stitches, in fp64,
    on representations in the run's precision: from sufficient statistics on the training images, by a direct pass on
    the test images. What is measured already is left alone, unless its file is damaged or belongs to other stitches.
    Networks without a store run live. Raises RunError when the run is not a vanilla one, has no finished unit, or
    networks, data or a sender's store are not those it was trained on; BusyError when another process measures it.
    """
    if run.config.loss != "task":
        raise RunError(f"run {run.name!r} has --loss {run.config.loss}: errors are measured of a run with --loss task")
    done = [planned for planned in run.units if run.done(planned.unit)]
    if not done:
        raise RunError(f"run {run.name!r} has no finished unit: sweep first")
    if len(done) < len(run.units):
        log.info("%d of %d units are not done yet: left out", len(run.units) - len(done), len(run.units))
    torch_device = resolve_device(device)
    with exclusive(run.path / "errors" / "lock", f"the errors of run {run.name!r}"):
        missing = [planned for planned in done if not _intact(run, planned)]
        if not missing:
            log.info("the errors of all %d units of run %s are measured already", len(done), run.name)
            return
        configure(torch_device)
        _Measurement(root, run, missing, torch_device, report).carry_out()


def _intact(run: Run, planned: PlannedUnit) -> bool:
    if not measured(run, planned.unit):
        return False
    try:
        load_errors(run, planned.unit)
    except RunError as error:
        log.warning("measured again: %s", error)
        return False
    return True


class _Measurement:
    def __init__(
        self, root: Root, run: Run, missing: list[PlannedUnit], device: torch.device, report: Report | None
    ) -> None:
        dataset = load_dataset(run.config.dataset, root.data_dir)
        if dataset.hash != run.data_hash:
            raise RunError(f"the data set has changed since run {run.name!r} began: bring it back, or sweep again")
        folder = root.models(run.config.dataset)

        @cache
        def load(name: NetworkName) -> Network:
            network = load_network(folder, name)
            require_fit(network.record, dataset)
            if network.record.weights_hash != run.networks[name].weights_hash:
                raise RunError(f"{name} was trained again since run {run.name!r} began: sweep again")
            return network

        self.run = run
        self.missing = missing
        self.report = report
        self.finished = 0
        self.representations = Representations(
            root,
            dataset,
            load,
            source=run.resolved.source,
            dtype=DTYPES[run.resolved.precision],
            device=device,
        )

    def carry_out(self) -> None:
        for sender, of_sender in groupby(self.missing, key=lambda planned: planned.sender):
            units = list(of_sender)
            train, origin = self.representations.expected(sender, make=False)
            test, _ = self.representations.expected(sender, "test", make=False)
            origin.require_same(self.run, "store_hash", units)
            moments = SenderMoments(train, self.run.config.rules)
            # the seeds of a pair follow each other
            for _, of_pair in groupby(units, key=lambda planned: planned.receiver):
                self._measure(list(of_pair), moments, test, origin)

    def _measure(self, units: list[PlannedUnit], moments: SenderMoments, test: OrderedSplit, origin: Origin) -> None:
        """All missing seeds of a pair: one set of moments, one pass over the test images."""
        receiver = units[0].receiver
        expected, expected_origin = self.representations.expected(receiver, make=False)
        expected_test, _ = self.representations.expected(receiver, "test", make=False)
        hashes = [self.run.stitches_hash(planned.unit) for planned in units]
        places = [(cell.i, cell.j) for cell in self.run.cells(units[0])]
        cells = pair_moments(moments, expected, lambda done, total: self._tell(units, done, total, 0.0), places)
        matched = match(cells)
        vanilla = [_by_position(self.run.stitches(planned.unit)) for planned in units]
        direct = direct_errors(
            test,
            expected_test,
            {
                cell: [(own.weight_FD, own.bias_D), *(stitches[cell] for stitches in vanilla)]
                for cell, own in matched.items()
            },
            lambda done, total: self._tell(units, done, total, 0.5),
            rules=self.run.config.rules,
        )
        error, distance, variance = (part.numpy() for part in (direct.error, direct.distance, direct.variance))
        stores = {"store_hash": origin.identity.hash, "receiver_store_hash": expected_origin.identity.hash}
        for k, (planned, stitches) in enumerate(zip(units, vanilla, strict=True), 1):
            errors = {
                "train": _from_moments(cells, matched, stitches, error.shape[1:]),
                "test": StitchErrors(EV=error[k], ES=error[0], SV=distance[k], variance=variance),
            }
            diverged = self.run.read(planned.unit)["status"] == DIVERGED
            for own in errors.values():
                own.EV[diverged] = own.SV[diverged] = np.nan
            save_errors(self.run, planned.unit, errors, hashes[k - 1], stores)
            self.finished += 1

    def _tell(self, units: list[PlannedUnit], done: int, total: int, begun: float) -> None:
        if self.report is not None:
            part = begun + 0.5 * done / total
            self.report(MeasureReport(self.finished + part * len(units), len(self.missing), units[0].unit.name))


def _by_position(stitches: Mapping[Cell, Stitch]) -> dict[tuple[int, int], Stitch]:
    return {(cell.i, cell.j): stitch for cell, stitch in stitches.items()}


def _from_moments(
    cells: Mapping[tuple[int, int], CellMoments],
    matched: Mapping[tuple[int, int], Matched],
    vanilla: Mapping[tuple[int, int], Stitch],
    shape: tuple[int, ...],
) -> StitchErrors:
    errors = {name: np.full(shape, np.nan) for name in ("EV", "ES", "SV")}
    variance = np.full(shape[1], np.nan)
    for (i, j), moments in cells.items():
        weight, bias = vanilla[i, j]
        errors["EV"][i, j] = moments.error(weight, bias)
        errors["ES"][i, j] = matched[i, j].error
        errors["SV"][i, j] = moments.distance((weight, bias), (matched[i, j].weight_FD, matched[i, j].bias_D))
        variance[j] = moments.scatter_D.sum().item() / moments.elements
    return StitchErrors(**errors, variance=variance)
