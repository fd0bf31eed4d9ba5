"""What the positions of a sender know of the image: stitches into a receiver's input, and what they generate.

Source: Hernandez et al. 2022, Figure 6.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsitch.activations.order import ImageOrder
from fastsitch.activations.source import Source
from fastsitch.data import Dataset, Split, load_dataset
from fastsitch.errors import ConfigError, RunError
from fastsitch.files import exclusive
from fastsitch.identity import torch_generator
from fastsitch.kernels.reference import grouped_stitch_reference
from fastsitch.machine import DTYPES, available_memory, configure, resolve_device
from fastsitch.networks.checkpoint import Network, load_network, require_fit
from fastsitch.networks.compiled import compile_blocks
from fastsitch.networks.frozen import FrozenNetwork
from fastsitch.networks.layout import grid_rows
from fastsitch.networks.names import NetworkName
from fastsitch.networks.position import Position
from fastsitch.root import Root
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.engine import CellResult, StepReport, evaluate_matched, train_group
from fastsitch.stitching.geometry import DEFAULT_RULES, Geometry, Rules, Shape
from fastsitch.stitching.matching import match
from fastsitch.stitching.moments import SenderMoments, pair_moments
from fastsitch.sweep.choose_source import source_costs
from fastsitch.sweep.config import listed
from fastsitch.sweep.execute import Report, SweepReport
from fastsitch.sweep.groups import train_in_groups
from fastsitch.sweep.input_stitches import InputImages, InputStitches, InputStitchFiles, input_cells
from fastsitch.sweep.memory import StepKind, group_memory, matching_memory, memory_budget
from fastsitch.sweep.plan import PlannedUnit
from fastsitch.sweep.results import Run
from fastsitch.sweep.senders import Representations

Chosen = Sequence[str] | str | None
"""Names, also as a text with commas; None takes all that the run has."""


@dataclass(frozen=True, kw_only=True)
class PairImages:
    """What the input stitches of one pair and setting make of n test images; S sender positions, those of the run.

    Pixels are fp32 in [0, 1]; ``generated`` and ``results`` are by variant, ``vanilla`` and ``matched``.
    """

    sender: str
    receiver: str
    setting: str
    sender_positions: tuple[str, ...]
    indices: tuple[int, ...]
    """Of these among all positions of the sender."""
    network_accuracies: tuple[float, float]
    """Of sender and receiver."""
    images: tuple[int, ...]
    """Which images of the test set."""
    labels: tuple[int, ...]
    actual: NDArray[np.float32]
    """(n, H, W, C), in the receiver's resolution."""
    generated: Mapping[str, NDArray[np.float32]]
    """(S, n, H, W, C), clamped; NaN where a stitch diverged."""
    clamped: Mapping[str, NDArray[np.float64]]
    """The share of generated values that had to be clamped (S,)."""
    results: InputStitches

    def accuracy(self, variant: str) -> NDArray[np.float64]:
        """Of the stitched networks, on the whole test set (S,); NaN where a stitch diverged."""
        return np.array([result.accuracy for result in self.results[variant]])


@torch.no_grad()
def run_images(
    root: Root,
    run: Run,
    *,
    senders: Chosen = None,
    receivers: Chosen = None,
    settings: Chosen = None,
    images: Sequence[int] | None = None,
    count: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    memory: str = "auto",
    report: Report | None = None,
) -> list[PairImages]:
    """Train the input stitches that the run does not have yet, and let all of them generate test images.

    Networks, recipe, first seed, precision and source are those of the run. ``images`` are indices of test images;
    without them ``count`` (4) are drawn with ``seed`` (0). Raises ConfigError, DataError, NetworkError, or RunError
    where networks or data are no longer those of the run.
    """
    units = chosen_units(run, senders, receivers, settings)
    torch_device = resolve_device(device)
    if run.resolved.device != torch_device.type:
        raise RunError(
            f"run {run.name!r} was made on {run.resolved.device}: use --device {run.resolved.device}, or sweep again "
            f"on {torch_device.type} under another name"
        )
    budget = memory_budget(memory, available_memory(torch_device), torch_device.type)
    configure(torch_device)
    dataset = load_dataset(run.config.dataset, root.data_dir)
    if dataset.hash != run.data_hash:
        raise RunError(f"the data set has changed since run {run.name!r} began: sweep again under another name")
    index = chosen_images(len(dataset.test), images, count, seed)
    work = _Images(root, run, dataset, torch_device, budget, report)
    for name in dict.fromkeys(name for planned in units for name in (planned.sender, planned.receiver)):
        work.load(name)
    with exclusive(run.path / "images" / "lock", f"the images of run {run.name!r}"):
        stitches = work.stitches(units)
        return [work.draw(planned, stitches[planned], index) for planned in units]


def chosen_units(run: Run, senders: Chosen, receivers: Chosen, settings: Chosen) -> list[PlannedUnit]:
    """The pairs and settings asked for, each as its unit of the run's first seed; raises RunError for unknown ones."""
    allowed = []
    for role, asked, known in (
        ("sender", senders, run.config.senders),
        ("receiver", receivers, run.config.receivers),
        ("setting", settings, run.config.settings),
    ):
        names = list(known if asked is None else listed(asked))
        if role != "setting":
            names = [str(NetworkName.parse(name)) for name in names]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise RunError(
                f"run {run.name!r} has no {role} {', '.join(unknown) or '(none given)'}: "
                f"expected some of {', '.join(known)}"
            )
        allowed.append(names)
    return [
        planned
        for planned in run.units
        if planned.unit.seed == run.config.seeds[0]
        and all(
            own in names
            for own, names in zip(
                (planned.unit.sender, planned.unit.receiver, planned.unit.setting), allowed, strict=True
            )
        )
    ]


def chosen_images(
    available: int, images: Sequence[int] | None = None, count: int | None = None, seed: int | None = None
) -> list[int]:
    """Indices of test images: those named, or ``count`` that are drawn with ``seed``; raises ConfigError."""
    if images is not None:
        if count is not None or seed is not None:
            raise ConfigError("--images names the test images: leave out --count and --seed, which would draw them")
        wrong = [index for index in images if not 0 <= index < available]
        if wrong or not images:
            raise ConfigError(
                f"--images {','.join(map(str, wrong)) or '(none)'}: expected indices of test images, "
                f"from 0 to {available - 1}"
            )
        return list(dict.fromkeys(images))
    count, seed = 4 if count is None else count, seed or 0
    if not 1 <= count <= available:
        raise ConfigError(f"--count {count}: expected 1 to {available} test images")
    if seed < 0:
        raise ConfigError(f"--seed {seed}: expected a number from 0")
    # the images of a smaller count are the first ones of a larger count
    return torch.randperm(available, generator=torch_generator("test images", seed))[:count].tolist()


class _Images:
    def __init__(
        self, root: Root, run: Run, dataset: Dataset, device: torch.device, budget: int, report: Report | None
    ) -> None:
        self.run = run
        self.dataset = dataset
        self.device = device
        self.report = report
        self.files = InputStitchFiles(run)
        self._folder = root.models(dataset.name)
        self.load: Callable[[NetworkName], Network] = cache(self._load)
        self._receiver: Callable[[NetworkName], FrozenNetwork] = cache(self._freeze)
        self._provided: Callable[[NetworkName, tuple[int, ...]], list[Tensor]] = cache(self._represent)
        # a run of matched stitches may name a recipe that needs new views of the images
        source = "live" if run.config.recipe.augment else run.resolved.source
        dtype = DTYPES[run.resolved.precision]
        self.representations = Representations(root, dataset, self.load, source=source, dtype=dtype, device=device)
        costs = source_costs(
            root,
            run.config,
            {name: [shape for _, shape in network.positions] for name, network in run.networks.items()},
            images=(len(dataset.train), len(dataset.test)),
            pixels=dataset.train.images[0].numel(),
            itemsize=dtype.itemsize,
        )
        self.room = budget - costs.memory[source]

    def stitches(self, units: Sequence[PlannedUnit]) -> dict[PlannedUnit, InputStitches]:
        """Those of all units; what is missing is trained, sender by sender, and saved unit by unit."""
        found = {planned: self.files.read(planned) for planned in units}
        stitches = {planned: own for planned, own in found.items() if own is not None}
        total = sum(self._positions(planned) for planned in units)
        missing = [planned for planned in units if planned not in stitches]
        for name, group in groupby(missing, key=lambda planned: planned.sender):
            source, ordered, origin = self.representations.sender(name)
            moments = SenderMoments(ordered, self.run.config.rules)
            for planned in group:
                finished = sum(map(self._positions, stitches))

                def tell(cells: float, planned: PlannedUnit = planned, finished: int = finished) -> None:
                    if self.report is not None:
                        self.report(SweepReport(finished + cells, total, f"{planned.unit.pair} images"))

                stitches[planned] = self._train(planned, source, moments, tell)
                self.files.save(planned, stitches[planned], origin.identity.hash)
        return stitches

    def _train(
        self, planned: PlannedUnit, source: Source, moments: SenderMoments, tell: Callable[[float], None]
    ) -> InputStitches:
        """The stitches of all sender positions, trained together, and matched."""
        config = self.run.config
        how: dict[str, Any] = {"kernel": self.run.resolved.kernel, "rules": config.rules}
        receiver = self._receiver(planned.receiver)
        expected = InputImages(self.dataset.train, self.load(planned.receiver).record.transform, self.device)
        cells = input_cells(self.run, planned)
        exact = match(pair_moments(moments, expected, None, [(cell.i, cell.j) for cell in cells]))
        matched = {cell: exact[cell.i, 0] for cell in cells}
        order = ImageOrder(seed=planned.unit.seed, block=config.block, window=config.window)
        init = matched if config.init == "matched" else None
        done = 0

        def train(group: list[Cell]) -> dict[Cell, CellResult]:
            nonlocal done

            def step(own: StepReport) -> None:
                tell(done + own.cells * own.step / own.steps)

            results = train_group(receiver, source, group, config.recipe, order, init=init, report=step, **how)
            done += len(group)
            return results

        def evaluate(group: list[Cell]) -> dict[Cell, CellResult]:
            own = {cell: matched[cell] for cell in group}
            results = evaluate_matched(receiver, source, own, images=2 * config.recipe.batch_size, **how)
            return {
                # as they were solved for, not as the receiver's dtype rounds them
                cell: replace(result, weight_FD=own[cell].weight_FD.cpu(), bias_D=own[cell].bias_D.cpu())
                for cell, result in results.items()
            }

        size = self._group_size(cells, source.shapes, [position.rows for position in receiver.positions])
        vanilla, size = train_in_groups(cells, size, train)
        fitted, _ = train_in_groups(cells, size, evaluate)
        return {"vanilla": [vanilla[cell] for cell in cells], "matched": [fitted[cell] for cell in cells]}

    def _group_size(self, asked: Sequence[Cell], sender: Sequence[Shape], receiver: Sequence[Shape]) -> int:
        """The most stitches into the input whose training fits into memory together; at least 1."""
        resolved, config = self.run.resolved, self.run.config
        batch, rules = config.recipe.batch_size, config.rules
        kind = StepKind.of(self.device, resolved.precision, resolved.kernel, resolved.compile, batch, rules=rules)
        cells = [(cell.i, cell.j) for cell in asked]
        room = self.room - matching_memory(
            sender, receiver, preconditioned=config.preconditions, rules=rules, cells=cells
        )
        groups = 1
        while groups < len(cells) and group_memory(cells[::groups], sender, receiver, kind) > room:
            groups += 1
        return -(-len(cells) // groups)

    def draw(self, planned: PlannedUnit, stitches: InputStitches, index: Sequence[int]) -> PairImages:
        """What a unit's stitches make of the test images ``index``."""
        run, unit = self.run, planned.unit
        record = self.load(planned.receiver).record
        pixels_NCHW = self.dataset.test.images[list(index)].float().permute(0, 3, 1, 2) / 255
        provided = self._provided(planned.sender, tuple(index))
        positions, rules = self.load(planned.sender).chain.positions, run.config.rules
        indices = tuple(cell.i for cell in input_cells(run, planned))
        generated, clamped = {}, {}
        for variant, results in stitches.items():
            pixels = torch.stack(
                [
                    record.normalisation.invert(generate(provided[i], result, record.input_shape, positions[i], rules))
                    for i, result in zip(indices, results, strict=True)
                ]
            )
            outside = (pixels < 0) | (pixels > 1)
            clamped[variant] = outside.double().flatten(1).mean(1).numpy()
            generated[variant] = pixels.clamp(0, 1).float().numpy()
        sender, receiver = run.networks[planned.sender], run.networks[planned.receiver]
        return PairImages(
            sender=unit.sender,
            receiver=unit.receiver,
            setting=unit.setting,
            sender_positions=tuple(sender.positions[i][0] for i in indices),
            indices=indices,
            network_accuracies=(sender.accuracy, receiver.accuracy),
            images=tuple(index),
            labels=tuple(self.dataset.test.labels[list(index)].tolist()),
            actual=record.transform.resize(pixels_NCHW).permute(0, 2, 3, 1).contiguous().numpy(),
            generated=generated,
            clamped=clamped,
            results=stitches,
        )

    def _represent(self, name: NetworkName, index: tuple[int, ...]) -> list[Tensor]:
        """Test images as a sender represents them, raw, in fp64 on the CPU, at every position."""
        test = self.dataset.test
        live = self.representations.live(name, Split(test.images[list(index)], test.labels[list(index)]))
        # one at a time: what is generated from an image does not depend on the others
        each = [live.represent(slice(k, k + 1)) for k in range(len(index))]
        return [torch.cat(own).double().cpu() for own in zip(*each, strict=True)]

    def _load(self, name: NetworkName) -> Network:
        network = load_network(self._folder, name)
        require_fit(network.record, self.dataset)
        if network.record.weights_hash != self.run.networks[name].weights_hash:
            raise RunError(
                f"{name} was trained again since run {self.run.name!r} began: sweep again under another name"
            )
        return network

    def _freeze(self, name: NetworkName) -> FrozenNetwork:
        chain = self.load(name).chain.with_input()
        network = FrozenNetwork(chain, dtype=DTYPES[self.run.resolved.precision], device=self.device)
        return compile_blocks(network) if self.run.resolved.compile == "on" else network

    def _positions(self, planned: PlannedUnit) -> int:
        return len(input_cells(self.run, planned))


def generate(
    x: Tensor,
    stitch: CellResult,
    image: tuple[int, int, int],
    position: Position | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Tensor:
    """What a stitch into the input makes of raw representations: normalised images (N, C, H, W), in the dtype of x.

    The representations are maps (N, C, H, W) without a ``position``.
    """
    position = position or Position(0, "", tuple(x.shape[1:]))
    geometry = Geometry.between(position.rows, image, rules)
    rows, aligned = position.to_rows(x), geometry.alignment is not None
    y_KNHWC = grouped_stitch_reference(
        (geometry.inputs(rows) if aligned else grid_rows(rows, position.rows)).unsqueeze(0),
        stitch.weight_FD.to(x).unsqueeze(0),
        stitch.bias_D.to(x).unsqueeze(0),
        [0],
        down=1 if aligned else geometry.down,
        up=geometry.up,
    )
    return y_KNHWC[0].permute(0, 3, 1, 2)
