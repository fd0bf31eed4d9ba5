"""Sufficient statistics of matching, in fp64: all that the squared error of an affine stitch depends on.

For a sender position and a ratio k let X be the inputs of the stitch's GEMM, one row per cell at the stitch's own
resolution, or one per row of the receiver where the sender's are aligned with them first; for a receiver position let Y
be the expected representation, averaged over the u*u cells that share a row where the stitch upsamples. Kept are means
and centred products: X'X of the inputs, shared by all receivers; X'Y of a cell; and the squares of the expected values
before averaging. (With a 1 appended to X, X'X and X'Y hold the same.)
The moments of the inputs at a ratio follow from those at a multiple of it, so X'X is accumulated once per position.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from fastsitch.activations.ordered_split import OrderedSplit
from fastsitch.activations.source import SourceSplit
from fastsitch.errors import ConfigError
from fastsitch.progress import Progress, Report, ignore
from fastsitch.stitching.geometry import DEFAULT_RULES, Geometry, Operand, Rules
from fastsitch.stitching.product_sums import ExpectedRows, Products, chunk_images

_STATISTICS_BYTES = 1 << 30
"""Products that are accumulated in one pass over the images; more of them take more passes."""


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

    ``passes`` counts how often moments of inputs were computed: once per sender position and operand, a ratio or an
    alignment. ``rules`` are those of the stitches.
    """

    def __init__(self, split: OrderedSplit, rules: Rules = DEFAULT_RULES) -> None:
        self.split = split
        self.rules = rules
        self.passes = 0
        self._inputs: dict[tuple[int, Operand], Inputs] = {}

    def follows(self, i: int, operand: Operand) -> bool:
        """Whether the moments of an operand are known, or follow from those at a multiple of its ratio."""
        return _follows(self._inputs, i, operand)

    def inputs(self, i: int, operand: Operand) -> Inputs:
        if (i, operand) not in self._inputs:
            assert isinstance(operand, int)
            ratios = [known for position, known in self._inputs if position == i and isinstance(known, int)]
            multiple = min(ratio for ratio in ratios if ratio % operand == 0)
            self.keep(i, operand, _at_smaller_ratio(self._inputs[i, multiple], multiple, operand))
        return self._inputs[i, operand]

    def keep(self, i: int, operand: Operand, inputs: Inputs) -> None:
        self.passes += 1
        self._inputs[i, operand] = inputs


def _follows(known: Iterable[tuple[int, Operand]], i: int, operand: Operand) -> bool:
    """Whether an operand at a sender position is among those known, or its ratio divides one of theirs."""
    return any(position == i and (other == operand or _is_multiple(other, operand)) for position, other in known)


def _is_multiple(operand: Operand, of: Operand) -> bool:
    """Whether both are ratios, the first a multiple of the second."""
    return isinstance(operand, int) and isinstance(of, int) and operand % of == 0


def _at_smaller_ratio(inputs: Inputs, down: int, smaller: int) -> Inputs:
    """Moments at a ratio that divides ``down``: each cell splits into smaller ones, which share its inputs.

    The scatter is that within each smaller cell, a block of the given one, and that between their means.
    """
    split = down // smaller
    index = torch.arange(len(inputs.mean_F), device=inputs.mean_F.device)
    features = index.view(split, smaller, split, smaller, -1).transpose(1, 2).reshape(split**2, -1)
    means = inputs.mean_F[features]
    mean_F = means.mean(0)
    scatter_FF = torch.zeros(len(mean_F), len(mean_F), dtype=mean_F.dtype, device=mean_F.device)
    for block in features:
        scatter_FF += inputs.scatter_FF[block[:, None], block]
    scatter_FF.addmm_((means - mean_F).T, means - mean_F, alpha=inputs.rows)
    return Inputs(inputs.rows * split**2, mean_F, _mirrored(scatter_FF))


@torch.no_grad()
def pair_moments(
    sender: SenderMoments,
    receiver: OrderedSplit,
    report: Report = ignore,
    cells: Collection[tuple[int, int]] | None = None,
) -> dict[tuple[int, int], CellMoments]:
    """The moments of every cell (i, j) of a pair, in fp64 on the sender's device.

    Where ``cells`` are given, of those: all from some sender positions into some receiver positions. One pass over the
    images, several where the products would take more than a gigabyte. Raises ConfigError when the two do not hold the
    same images in the same order.
    """
    split = sender.split
    require_same_images(split, receiver)
    pairs = product(range(len(split.shapes)), range(len(receiver.shapes))) if cells is None else sorted(cells)
    geometries = {(i, j): Geometry.between(split.shapes[i], receiver.shapes[j], sender.rules) for i, j in pairs}
    targets = sorted({j for _, j in geometries})
    images, device = len(split.labels), split.labels.device
    step = chunk_images(device)
    moments: dict[tuple[int, int], CellMoments] = {}
    passes = list(_passes(sender, geometries))
    for number, one_pass in enumerate(passes):
        expected = ExpectedRows(receiver, device, targets)
        sizes = dict.fromkeys(size for products in one_pass for size in products.up)
        for start in range(0, images, step):
            stop = min(start + step, images)
            expected.load(start, stop, sizes)
            for products in one_pass:
                products.add(split.images(products.i, start, stop), expected)
            report(Progress(number * images + stop, len(passes) * images, "images"))
        for products in one_pass:
            products.release()
            moments |= _centred(products, sender, expected)
    return {cell: moments[cell] for cell in geometries}


def _centred(products: Products, sender: SenderMoments, expected: ExpectedRows) -> dict[tuple[int, int], CellMoments]:
    """The moments that follow from the products; those of the inputs go to the sender where they are new."""
    i, rows, sum_F = products.i, products.rows, products.sum_F
    if products.products_FF is not None:
        assert products.shift_F is not None
        scatter_FF = _mirrored(products.products_FF.addr_(sum_F, sum_F, alpha=-1 / rows))
        sender.keep(i, products.operand, Inputs(rows, products.shift_F + sum_F / rows, scatter_FF))
    inputs = sender.inputs(i, products.operand)
    offset_D = {size: expected.sum_D[size] / (rows * up**2) for size, up in products.up.items()}
    for size, offset in offset_D.items():
        products.cross[size].addr_(sum_F, offset, alpha=-1)
    cells = {}
    for j, geometry in products.targets.items():
        size, columns = geometry.receiver[1:], expected.columns[j]
        offset = offset_D[size][columns]
        scatter_D = expected.squares_D[size][columns] - expected.sum_D[size][columns] * offset
        cross_FD = products.cross[size][:, columns].contiguous()
        cells[i, j] = CellMoments(geometry, inputs, expected.shift_D[size][columns] + offset, cross_FD, scatter_D)
    return cells


def _mirrored(products_FF: Tensor) -> Tensor:
    """Copy what is above the diagonal below it, in place: symmetric to the bit."""
    products_FF.triu_()
    products_FF += products_FF.triu(1).T
    return products_FF


def _passes(sender: SenderMoments, geometries: Mapping[tuple[int, int], Geometry]) -> Iterator[list[Products]]:
    """All products, as many at a time as fit into the memory set aside for them."""
    targets: dict[tuple[int, Operand], dict[int, Geometry]] = {}
    for (i, j), geometry in geometries.items():
        targets.setdefault((i, geometry.operand), {})[j] = geometry
    one_pass: list[Products] = []
    taken = 0
    accumulated: set[tuple[int, Operand]] = set()
    # the largest ratio first: the moments of the inputs at its divisors follow from it
    for (i, operand), members in sorted(targets.items(), key=lambda entry: (entry[0][0], _order(entry[0][1]))):
        new = not sender.follows(i, operand) and not _follows(accumulated, i, operand)
        features = next(iter(members.values())).features
        size = 8 * features * (features * new + sum(geometry.receiver[0] for geometry in members.values()))
        if one_pass and taken + size > _STATISTICS_BYTES:
            yield one_pass
            one_pass, taken = [], 0
        if new:
            accumulated.add((i, operand))
        one_pass.append(Products(i, operand, members, squared=new, device=sender.split.labels.device))
        taken += size
    yield one_pass


def _order(operand: Operand) -> int:
    """Alignments last, ratios from the largest on."""
    return -operand if isinstance(operand, int) else 0


def _at_least_0(error: float) -> float:
    """0 where rounding made the error negative; NaN stays NaN, which ``max(0.0, error)`` would hide."""
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
