"""Measure EV, ES and SV of every cell of a run, in one pass per pair over the training images and one over the test."""

import logging
from collections.abc import Mapping
from functools import partial
from itertools import groupby

import numpy as np
import torch

from fastsitch.activations.ordered_split import OrderedSplit
from fastsitch.activations.representations import Origin
from fastsitch.analysis.stitch_error_files import is_measured, load_stitch_errors, save_stitch_errors
from fastsitch.analysis.stitch_errors import StitchErrors
from fastsitch.errors import RunError, argument
from fastsitch.files import exclusive
from fastsitch.machine import configure, resolve_device
from fastsitch.progress import Progress, Report, ignore
from fastsitch.root import Root
from fastsitch.runs.continue_run import require_same_origin
from fastsitch.runs.run import Run
from fastsitch.runs.workbench import Workbench
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.matching import Matched, match
from fastsitch.stitching.moments import CellMoments, SenderMoments, pair_moments
from fastsitch.stitching.output_errors import Stitch, direct_errors
from fastsitch.vocabulary import Status

log = logging.getLogger(__name__)


@torch.no_grad()
def measure_errors(root: Root, run: Run, *, device: str = "auto", report: Report = ignore) -> None:
    """Measure and save the stitch errors of all finished units of a vanilla run, on training and test images.

    The matched stitches are solved for exactly on the training images. Errors are those of the affine stitches in fp64,
    on representations in the run's precision: from sufficient statistics on the training images, by a direct pass on
    the test images. Units that are measured are skipped, unless their file is damaged or of other stitches. Networks
    without a store run live. Raises RunError when the run is not a vanilla one, has no finished unit, or networks, data
    or a sender's store are not those it was trained on; BusyError when another process measures it.
    """
    if run.config.loss != "task":
        raise RunError(
            f"run {run.name!r} has {argument('loss', run.config.loss)}: stitch errors are measured of runs with "
            f"{argument('loss', 'task')}"
        )
    done = [unit for unit in run.units if run.done(unit)]
    if not done:
        raise RunError(f"run {run.name!r} has no finished unit: run its sweep first")
    if len(done) < len(run.units):
        log.info("%d of %d units are not finished: left out", len(run.units) - len(done), len(run.units))
    torch_device = resolve_device(device)
    if not any(_problem(run, unit) for unit in done):
        # nothing is to be written, not even a lock
        log.info("the stitch errors of all %d units of run %s are measured already", len(done), run.name)
        return
    with exclusive(run.path / "errors" / "lock", f"the stitch errors of run {run.name!r}"):
        problems = {unit: problem for unit in done if (problem := _problem(run, unit))}
        for unit, problem in problems.items():
            if is_measured(run, unit):
                log.warning("measuring again: %s", problem)
        configure(torch_device)
        if problems:
            _Measurement(Workbench.open(root, run, torch_device), list(problems), report).measure_all()


def _problem(run: Run, unit: Unit) -> str:
    """Why the errors of a unit have to be measured; empty where they do not."""
    try:
        load_stitch_errors(run, unit)
    except RunError as error:
        return str(error)
    return ""


class _Measurement:
    def __init__(self, workbench: Workbench, missing: list[Unit], report: Report) -> None:
        self.run = workbench.run
        self.dataset = workbench.dataset
        self.representations = workbench.representations
        self.missing = missing
        self.report = report
        self.finished = 0

    def measure_all(self) -> None:
        for sender, of_sender in groupby(self.missing, key=lambda unit: unit.sender_network):
            units = list(of_sender)
            train, origin = self.representations.expected(sender, make=False)
            test, _ = self.representations.expected(sender, "test", make=False)
            require_same_origin(self.run, units, "store_hash", origin)
            moments = SenderMoments(train, self.run.config.rules)
            # the seeds of a pair follow each other
            for _, of_pair in groupby(units, key=lambda unit: unit.receiver_network):
                self._measure(list(of_pair), moments, test, origin)

    def _measure(self, units: list[Unit], moments: SenderMoments, test: OrderedSplit, origin: Origin) -> None:
        """All missing seeds of a pair: one set of moments, one pass over the test images."""
        receiver = units[0].receiver_network
        expected, expected_origin = self.representations.expected(receiver, make=False)
        expected_test, _ = self.representations.expected(receiver, "test", make=False)
        hashes = [self.run.stitches_hash(unit) for unit in units]
        positions = [(cell.i, cell.j) for cell in self.run.cells(units[0])]
        report = partial(self._report_progress, units)
        cells = pair_moments(moments, expected, partial(report, test=False), positions)
        matched = match(cells)
        vanilla = [_by_position(self.run.stitches(unit)) for unit in units]
        direct = direct_errors(
            test,
            expected_test,
            {
                cell: [(stitch.weight_FD, stitch.bias_D), *(stitches[cell] for stitches in vanilla)]
                for cell, stitch in matched.items()
            },
            partial(report, test=True),
            rules=self.run.config.rules,
        )
        error, distance, variance = (values.numpy() for values in (direct.error, direct.distance, direct.variance))
        stores = {"store_hash": origin.identity.hash, "receiver_store_hash": expected_origin.identity.hash}
        for k, (unit, stitches) in enumerate(zip(units, vanilla, strict=True), 1):
            errors = {
                "train": _from_moments(cells, matched, stitches, error.shape[1:]),
                "test": StitchErrors(EV=error[k], ES=error[0], SV=distance[k], variance=variance),
            }
            diverged = self.run.read(unit)["status"] == Status.DIVERGED
            for split_errors in errors.values():
                split_errors.EV[diverged] = split_errors.SV[diverged] = np.nan
            save_stitch_errors(self.run, unit, errors, hashes[k - 1], stores)
            self.finished += 1

    def _report_progress(self, units: list[Unit], progress: Progress, *, test: bool) -> None:
        """A pair's units are done as its images are: those of training in the first pass, those of the test after."""
        images = {split: len(getattr(self.dataset, split)) for split in ("train", "test")}
        done = progress.done / progress.total * images["test" if test else "train"] + test * images["train"]
        done = self.finished + done / sum(images.values()) * len(units)
        self.report(Progress(done, len(self.missing), "units", "errors", units[0].name))


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
