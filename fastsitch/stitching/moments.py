"""Sufficient statistics of matching, in fp64: all that an affine stitch's squared error depends on.

For a sender position and a ratio k let X be the inputs of the stitch's GEMM, one row per cell at the stitch's own
resolution; for a receiver position let Y be the expected representation, averaged over the u*u cells that share a row
where the stitch upsamples. Kept are means and centred products: X'X of the inputs, shared by all receivers; X'Y of a
cell; and the squares of the expected values before averaging. (With a 1 appended to X, X'X and X'Y hold the same.)
The means of the first images are subtracted from everything while it is accumulated: a channel that hardly varies
about a large mean would otherwise be lost in rounding.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsitch.activations.ordered import OrderedSplit
from fastsitch.errors import ConfigError
from fastsitch.kernels import space_to_depth
from fastsitch.stitching.geometry import Geometry

_CHUNK_IMAGES = 64
"""Images per product: small enough for the cache, and a divisor of a store's read."""

_TRIANGLE = 128
"""X'X is symmetric: it is computed in stripes of so many rows, each from its diagonal on."""

_STATISTICS_BYTES = 1 << 30
"""Products that are accumulated in one pass over the images; more of them take more passes."""

Report = Callable[[int, int], None]
"""report(images done, images in all)."""


@dataclass(frozen=True)
class Inputs:
    """Moments of the inputs at one sender position and ratio: rows, mean (F,) and centred products X'X (F, F)."""

    rows: int
    mean_F: Tensor
    scatter_FF: Tensor


@dataclass(frozen=True)
class CellMoments:
    """Moments of one cell: means, centred products X'Y (F, D) and centred squares of the expected values (D,)."""

    geometry: Geometry
    inputs: Inputs
    mean_D: Tensor
    cross_FD: Tensor
    scatter_D: Tensor

    @property
    def elements(self) -> int:
        """Expected values in all: images x rows x columns x channels."""
        return self.inputs.rows * self.geometry.up**2 * self.geometry.receiver[0]

    def error(self, weight_FD: Tensor, bias_D: Tensor) -> float:
        """The mean squared error of any stitch to the expected representation: ES of the matched, EV of a vanilla one.

        Weight (F, D), features ordered (ky, kx, c), and bias (D,), any dtype; never below 0.
        """
        weight, bias = self._exact(weight_FD, bias_D)
        offset_D = self.inputs.mean_F @ weight + bias - self.mean_D
        fitted = (weight * (self.inputs.scatter_FF @ weight - 2 * self.cross_FD)).sum()
        fitted += self.inputs.rows * offset_D.square().sum()
        total = self.geometry.up**2 * fitted + self.scatter_D.sum()
        return max(0.0, total.item() / self.elements)

    def distance(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
        """The mean squared difference between the outputs of two stitches (weight, bias): SV."""
        weight, bias = (a - b for a, b in zip(self._exact(*first), self._exact(*second), strict=True))
        offset_D = self.inputs.mean_F @ weight + bias
        total = (weight * (self.inputs.scatter_FF @ weight)).sum() + self.inputs.rows * offset_D.square().sum()
        return max(0.0, self.geometry.up**2 * total.item() / self.elements)

    def _exact(self, weight_FD: Tensor, bias_D: Tensor) -> tuple[Tensor, Tensor]:
        return weight_FD.to(self.cross_FD), bias_D.to(self.cross_FD)


class SenderMoments:
    """One sender's training images, and the moments of their inputs, computed once for all receivers.

    ``passes`` counts how often moments of inputs were accumulated: once per sender position and ratio.
    """

    def __init__(self, split: OrderedSplit) -> None:
        self.split = split
        self.passes = 0
        self._inputs: dict[tuple[int, int], Inputs] = {}

    def has(self, i: int, down: int) -> bool:
        return (i, down) in self._inputs

    def inputs(self, i: int, down: int) -> Inputs:
        return self._inputs[i, down]

    def keep(self, i: int, down: int, inputs: Inputs) -> None:
        self.passes += 1
        self._inputs[i, down] = inputs


@torch.no_grad()
def pair_moments(
    sender: SenderMoments, receiver: OrderedSplit, report: Report | None = None
) -> dict[tuple[int, int], CellMoments]:
    """The moments of every cell (i, j) of a pair, in fp64 on the sender's device.

    One pass over the images, several where the products would take more than a gigabyte. Raises ConfigError when the
    two do not hold the same images in the same order.
    """
    split = sender.split
    _require_same_images(split, receiver)
    geometries = {
        (i, j): Geometry.between(origin, target)
        for (i, origin), (j, target) in product(enumerate(split.shapes), enumerate(receiver.shapes))
    }
    images = len(split.labels)
    cells: dict[tuple[int, int], CellMoments] = {}
    several = list(_passes(sender, geometries))
    for number, accumulators in enumerate(several):
        expected = _Expected(receiver, split.labels.device)
        for start in range(0, images, _CHUNK_IMAGES):
            stop = min(start + _CHUNK_IMAGES, images)
            expected.load(start, stop, {j for own in accumulators for j in own.targets})
            for accumulator in accumulators:
                accumulator.add(split.images(accumulator.i, start, stop), expected)
            if report is not None:
                report(number * images + stop, len(several) * images)
        for accumulator in accumulators:
            cells |= accumulator.finish(sender, expected)
    return {cell: cells[cell] for cell in geometries}


class _Expected:
    """The expected rows of a chunk of images at every receiver position, and the sums of their squares so far."""

    def __init__(self, split: OrderedSplit, device: torch.device) -> None:
        self._split = split
        self._device = device
        self._chunk: dict[tuple[int, int], Tensor] = {}
        self.shift_D: dict[int, Tensor] = {}
        self.sum_D: dict[int, Tensor] = {}
        self.squares_D: dict[int, Tensor] = {}

    def load(self, start: int, stop: int, positions: set[int]) -> None:
        self._chunk = {}
        for j in positions:
            y_NPQD = self._split.images(j, start, stop).to(self._device)
            if j not in self.shift_D:
                self.shift_D[j] = y_NPQD.mean((0, 1, 2), dtype=torch.float64)
            self._chunk[j, 1] = y_NPQD - self.shift_D[j]
            rows = self._chunk[j, 1].flatten(0, 2)
            self.sum_D[j] = self.sum_D.get(j, 0) + rows.sum(0)
            self.squares_D[j] = self.squares_D.get(j, 0) + rows.square().sum(0)

    def rows(self, j: int, up: int) -> Tensor:
        """(M, D): the expected values, averaged over the up x up cells that share a row."""
        if (j, up) not in self._chunk:
            # channels-last, so that the average is a pass over contiguous channels
            averaged = F.avg_pool2d(self._chunk[j, 1].permute(0, 3, 1, 2), up)
            self._chunk[j, up] = averaged.permute(0, 2, 3, 1)
        return self._chunk[j, up].flatten(0, 2)


class _Accumulator:
    """The running products of one sender position and ratio."""

    def __init__(self, i: int, down: int, targets: Mapping[int, Geometry], *, new: bool, device: torch.device) -> None:
        self.i = i
        self.down = down
        self.targets = targets
        features = next(iter(targets.values())).features

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.rows = 0
        self.shift_F: Tensor | None = None
        self.sum_F = zeros(features)
        self.products_FF = zeros(features, features) if new else None
        self.cross_FD = {j: zeros(features, geometry.receiver[0]) for j, geometry in targets.items()}

    def add(self, x_NHWC: Tensor, expected: _Expected) -> None:
        provided_MF = space_to_depth(x_NHWC, self.down).flatten(0, 2)
        if self.shift_F is None:
            self.shift_F = provided_MF.mean(0, dtype=torch.float64)
        x_MF = provided_MF - self.shift_F
        self.rows += x_MF.shape[0]
        self.sum_F += x_MF.sum(0)
        if self.products_FF is not None:
            for start in range(0, x_MF.shape[1], _TRIANGLE):
                stripe = slice(start, start + _TRIANGLE)
                self.products_FF[stripe, start:].addmm_(x_MF[:, stripe].T, x_MF[:, start:])
        for j, geometry in self.targets.items():
            self.cross_FD[j].addmm_(x_MF.T, expected.rows(j, geometry.up))

    def finish(self, sender: SenderMoments, expected: _Expected) -> dict[tuple[int, int], CellMoments]:
        """Centre everything; hand the moments of the inputs to the sender where they are new."""
        assert self.shift_F is not None
        if self.products_FF is not None:
            # exact copies above the diagonal, so that the result is symmetric to the bit
            products = self.products_FF.triu_()
            products += products.triu(1).T
            products.addr_(self.sum_F, self.sum_F, alpha=-1 / self.rows)
            sender.keep(self.i, self.down, Inputs(self.rows, self.shift_F + self.sum_F / self.rows, products))
        inputs = sender.inputs(self.i, self.down)
        cells = {}
        for j, geometry in self.targets.items():
            offset_D = expected.sum_D[j] / (self.rows * geometry.up**2)
            cross_FD = self.cross_FD[j].addr_(self.sum_F, offset_D, alpha=-1)
            scatter_D = expected.squares_D[j] - expected.sum_D[j] * offset_D
            cells[self.i, j] = CellMoments(geometry, inputs, expected.shift_D[j] + offset_D, cross_FD, scatter_D)
        return cells


def _passes(sender: SenderMoments, geometries: Mapping[tuple[int, int], Geometry]) -> Iterator[list[_Accumulator]]:
    """All products, as many at a time as fit into the memory set aside for them."""
    targets: dict[tuple[int, int], dict[int, Geometry]] = {}
    for (i, j), geometry in geometries.items():
        targets.setdefault((i, geometry.down), {})[j] = geometry
    together: list[_Accumulator] = []
    taken = 0
    for (i, down), own in targets.items():
        new = not sender.has(i, down)
        features = next(iter(own.values())).features
        size = 8 * features * (features * new + sum(geometry.receiver[0] for geometry in own.values()))
        if together and taken + size > _STATISTICS_BYTES:
            yield together
            together, taken = [], 0
        together.append(_Accumulator(i, down, own, new=new, device=sender.split.labels.device))
        taken += size
    yield together


def _require_same_images(sender: OrderedSplit, receiver: OrderedSplit) -> None:
    for what in ("labels", "ids"):
        provided, wanted = getattr(sender, what), getattr(receiver, what)
        if len(provided) != len(wanted):
            raise ConfigError(
                f"matching needs the same images in both networks: the sender has {len(provided)} training images, "
                f"the receiver {len(wanted)}; make both stores from one data set"
            )
        if not torch.equal(provided.to(wanted.device), wanted):
            raise ConfigError(
                f"matching needs the same images in the same order: the {what} of sender and receiver differ; "
                "make both stores from one data set"
            )
