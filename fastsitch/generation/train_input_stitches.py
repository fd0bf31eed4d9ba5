"""Training the stitches into receivers' inputs that a run does not have yet."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from fastsitch.activations.source import Source
from fastsitch.generation.input_stitches import InputImages, InputStitches, InputStitchFiles, input_cells
from fastsitch.network_names import NetworkName
from fastsitch.planning.group_memory import StepKind, group_memory, matching_memory
from fastsitch.planning.source_choice import source_costs
from fastsitch.progress import Progress, Report
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.receivers.graph_segment import segment_costs
from fastsitch.runs.workbench import Workbench
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.geometry import Shape
from fastsitch.stitching.matching import Matched, match
from fastsitch.stitching.moments import SenderMoments, pair_moments
from fastsitch.stitching.train_groups import StitchWork, train_in_groups


class InputStitchTrainer:
    """Trains the input stitches of a run's units, sender by sender; ``budget`` bytes may be taken on the device."""

    def __init__(self, workbench: Workbench, budget: int, report: Report) -> None:
        self._workbench = workbench
        self._run = workbench.run
        self._report = report
        self._files = InputStitchFiles(workbench.run)
        self._receivers: dict[NetworkName, FrozenNetwork] = {}
        train, test = workbench.dataset.train, workbench.dataset.test
        costs = source_costs(
            workbench.root,
            workbench.run.plan,
            images=(len(train), len(test)),
            pixels=train.image_bytes,
            itemsize=workbench.dtype.itemsize,
        )
        self._free = budget - max(sender.memory[workbench.source(name)] for name, sender in costs.senders.items())

    def finished(self, units: Sequence[Unit]) -> dict[Unit, InputStitches]:
        """Those that are saved."""
        found = {unit: self._files.read(unit) for unit in units}
        return {unit: known for unit, known in found.items() if known is not None}

    def stitches(self, units: Sequence[Unit]) -> dict[Unit, InputStitches]:
        """Those of all units; what is missing is trained and saved unit by unit."""
        stitches = self.finished(units)
        total = sum(self._count(unit) for unit in units)
        missing = [unit for unit in units if unit not in stitches]
        for name, group in groupby(missing, key=lambda unit: unit.sender_network):
            source, ordered, origin = self._workbench.representations.sender(name)
            moments = SenderMoments(ordered, self._run.config.rules)
            for unit in group:
                finished, task = sum(map(self._count, stitches)), f"{unit.pair} images"

                def report(progress: Progress, finished: int = finished, task: str = task) -> None:
                    done = finished + progress.done
                    self._report(replace(progress, done=done, total=total, task="images", note=task))

                stitches[unit] = self._train(unit, source, moments, report)
                self._files.save(unit, stitches[unit], origin.identity.hash)
        return stitches

    def _train(self, unit: Unit, source: Source, moments: SenderMoments, report: Report) -> InputStitches:
        """The stitches of all sender positions, trained together, and matched."""
        config, cells = self._run.config, input_cells(self._run, unit)
        receiver = self._receiver(unit.receiver_network)
        work = StitchWork(
            receiver=receiver,
            source=source,
            recipe=config.recipe,
            order=config.order_of(unit.seed),
            kernel=self._run.resolved.kernel,
            rules=config.rules,
        )
        matched = self._match(unit, cells, moments)
        size = self._group_size(cells, source.shapes, receiver, built_in=unit.receiver_network.built_in)
        training = work.train(matched if config.init == "matched" else None)
        vanilla, size = train_in_groups(cells, size, training, report)
        fitted, _ = train_in_groups(cells, size, work.evaluate(matched))
        return {
            "vanilla": [vanilla[cell] for cell in cells],
            "matched": [_as_solved(fitted[cell], matched[cell]) for cell in cells],
        }

    def _match(self, unit: Unit, cells: Sequence[Cell], moments: SenderMoments) -> dict[Cell, Matched]:
        """The stitches of least squared error to the image as the receiver sees it."""
        transform = self._workbench.networks.load(unit.receiver_network).record.transform
        expected = InputImages(self._workbench.dataset.train, transform, self._workbench.device)
        exact = match(pair_moments(moments, expected, cells=[(cell.i, cell.j) for cell in cells]))
        return {cell: exact[cell.i, 0] for cell in cells}

    def _receiver(self, name: NetworkName) -> FrozenNetwork:
        if name not in self._receivers:
            self._receivers[name] = self._workbench.freeze(self._workbench.networks.load(name).chain.with_input())
        return self._receivers[name]

    def _group_size(
        self, asked: Sequence[Cell], sender: Sequence[Shape], network: FrozenNetwork, *, built_in: bool
    ) -> int:
        """The most stitches into the input whose training fits into memory together; at least 1."""
        resolved, config = self._run.resolved, self._run.config
        # whatever the run's own stitches are trained on, these pass through a frozen receiver
        step = StepKind.of(
            self._workbench.device,
            resolved.precision,
            resolved.kernel,
            resolved.compile,
            config.recipe.batch_size,
            rules=config.rules,
        )
        cells = [(cell.i, cell.j) for cell in asked]
        receiver = [position.rows for position in network.positions]
        segments = None if built_in else segment_costs(network)
        free = self._free - matching_memory(
            sender, receiver, preconditioned=config.preconditions, rules=config.rules, cells=cells
        )
        groups = 1
        while groups < len(cells) and group_memory(cells[::groups], sender, receiver, step, segments) > free:
            groups += 1
        return -(-len(cells) // groups)

    def _count(self, unit: Unit) -> int:
        return len(input_cells(self._run, unit))


def _as_solved(result: CellResult, matched: Matched) -> CellResult:
    """With the stitch as it was solved for, not as the receiver's dtype rounds it."""
    return replace(result, weight_FD=matched.weight_FD.cpu(), bias_D=matched.bias_D.cpu())
