"""Errors of stitches from their outputs: every one is compared with the expected value, in fp64."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from fastsitch.activations.ordered_split import OrderedSplit
from fastsitch.chains.layout import stored_size
from fastsitch.progress import Progress, Report, ignore
from fastsitch.stitching.geometry import DEFAULT_RULES, Geometry, Rules, Shape
from fastsitch.stitching.moments import require_same_images
from fastsitch.stitching.product_sums import ExpectedRows, Size, chunk_images

Stitch = tuple[Tensor, Tensor]
"""Weight (F, D), features ordered (ky, kx, c), and bias (D,), of any dtype."""


@dataclass(frozen=True)
class DirectErrors:
    """Of S stitches per cell, in fp64 on the CPU; NaN or infinite where a stitch is."""

    error: Tensor
    """Mean squared errors to the expected representation (S, sender positions, receiver positions); NaN too where
    there is no stitch."""
    distance: Tensor
    """Mean squared differences to the outputs of the first stitch, of the same shape."""
    variance: Tensor
    """Of the expected representation about its mean in each channel, a mean over channels (receiver positions,); NaN
    at positions that no stitch leads into."""


@torch.no_grad()
def direct_errors(
    sender: OrderedSplit,
    receiver: OrderedSplit,
    stitches: Mapping[tuple[int, int], Sequence[Stitch]],
    report: Report = ignore,
    *,
    rules: Rules = DEFAULT_RULES,
) -> DirectErrors:
    """Run the stitches of cells (i, j) of a pair, as many for each, over all images of a split.

    The cells are all from some sender positions into some receiver positions. The stitches are the exact affine maps:
    nothing is rounded to a compute dtype on the way. Raises ConfigError when the two splits do not hold the same images
    in the same order. ``report`` gets the images done.
    """
    require_same_images(sender, receiver)
    device = sender.labels.device
    images, step = len(sender.labels), chunk_images(device)
    origins, targets = (sorted(set(indices)) for indices in zip(*stitches, strict=True))
    expected = ExpectedRows(receiver, device, targets)
    members: dict[Size, list[int]] = {}
    for j in targets:
        members.setdefault(receiver.shapes[j][1:], []).append(j)
    error_sums = [
        _ErrorSums(i, sender.shapes[i], positions, receiver, stitches, rules, device)
        for i, positions in product(origins, members.values())
    ]
    for start in range(0, images, step):
        stop = min(start + step, images)
        expected.load(start, stop, members)
        for sums in error_sums:
            sums.add(sender.images(sums.i, start, stop), expected)
        report(Progress(stop, images, "images"))
    per_cell = len(next(iter(stitches.values())))
    shape = (per_cell, len(sender.shapes), len(receiver.shapes))
    error = torch.full(shape, torch.nan, dtype=torch.float64)
    distance, variance = error.clone(), error.new_full(shape[2:], torch.nan)
    for sums in error_sums:
        for j in sums.positions:
            columns, channels = expected.columns[j], receiver.shapes[j][0]
            values = images * math.prod(stored_size(receiver.shapes[j]))
            error[:, sums.i, j] = sums.error_SD[:, columns].sum(1).cpu() / (values * channels)
            distance[:, sums.i, j] = sums.distance_SD[:, columns].sum(1).cpu() / (values * channels)
            sum_D, squares_D = (total[sums.size][columns] for total in (expected.sum_D, expected.squares_D))
            variance[j] = (squares_D - sum_D.square() / values).sum().cpu() / (values * channels)
    return DirectErrors(error, distance, variance)


class _ErrorSums:
    """Sums of squared errors of the stitches from one sender position into receiver positions of one size."""

    def __init__(
        self,
        i: int,
        shape: Shape,
        positions: Sequence[int],
        receiver: OrderedSplit,
        stitches: Mapping[tuple[int, int], Sequence[Stitch]],
        rules: Rules,
        device: torch.device,
    ) -> None:
        self.i = i
        self.positions = positions
        target = receiver.shapes[positions[0]]
        self.size: Size = target[1:]
        self.geometry = Geometry.between(shape, target, rules)
        self.up = self.geometry.up
        self._rows = tuple(extent // self.up for extent in stored_size(target))
        per_cell = range(len(stitches[i, self.positions[0]]))

        def stacked(part: int) -> Tensor:
            """Weights (S, F, D) or biases (S, D), the columns in the order of the expected rows."""
            rows = [torch.cat([stitches[i, j][s][part].to(device) for j in self.positions], -1) for s in per_cell]
            return torch.stack([row.to(torch.float64) for row in rows])

        self._weight_SFD, self._bias_SD = stacked(0), stacked(1)
        self.error_SD = torch.zeros_like(self._bias_SD)
        self.distance_SD = torch.zeros_like(self._bias_SD)

    def add(self, x_NHWC: Tensor, expected: ExpectedRows) -> None:
        """Add a chunk, the one that ``expected`` holds."""
        x_MF = self.geometry.inputs(x_NHWC).flatten(0, 2).to(torch.float64)
        height, width = self._rows
        # one row of outputs is compared with up x up expected ones
        y = expected.rows(self.size, 1).view(-1, height, self.up, width, self.up, self._bias_SD.shape[1])
        first_MD = None
        for s, (weight_FD, bias_D) in enumerate(zip(self._weight_SFD, self._bias_SD, strict=True)):
            # expected values come without their shift
            out_MD = torch.addmm(bias_D - expected.shift_D[self.size], x_MF, weight_FD)
            difference = out_MD.view(-1, height, 1, width, 1, out_MD.shape[1]) - y
            self.error_SD[s] += difference.square_().flatten(0, -2).sum(0)
            if first_MD is None:
                first_MD = out_MD
            else:
                self.distance_SD[s] += self.up**2 * out_MD.sub_(first_MD).square_().sum(0)
