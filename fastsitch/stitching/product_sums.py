"""Sums of products over the images, chunk by chunk in fp64: the work behind the moments of matching.

Everything is shifted by the mean of the first chunk: a channel that hardly varies about a large mean would otherwise
be lost in rounding.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsitch.activations.ordered_split import OrderedSplit
from fastsitch.activations.represent import PASS_IMAGES
from fastsitch.chains.layout import stored_size
from fastsitch.stitching.geometry import Geometry, Operand, stitch_inputs

Size = tuple[int, ...]
"""A shape without its channels: rows and columns of a map; see :mod:`fastsitch.chains.layout`."""

_STRIPES, _LEAST_STRIPE = 8, 64
"""X'X is symmetric: it is computed in stripes of rows, each from its diagonal on."""

_SLICE_ROWS, _THIN = 1024, 32
"""A product of so many times more rows than columns runs in slices side by side: a GEMM alone would use one core."""


def chunk_images(device: torch.device) -> int:
    """Images per product: cache-sized on a CPU, on CUDA enough to fill the device.

    A divisor of what an ordered split gives at a time: 1,024 images from a store, 256 from a network that runs live.
    """
    return PASS_IMAGES if device.type == "cuda" else 64


class ExpectedRows:
    """The expected rows of a chunk at some receiver positions, those of one size side by side, and their sums so far.

    Sizes are keys everywhere. ``columns[j]`` are the columns of receiver position j; ``shift_D``, ``sum_D`` and
    ``squares_D`` hold what was subtracted, and the sums of what was left and of its squares.
    """

    def __init__(self, split: OrderedSplit, device: torch.device, positions: Iterable[int]) -> None:
        self._split = split
        self._device = device
        self._positions: dict[Size, list[int]] = {}
        self.columns: dict[int, slice] = {}
        for j in positions:
            channels, *size = split.shapes[j]
            members = self._positions.setdefault(tuple(size), [])
            first = self.columns[members[-1]].stop if members else 0
            self.columns[j] = slice(first, first + channels)
            members.append(j)
        self._buffers: dict[Size, Tensor] = {}
        self._chunk: dict[tuple[Size, int], Tensor] = {}
        self.shift_D: dict[Size, Tensor] = {}
        self.sum_D: dict[Size, Tensor] = {}
        self.squares_D: dict[Size, Tensor] = {}

    def load(self, start: int, stop: int, sizes: Iterable[Size]) -> None:
        """Fetch images start ... stop - 1; the first call has the most images."""
        self._chunk = {}
        for size in sizes:
            members = self._positions[size]
            if size not in self._buffers:
                stored = stored_size(self._split.shapes[members[0]])
                shape = (stop - start, *stored, self.columns[members[-1]].stop)
                self._buffers[size] = torch.empty(shape, dtype=torch.float64, device=self._device)
            y_NPQD = self._buffers[size][: stop - start]
            for j in members:
                y_NPQD[..., self.columns[j]].copy_(self._split.images(j, start, stop))
            rows = y_NPQD.flatten(0, 2)
            if size not in self.shift_D:
                self.shift_D[size] = rows.mean(0)
            rows -= self.shift_D[size]
            self.sum_D[size] = self.sum_D.get(size, 0) + rows.sum(0)
            self.squares_D[size] = self.squares_D.get(size, 0) + rows.square().sum(0)
            self._chunk[size, 1] = y_NPQD

    def rows(self, size: Size, up: int) -> Tensor:
        """(M, D): the expected values, averaged over the up x up cells that share a row."""
        if (size, up) not in self._chunk:
            # channels-last, so that the average is a pass over contiguous channels
            averaged = F.avg_pool2d(self._chunk[size, 1].permute(0, 3, 1, 2), up)
            self._chunk[size, up] = averaged.permute(0, 2, 3, 1)
        return self._chunk[size, up].flatten(0, 2)


class Products:
    """Running sums over images for one sender position and operand: X'X (if ``squared``) and X'Y.

    ``rows``, ``shift_F``, ``sum_F``, ``products_FF`` (on and above the diagonal) and ``cross`` (F, D) per receiver
    size are the result, before centring.
    """

    def __init__(
        self, i: int, operand: Operand, targets: Mapping[int, Geometry], *, squared: bool, device: torch.device
    ) -> None:
        self.i = i
        self.operand = operand
        self.targets = targets
        self._sender = next(iter(targets.values())).sender
        self.up: dict[Size, int] = {geometry.receiver[1:]: geometry.up for geometry in targets.values()}
        features = next(iter(targets.values())).features

        def zeros(rows: int, columns: int) -> Tensor:
            return torch.zeros(rows, columns, dtype=torch.float64, device=device)

        self.rows = 0
        self.shift_F: Tensor | None = None
        self.sum_F = torch.zeros(features, dtype=torch.float64, device=device)
        self.products_FF = zeros(features, features) if squared else None
        self.cross: dict[Size, Tensor] = {}
        for size in self.up:
            width = sum(geometry.receiver[0] for geometry in targets.values() if geometry.receiver[1:] == size)
            # a GEMM with fewer rows than columns is faster than its transpose
            self.cross[size] = zeros(width, features).T if width < features else zeros(features, width)
        self._buffer: Tensor | None = None

    def add(self, x_NHWC: Tensor, expected: ExpectedRows) -> None:
        """Add a chunk, the one that ``expected`` holds; the first one has the most images."""
        provided_MF = stitch_inputs(x_NHWC, self._sender, self.operand).flatten(0, 2)
        if self.shift_F is None:
            self.shift_F = provided_MF.mean(0, dtype=torch.float64)
            self._buffer = torch.empty_like(provided_MF, dtype=torch.float64)
        assert self._buffer is not None
        x_MF = self._buffer[: len(provided_MF)].copy_(provided_MF).sub_(self.shift_F)
        self.rows += len(x_MF)
        self.sum_F += x_MF.sum(0)
        if self.products_FF is not None:
            features = x_MF.shape[1]
            step = max(_LEAST_STRIPE, features // _STRIPES)
            for start in range(0, features, step):
                stripe = slice(start, start + step)
                _add_product(self.products_FF[stripe, start:], x_MF[:, stripe], x_MF[:, start:])
        for size, up in self.up.items():
            y_MD, cross_FD = expected.rows(size, up), self.cross[size]
            if y_MD.shape[1] < x_MF.shape[1]:
                _add_product(cross_FD.T, y_MD, x_MF)
            else:
                _add_product(cross_FD, x_MF, y_MD)

    def release(self) -> None:
        """Free the working memory."""
        self._buffer = None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to ``total``."""
    rows = len(left)
    if rows % _SLICE_ROWS or rows < _THIN * max(total.shape):
        total.addmm_(left.T, right)
        return
    slices = (rows // _SLICE_ROWS, _SLICE_ROWS, -1)
    total += torch.bmm(left.view(slices).mT, right.view(slices)).sum(0)
