"""Sufficient statistics of matching, in fp64: all that an affine stitch's squared error depends on.

For a sender position and a ratio k let X be the inputs of the stitch's GEMM, one row per cell at the stitch's own
resolution; for a receiver position let Y be the expected representation, averaged over the u*u cells that share a row
where the stitch upsamples. Kept are means and centred products: X'X of the inputs, shared by all receivers; X'Y of a
cell; and the squares of the expected values before averaging. (With a 1 appended to X, X'X and X'Y hold the same.)
The moments of the inputs at a ratio follow from those at a multiple of it, so X'X is accumulated once per position.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from fastsitch.activations.ordered import OrderedSplit
from fastsitch.activations.source import SourceSplit
from fastsitch.errors import ConfigError
from fastsitch.stitching.geometry import Geometry
from fastsitch.stitching.products import ExpectedRows, Products, chunk_images

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

        Weight (F, D), features ordered (ky, kx, c), and bias (D,), any dtype. Never below 0; NaN where they are NaN.
        """
        weight, bias = self._exact(weight_FD, bias_D)
        offset_D = self.inputs.mean_F @ weight + bias - self.mean_D
        fitted = (weight * (self.inputs.scatter_FF @ weight - 2 * self.cross_FD)).sum()
        fitted += self.inputs.rows * offset_D.square().sum()
        total = self.geometry.up**2 * fitted + self.scatter_D.sum()
        return _at_least_0(total.item() / self.elements)

    def distance(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
        """The mean squared difference between the outputs of two stitches (weight, bias): SV."""
        weight, bias = (a - b for a, b in zip(self._exact(*first), self._exact(*second), strict=True))
        offset_D = self.inputs.mean_F @ weight + bias
        total = (weight * (self.inputs.scatter_FF @ weight)).sum() + self.inputs.rows * offset_D.square().sum()
        return _at_least_0(self.geometry.up**2 * total.item() / self.elements)

    def _exact(self, weight_FD: Tensor, bias_D: Tensor) -> tuple[Tensor, Tensor]:
        return weight_FD.to(self.cross_FD), bias_D.to(self.cross_FD)


class SenderMoments:
    """One sender's training images, and the moments of their inputs, computed once for all receivers.

    ``passes`` counts how often moments of inputs were computed: once per sender position and ratio.
    """

    def __init__(self, split: OrderedSplit) -> None:
        self.split = split
        self.passes = 0
        self._inputs: dict[tuple[int, int], Inputs] = {}

    def follows(self, i: int, down: int) -> bool:
        """Whether the moments at a ratio are known, or follow from those at a multiple of it."""
        return any(position == i and known % down == 0 for position, known in self._inputs)

    def inputs(self, i: int, down: int) -> Inputs:
        if (i, down) not in self._inputs:
            multiple = min(known for position, known in self._inputs if position == i and known % down == 0)
            self.keep(i, down, _at_smaller_ratio(self._inputs[i, multiple], multiple, down))
        return self._inputs[i, down]

    def keep(self, i: int, down: int, inputs: Inputs) -> None:
        self.passes += 1
        self._inputs[i, down] = inputs


def _at_smaller_ratio(inputs: Inputs, down: int, smaller: int) -> Inputs:
    """Moments at a ratio that divides ``down``: each cell splits into parts, whose inputs are some of its own.

    The scatter is that within each part, a block of the given one, and that between the parts' means.
    """
    split = down // smaller
    index = torch.arange(len(inputs.mean_F), device=inputs.mean_F.device)
    part = index.view(split, smaller, split, smaller, -1).transpose(1, 2).reshape(split**2, -1)
    means = inputs.mean_F[part]
    mean_F = means.mean(0)
    scatter_FF = torch.zeros(len(mean_F), len(mean_F), dtype=mean_F.dtype, device=mean_F.device)
    for own in part:
        scatter_FF += inputs.scatter_FF[own[:, None], own]
    scatter_FF.addmm_((means - mean_F).T, means - mean_F, alpha=inputs.rows)
    return Inputs(inputs.rows * split**2, mean_F, _mirrored(scatter_FF))


@torch.no_grad()
def pair_moments(
    sender: SenderMoments, receiver: OrderedSplit, report: Report | None = None
) -> dict[tuple[int, int], CellMoments]:
    """The moments of every cell (i, j) of a pair, in fp64 on the sender's device.

    One pass over the images, several where the products would take more than a gigabyte. Raises ConfigError when the
    two do not hold the same images in the same order.
    """
    split = sender.split
    require_same_images(split, receiver)
    geometries = {
        (i, j): Geometry.between(origin, target)
        for (i, origin), (j, target) in product(enumerate(split.shapes), enumerate(receiver.shapes))
    }
    images, device = len(split.labels), split.labels.device
    step = chunk_images(device)
    cells: dict[tuple[int, int], CellMoments] = {}
    several = list(_passes(sender, geometries))
    for number, together in enumerate(several):
        expected = ExpectedRows(receiver, device)
        sizes = dict.fromkeys(size for products in together for size in products.up)
        for start in range(0, images, step):
            stop = min(start + step, images)
            expected.load(start, stop, sizes)
            for products in together:
                products.add(split.images(products.i, start, stop), expected)
            if report is not None:
                report(number * images + stop, len(several) * images)
        for products in together:
            products.release()
            cells |= _centred(products, sender, expected)
    return {cell: cells[cell] for cell in geometries}


def _centred(products: Products, sender: SenderMoments, expected: ExpectedRows) -> dict[tuple[int, int], CellMoments]:
    """The moments that follow from the products; those of the inputs go to the sender where they are new."""
    i, rows, sum_F = products.i, products.rows, products.sum_F
    if products.products_FF is not None:
        assert products.shift_F is not None
        scatter_FF = _mirrored(products.products_FF.addr_(sum_F, sum_F, alpha=-1 / rows))
        sender.keep(i, products.down, Inputs(rows, products.shift_F + sum_F / rows, scatter_FF))
    inputs = sender.inputs(i, products.down)
    offset_D = {size: expected.sum_D[size] / (rows * up**2) for size, up in products.up.items()}
    for size, offset in offset_D.items():
        products.cross[size].addr_(sum_F, offset, alpha=-1)
    cells = {}
    for j, geometry in products.targets.items():
        size, own = geometry.receiver[1:], expected.columns[j]
        offset = offset_D[size][own]
        scatter_D = expected.squares_D[size][own] - expected.sum_D[size][own] * offset
        cross_FD = products.cross[size][:, own].contiguous()
        cells[i, j] = CellMoments(geometry, inputs, expected.shift_D[size][own] + offset, cross_FD, scatter_D)
    return cells


def _mirrored(products_FF: Tensor) -> Tensor:
    """Exact copies of what is above the diagonal below it, in place: symmetric to the bit."""
    products_FF.triu_()
    products_FF += products_FF.triu(1).T
    return products_FF


def _passes(sender: SenderMoments, geometries: Mapping[tuple[int, int], Geometry]) -> Iterator[list[Products]]:
    """All products, as many at a time as fit into the memory set aside for them."""
    targets: dict[tuple[int, int], dict[int, Geometry]] = {}
    for (i, j), geometry in geometries.items():
        targets.setdefault((i, geometry.down), {})[j] = geometry
    together: list[Products] = []
    taken = 0
    accumulated: set[tuple[int, int]] = set()
    # the largest ratio first: the moments of the inputs at its divisors follow from it
    for (i, down), members in sorted(targets.items(), key=lambda entry: (entry[0][0], -entry[0][1])):
        own = not sender.follows(i, down) and not any(known % down == 0 for at, known in accumulated if at == i)
        features = next(iter(members.values())).features
        size = 8 * features * (features * own + sum(geometry.receiver[0] for geometry in members.values()))
        if together and taken + size > _STATISTICS_BYTES:
            yield together
            together, taken = [], 0
        if own:
            accumulated.add((i, down))
        together.append(Products(i, down, members, own=own, device=sender.split.labels.device))
        taken += size
    yield together


def _at_least_0(error: float) -> float:
    """What rounding made negative is 0; NaN stays NaN, which ``max(0.0, error)`` would hide."""
    return 0.0 if error < 0 else error


def require_same_images(sender: OrderedSplit | SourceSplit, receiver: OrderedSplit | SourceSplit) -> None:
    """Raise ConfigError when the two do not hold the same images in the same order."""
    for what in ("labels", "ids"):
        provided, wanted = getattr(sender, what), getattr(receiver, what)
        if len(provided) != len(wanted):
            raise ConfigError(
                f"matching needs the same images in both networks: the sender has {len(provided)} images, "
                f"the receiver {len(wanted)}; make both stores from one data set"
            )
        if not torch.equal(provided.to(wanted.device), wanted):
            raise ConfigError(
                f"matching needs the same images in the same order: the {what} of sender and receiver differ; "
                "make both stores from one data set"
            )
