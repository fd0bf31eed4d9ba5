"""Stitches trained one at a time: the published way, and a well-tuned loop."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.benchmark.bench_pair import BenchPair
from fastsitch.benchmark.peer_receivers import peer_tail
from fastsitch.chains.chain import Chain
from fastsitch.chains.layout import grid_rows, index_among_equal_shapes
from fastsitch.chains.module_copies import copy_modules
from fastsitch.chains.position import Position
from fastsitch.kernels.reference import gemm_weight
from fastsitch.networks.strided_gradients import steady_convolution, wants_steadiness
from fastsitch.receivers.convolution import accumulation_dtype
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.geometry import Geometry
from fastsitch.stitching.stitch_bank import initial_stitch

LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 0.01

Stitches = dict[Cell, tuple[Tensor, Tensor]]
"""Per cell the weight (F, D) and bias (D,), as the bank has them."""


class Stitch(nn.Module):
    """One stitch by its definition: nearest upsampling, then a convolution. Parameters are fp32 (fp64 in fp64).

    Where shapes ask for more (tokens beside a grid, other sizes of grids), rows are aligned first, and the convolution
    is a linear map of rows. ``position`` is the receiver's.
    """

    def __init__(self, cell: Cell, geometry: Geometry, position: Position, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = initial_stitch(cell, geometry)
        self.geometry = geometry
        self.position = position
        self.weight = nn.Parameter(weight.to(accumulation_dtype(dtype)))
        self.bias = nn.Parameter(bias.to(accumulation_dtype(dtype)))

    def forward(self, x_NHWC: Tensor) -> Tensor:
        """Rows of the sender's representation (N, rows, columns, C) -> the receiver's, as its network uses it."""
        return apply_stitch(self.geometry, self.position, x_NHWC, self.weight, self.bias)


def apply_stitch(geometry: Geometry, position: Position, x_NHWC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A stitch with a convolution's weight (D, C, k, k), cast to the dtype of x."""
    weight, bias = weight.to(x_NHWC.dtype), bias.to(x_NHWC.dtype)
    if geometry.alignment is not None:
        rows = F.linear(geometry.inputs(x_NHWC), gemm_weight(weight).t(), bias)
    else:
        x = grid_rows(x_NHWC, geometry.sender).permute(0, 3, 1, 2)
        if geometry.up > 1:
            x = F.interpolate(x, scale_factor=geometry.up, mode="nearest")
        convolve = steady_convolution if _STEADY.get() else F.conv2d
        y: Tensor = convolve(x, weight, bias, geometry.down)
        if position.layout == "map":
            return y
        rows = y.permute(0, 2, 3, 1)
    return position.to_raw(rows.contiguous())


_STEADY = ContextVar("_STEADY", default=False)


@contextmanager
def untimed(device: torch.device) -> Iterator[None]:
    """For steps that nobody times: beside other busy programs they take their fair time, not thirty times as long."""
    token = _STEADY.set(wants_steadiness(device))
    try:
        yield
    finally:
        _STEADY.reset(token)


Logits = Callable[[Cell, Stitch, Tensor], Tensor]
"""logits(cell, stitch, index of the images) -> (B, classes)."""


class OneByOne:
    """Every cell by itself, through autograd, with an optimizer of its own."""

    def __init__(self, pair: BenchPair, cells: Sequence[Cell], logits: Logits, frozen: Sequence[nn.Module]) -> None:
        self._labels = pair.source.train.labels
        self._logits = logits
        self._frozen = frozen
        self._stitches = {cell: new_stitch(pair, cell) for cell in cells}
        self._optimizers = {cell: optimizer(list(stitch.parameters())) for cell, stitch in self._stitches.items()}

    @torch.enable_grad()
    def run(self, batches: Sequence[Tensor]) -> None:
        """One step per batch for the first cell, then for the next."""
        for cell, stitch in self._stitches.items():
            for index in batches:
                loss = F.cross_entropy(self._logits(cell, stitch, index).to(stitch.weight.dtype), self._labels[index])
                self._optimizers[cell].zero_grad(set_to_none=True)
                for network in self._frozen:
                    network.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimizers[cell].step()

    def stitches(self) -> Stitches:
        """What has been learned so far."""
        return {
            cell: (gemm_weight(stitch.weight.detach()), stitch.bias.detach()) for cell, stitch in self._stitches.items()
        }


def published_way(pair: BenchPair, cells: Sequence[Cell], *, mixed: bool) -> OneByOne:
    """As in the study: images pass both networks, whose weights get gradients that nobody uses.

    ``mixed`` is autocast to bf16; otherwise fp32 (fp64 for a pair in fp64).
    """
    sender, receiver = (_unfrozen(chain) for chain in (pair.sender, pair.receiver))
    position = pair.sender.positions

    def logits(cell: Cell, stitch: Stitch, index: Tensor) -> Tensor:
        x = pair.x[index].contiguous()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
            for segment in list(sender.segments)[: cell.i + 1]:
                x = segment(x)
            return receiver.tail(stitch(position[cell.i].to_rows(x)), cell.j)

    return OneByOne(pair, cells, logits, [sender, receiver])


def tuned_loop(pair: BenchPair, cells: Sequence[Cell]) -> OneByOne:
    """A careful loop: stored representations, frozen receiver, channels-last, all in the compute dtype.

    BatchNorm of small ResNets is folded.
    """
    tail = peer_tail(pair.receiver, pair.dtype, pair.device)

    def logits(cell: Cell, stitch: Stitch, index: Tensor) -> Tensor:
        logits: Tensor = tail(stitch(provided(pair, cell.i, index)), cell.j)
        return logits

    return OneByOne(pair, cells, logits, [])


def provided(pair: BenchPair, i: int, index: Tensor) -> Tensor:
    """The rows of the sender's representations of some training images at position i, (B, rows, columns, C)."""
    shapes = pair.source.shapes
    stack = pair.source.train.stack(shapes[i])
    return stack[index_among_equal_shapes(shapes)[i]].index_select(0, index)


def new_stitch(pair: BenchPair, cell: Cell) -> Stitch:
    """A stitch as it begins, on the pair's device."""
    return Stitch(cell, pair.geometry(cell), pair.frozen.positions[cell.j], pair.dtype).to(pair.device)


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.SGD:
    """That of the recipes, at a constant rate."""
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def _unfrozen(chain: Chain) -> Chain:
    """A copy in plain memory format whose weights want gradients, as a network has them after loading."""
    (copied,) = copy_modules([chain])
    nn.Module.to(copied, memory_format=torch.contiguous_format)
    network = copied.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    assert isinstance(network, Chain)
    return network
