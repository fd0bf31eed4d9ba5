"""Segments of a receiver whose BatchNorm has statistics per stitch; see ``contract.FrozenSegment`` for the contract.

Unlike those of a frozen network, ``forward`` and ``infer`` differ: the first normalises by batch statistics, as while
stitches are trained, the second by the running statistics. Convolutions see many stitches at a time, in micro-batches
of whole stitches.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastsitch.errors import NetworkError
from fastsitch.networks.resnet import BasicBlock
from fastsitch.receivers.batch_statistics_norm import BATCH, USE_FROZEN, NormWeights, StitchNorm
from fastsitch.receivers.contract import FrozenSegment, Saved
from fastsitch.receivers.convolution import convolve, input_gradient, projection_gradient, projection_rows
from fastsitch.receivers.frozen_segments import frozen_copy
from fastsitch.receivers.residual_block import CHUNK_BYTES, write_gradient


class StitchSegment(FrozenSegment, Protocol):
    """A segment with one StitchNorm per BatchNorm layer, by the layer's name in the segment."""

    @property
    def norms(self) -> dict[str, StitchNorm]: ...


class SegmentWeights(Protocol):
    """What all groups of stitches share: the weights of a segment."""

    def for_stitches(self, stitches: int) -> StitchSegment:
        """The segment as so many stitches pass it."""
        ...


def segment_weights(segment: nn.Module, dtype: torch.dtype, device: torch.device) -> SegmentWeights:
    """Frozen copies of a segment's weights; raises NetworkError for BatchNorm of a kind other than nn.BatchNorm2d."""
    if isinstance(segment, BasicBlock):
        return UnfoldedBlock.of(segment, dtype, device)
    return UnfoldedModule(segment, dtype, device)


@dataclass(frozen=True)
class UnfoldedBlock:
    """A basic block's convolutions without BatchNorm, and its BatchNorm layers by name."""

    stride: int
    w1: Tensor
    w2: Tensor
    projection: Tensor | None
    rows: Tensor | None
    """Of the projection, for its gradient."""
    norms: dict[str, NormWeights]

    @classmethod
    def of(cls, block: BasicBlock, dtype: torch.dtype, device: torch.device) -> "UnfoldedBlock":
        def weight(conv: nn.Module) -> Tensor:
            tensor = cast(nn.Conv2d, conv).weight.detach()
            return tensor.to(device, dtype, copy=True).contiguous(memory_format=torch.channels_last)

        stride = block.conv1.stride[0]
        projection = None if block.projection is None else weight(block.projection[0])
        rows = None if projection is None else projection_rows(projection, stride)
        norms = norm_weights(block, dtype, device)
        return cls(stride, weight(block.conv1), weight(block.conv2), projection, rows, norms)

    def for_stitches(self, stitches: int) -> "StitchBlock":
        return StitchBlock(self, stitches)


class StitchBlock:
    """A basic block as many stitches pass it; keeps what goes into each BatchNorm layer."""

    rectifies = True
    keeps_input = True

    def __init__(self, weights: UnfoldedBlock, stitches: int) -> None:
        self.weights = weights
        self.stitches = stitches
        self.norms = {name: StitchNorm(norm, stitches) for name, norm in weights.norms.items()}
        self._bn1, self._bn2 = self.norms["bn1"], self.norms["bn2"]
        self._projected = self.norms.get("projection.1")

    def infer(self, x: Tensor, out: Tensor, samples: int) -> None:
        w, images = self.weights, samples // self.stitches
        for first, chunk in stitch_batches(x, out, self.stitches, images):
            hidden = torch.empty_like(out[chunk])
            self._bn1.infer(convolve(x[chunk], w.w1, None, w.stride), hidden, first, images)
            self._bn2.infer(convolve(hidden.relu_(), w.w2, None, 1), hidden, first, images)
            if self._projected is None:
                hidden += x[chunk]
            else:
                shortcut = torch.empty_like(hidden)
                _project(w, x[chunk], shortcut)
                self._projected.infer(shortcut, shortcut, first, images)
                hidden += shortcut
            torch.clamp_min(hidden, 0, out=out[chunk])

    def memory(self, out: Tensor) -> Saved:
        return [torch.empty_like(out) for _ in self.norms]

    def forward(self, x: Tensor, out: Tensor, saved: Saved, samples: int) -> None:
        w, images = self.weights, samples // self.stitches
        for first, chunk in stitch_batches(x, out, self.stitches, images):
            y1, y2 = saved[0][chunk], saved[1][chunk]
            y1.copy_(convolve(x[chunk], w.w1, None, w.stride))
            hidden = torch.empty_like(y1)
            self._bn1.forward(y1, hidden, first, images)
            y2.copy_(convolve(hidden.relu_(), w.w2, None, 1))
            self._bn2.forward(y2, hidden, first, images)
            if self._projected is None:
                hidden += x[chunk]
            else:
                shortcut = torch.empty_like(hidden)
                _project(w, x[chunk], saved[2][chunk])
                self._projected.forward(saved[2][chunk], shortcut, first, images)
                hidden += shortcut
            torch.clamp_min(hidden, 0, out=out[chunk])

    def backward(self, g: Tensor, x: Tensor, saved: Saved, samples: int, rectified: int) -> None:
        w, images = self.weights, samples // self.stitches
        for first, chunk in stitch_batches(x, g, self.stitches, images):
            y1, y2 = saved[0][chunk], saved[1][chunk]
            g_y = torch.empty_like(y2)
            self._bn2.backward(g[chunk], y2, g_y, first, images)
            g_y = input_gradient(g_y, y1, w.w2, 1)
            self._bn1.backward(g_y, y1, g_y, first, images, relu=True)
            g_x = input_gradient(g_y, x[chunk], w.w1, w.stride)
            shortcut = g[chunk]
            if self._projected is not None:
                assert w.rows is not None
                self._projected.backward(g[chunk], saved[2][chunk], g_y, first, images)
                shortcut = projection_gradient(g_y, w.rows, w.stride, x.shape[3])
            write_gradient(x[chunk], g_x, rectified - chunk.start, shortcut, w.stride)


def _project(w: UnfoldedBlock, x: Tensor, y: Tensor) -> None:
    """Write the projection of x into y, which is contiguous in channels-last memory: one GEMM."""
    assert w.projection is not None
    rows = x.permute(0, 2, 3, 1)[:, :: w.stride, :: w.stride].reshape(-1, x.shape[1])
    torch.mm(rows, w.projection[:, :, 0, 0].t(), out=y.permute(0, 2, 3, 1).view(-1, y.shape[1]))


class UnfoldedModule:
    """Any other segment: a frozen copy, and its BatchNorm layers by name."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.norms = norm_weights(module, dtype, device)
        self.module = frozen_copy(module, dtype, device)

    def for_stitches(self, stitches: int) -> "StitchModule":
        return StitchModule(self, stitches)


class StitchModule:
    """Any other segment as many stitches pass it, differentiated by autograd."""

    rectifies = False
    keeps_input = True

    def __init__(self, weights: UnfoldedModule, stitches: int) -> None:
        self.stitches = stitches
        self.norms = {name: StitchNorm(norm, stitches) for name, norm in weights.norms.items()}
        self._layers = {name: _NormLayer(norm) for name, norm in self.norms.items()}
        # only the layers that are replaced are new: all else is shared with other groups
        memo = {id(tensor): tensor for tensor in (*weights.module.parameters(), *weights.module.buffers())}
        module = copy.deepcopy(weights.module, memo)
        for name, layer in self._layers.items():
            if name:
                module.set_submodule(name, layer)
        self._module: nn.Module = self._layers.get("", module)

    def infer(self, x: Tensor, out: Tensor, samples: int) -> None:
        images = samples // self.stitches
        with torch.no_grad():
            for first, chunk in stitch_batches(x, out, self.stitches, images):
                out[chunk].copy_(self._run(x[chunk], first, images, batch=False))

    def memory(self, out: Tensor) -> Saved:
        return []

    def forward(self, x: Tensor, out: Tensor, saved: Saved, samples: int) -> None:
        images = samples // self.stitches
        saved.clear()
        for first, chunk in stitch_batches(x, out, self.stitches, images):
            with torch.enable_grad():
                # unlike detach(), data ignores that other samples of x are overwritten before its gradient is taken
                leaf = x[chunk].data.requires_grad_()
                y = self._run(leaf, first, images, batch=True)
            out[chunk].copy_(y.detach())
            saved += [leaf, y]

    def backward(self, g: Tensor, x: Tensor, saved: Saved, samples: int, rectified: int) -> None:
        batches = stitch_batches(x, g, self.stitches, samples // self.stitches)
        for (_, chunk), leaf, y in zip(batches, saved[::2], saved[1::2], strict=True):
            write_gradient(x[chunk], torch.autograd.grad(y, leaf, g[chunk])[0], rectified - chunk.start)
        saved.clear()

    def _run(self, x: Tensor, first: int, images: int, *, batch: bool) -> Tensor:
        for layer in self._layers.values():
            layer.first, layer.images, layer.batch = first, images, batch
        return cast(Tensor, self._module(x))


class _NormLayer(nn.Module):
    """Replaces nn.BatchNorm2d; before every pass ``first`` and ``images`` are set to the stitches that it sees."""

    def __init__(self, norm: StitchNorm) -> None:
        super().__init__()
        self.norm = norm
        self.first = 0
        self.images = 1
        self.batch = False

    def forward(self, y: Tensor) -> Tensor:
        return self.norm.differentiable(y, self.first, self.images, batch=self.batch)


def norm_weights(segment: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, NormWeights]:
    """Every BatchNorm layer of a segment by name; raises NetworkError for a kind other than nn.BatchNorm2d."""
    named = segment.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in named if isinstance(module, _BatchNorm)}
    if len({id(layer) for layer in layers.values()}) < len(layers):
        raise NetworkError(
            f"{BATCH}: a BatchNorm layer is used more than once ({', '.join(layers)}): expected one layer for each "
            f"use; {USE_FROZEN}"
        )
    for layer in layers.values():
        if not isinstance(layer, nn.BatchNorm2d):
            raise NetworkError(f"{BATCH}: expected BatchNorm2d layers, found {type(layer).__name__}; {USE_FROZEN}")
    return {name: NormWeights.of(cast(nn.BatchNorm2d, layer), dtype, device) for name, layer in layers.items()}


def stitch_batches(x: Tensor, out: Tensor, stitches: int, images: int) -> Iterator[tuple[int, slice]]:
    """Micro-batches of whole stitches, about CHUNK_BYTES each: their first stitch, and their samples."""
    largest = max(x[0].numel(), out[0].numel()) * x.element_size()
    step = max(1, CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cpu"]) // (largest * images))
    for first in range(0, stitches, step):
        yield first, slice(first * images, min(first + step, stitches) * images)
