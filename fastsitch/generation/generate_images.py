"""What the positions of a sender know of the image: stitches into a receiver's input, and what they generate.

Source: Hernandez et al. 2022, Figure 6.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsitch.chains.layout import grid_rows
from fastsitch.chains.position import Position
from fastsitch.files import exclusive
from fastsitch.generation.choose_images import Chosen, chosen_images, chosen_units
from fastsitch.generation.input_stitches import InputStitches, input_cells
from fastsitch.generation.train_input_stitches import InputStitchTrainer
from fastsitch.kernels.reference import grouped_stitch_reference
from fastsitch.machine import available_memory, configure, resolve_device
from fastsitch.network_names import NetworkName
from fastsitch.planning.group_memory import memory_budget
from fastsitch.progress import Report, ignore
from fastsitch.root import Root
from fastsitch.runs.continue_run import require_same_device
from fastsitch.runs.run import Run
from fastsitch.runs.workbench import Workbench
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Unit
from fastsitch.stitching.geometry import DEFAULT_RULES, Geometry, Rules
from fastsitch.vocabulary import Setting


@dataclass(frozen=True, kw_only=True)
class PairImages:
    """What the input stitches of one pair and setting make of n test images; S sender positions, those of the run.

    Pixels are fp32 in [0, 1]; ``generated`` and ``results`` are by variant, ``vanilla`` and ``matched``.
    """

    sender: str
    receiver: str
    setting: Setting
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
    report: Report = ignore,
) -> list[PairImages]:
    """Train the input stitches that the run does not have yet, and let all of them generate test images.

    Networks, recipe, first seed, precision and source are those of the run. ``images`` are indices of test images;
    without them ``count`` (4) are drawn with ``seed`` (0). Raises ConfigError, DataError, NetworkError, or RunError
    where networks or data are no longer those of the run.
    """
    units = chosen_units(run, senders, receivers, settings)
    torch_device = resolve_device(device)
    require_same_device(run, torch_device)
    budget = memory_budget(memory, available_memory(torch_device), torch_device.type)
    configure(torch_device)
    # a run of matched stitches may name a recipe that needs new views of the images
    workbench = Workbench.open(root, run, torch_device, (lambda _: "live") if run.config.recipe.augment else None)
    index = chosen_images(len(workbench.dataset.test), images, count, seed)
    for name in dict.fromkeys(name for unit in units for name in (unit.sender_network, unit.receiver_network)):
        workbench.networks.load(name)
    trainer = InputStitchTrainer(workbench, budget, report)
    stitches = trainer.finished(units)
    if len(stitches) < len(units):
        with exclusive(run.path / "images" / "lock", f"the images of run {run.name!r}"):
            stitches = trainer.stitches(units)
    generator = _Generator(workbench, index)
    return [generator.pair(unit, stitches[unit]) for unit in units]


class _Generator:
    """Lets the input stitches of a run generate some test images; senders represent them once."""

    def __init__(self, workbench: Workbench, index: Sequence[int]) -> None:
        test = workbench.dataset.test
        self._workbench = workbench
        self._index = tuple(index)
        self._split = test[torch.tensor(self._index)]
        self._provided: dict[NetworkName, list[Tensor]] = {}

    def pair(self, unit: Unit, stitches: InputStitches) -> PairImages:
        """What the stitches of one unit make of the images."""
        run, networks = self._workbench.run, self._workbench.networks
        record, rules = networks.load(unit.receiver_network).record, run.config.rules
        provided = self._represent(unit.sender_network)
        positions = networks.load(unit.sender_network).chain.positions
        indices = tuple(cell.i for cell in input_cells(run, unit))
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
            # those of a network that sees images grey are shown as the others
            generated[variant] = pixels.clamp(0, 1).float().expand(*pixels.shape[:-1], 3).contiguous().numpy()
        sender, receiver = run.networks[unit.sender_network], run.networks[unit.receiver_network]
        pixels_NCHW = self._split.pixels.float().permute(0, 3, 1, 2) / 255
        return PairImages(
            sender=unit.sender,
            receiver=unit.receiver,
            setting=unit.setting,
            sender_positions=tuple(sender.positions[i][0] for i in indices),
            indices=indices,
            network_accuracies=(sender.accuracy, receiver.accuracy),
            images=self._index,
            labels=tuple(self._split.labels.tolist()),
            actual=record.transform.resize(pixels_NCHW).permute(0, 2, 3, 1).contiguous().numpy(),
            generated=generated,
            clamped=clamped,
            results=stitches,
        )

    def _represent(self, name: NetworkName) -> list[Tensor]:
        """The images as a sender represents them, raw, in fp64 on the CPU, at every position."""
        if name not in self._provided:
            live = self._workbench.representations.live(name, self._split)
            # one at a time: what is generated from an image does not depend on the others
            each = [live.represent(slice(k, k + 1)) for k in range(len(self._index))]
            self._provided[name] = [torch.cat(parts).double().cpu() for parts in zip(*each, strict=True)]
        return self._provided[name]


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
