"""Frozen residual blocks: forward and activation gradient without autograd, in micro-batches.

Two forms with the same values. FrozenBlock keeps the outputs of its ReLUs, which is the fastest on CPUs. MaskedBlock
keeps one bit per element of a ReLU and no activation at all: the form for GPUs, where memory decides how many
stitches share a pass, and for torch.compile. The contract of both is that of ``contract.FrozenSegment``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastsitch.networks.resnet import BasicBlock
from fastsitch.receivers.contract import Saved
from fastsitch.receivers.convolution import (
    add_projection,
    convolve,
    folded,
    input_gradient,
    projection_gradient,
    projection_rows,
)
from fastsitch.receivers.relu_mask import apply_mask, mask_bytes, pack_mask

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
"""Micro-batches where nothing fixes their size. On a CPU what they allocate stays in the cache and in the allocator's
pool; a GPU wants to be filled."""


@dataclass(frozen=True)
class BlockWeights:
    """A basic block with BatchNorm folded in; one bias serves both branches, which are added."""

    stride: int
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    projection: Tensor | None
    rows: Tensor | None
    """Of the projection, for its gradient."""

    @classmethod
    def of(cls, block: BasicBlock, dtype: torch.dtype, device: torch.device) -> "BlockWeights":
        w1, b1 = folded(block.conv1, block.bn1, dtype, device)
        w2, b2 = folded(block.conv2, block.bn2, dtype, device)
        projection = rows = None
        stride = block.conv1.stride[0]
        if block.projection is not None:
            conv, bn = block.projection
            projection, bias = folded(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, bn), dtype, device)
            rows = projection_rows(projection, stride)
            b2 = b2 + bias
        return cls(stride, w1, b1.to(device, dtype), w2, b2.to(device, dtype), projection, rows)


class FrozenBlock:
    """Keeps the output of the inner ReLU; that of the last one is the input of what follows."""

    rectifies = True
    keeps_input = True

    def __init__(self, block: BasicBlock, dtype: torch.dtype, device: torch.device) -> None:
        self.weights = BlockWeights.of(block, dtype, device)

    def infer(self, x: Tensor, out: Tensor, samples: int) -> None:
        _infer(self.weights, x, out, samples)

    def memory(self, out: Tensor) -> Saved:
        return [torch.empty_like(out)]

    def forward(self, x: Tensor, out: Tensor, saved: Saved, samples: int) -> None:
        (hidden,) = saved
        for chunk in micro_batches(x, out, samples):
            inner = convolve(x[chunk], self.weights.w1, self.weights.b1, self.weights.stride)
            _second_half(self.weights, torch.clamp_min(inner, 0, out=hidden[chunk]), x[chunk], out[chunk])

    def backward(self, g: Tensor, x: Tensor, saved: Saved, samples: int, rectified: int) -> None:
        (hidden,) = saved
        w = self.weights
        for chunk in micro_batches(x, g, samples):
            g_hidden = input_gradient(g[chunk], hidden[chunk], w.w2, 1)
            torch.ops.aten.threshold_backward(g_hidden, hidden[chunk], 0, grad_input=g_hidden)
            g_x = input_gradient(g_hidden, x[chunk], w.w1, w.stride)
            shortcut = g[chunk] if w.rows is None else projection_gradient(g[chunk], w.rows, w.stride, x.shape[3])
            write_gradient(x[chunk], g_x, rectified - chunk.start, shortcut, w.stride)


class MaskedBlock:
    """Keeps one bit per element of its two ReLUs.

    ``images`` fixes the size of the micro-batches, so that each function sees one shape only; then buffers must
    hold whole ones (what the last one computes beyond its samples is never read). ``wrap`` may compile the functions.
    """

    rectifies = False
    keeps_input = False

    def __init__(
        self,
        weights: BlockWeights,
        images: int | None = None,
        wrap: Callable[[Callable[..., None]], Callable[..., None]] = lambda function: function,
    ) -> None:
        self.weights = weights
        self.images = images
        self._wrap = wrap

    def infer(self, x: Tensor, out: Tensor, samples: int) -> None:
        _infer(self.weights, x, out, samples)

    def memory(self, out: Tensor) -> Saved:
        samples = -(-out.shape[0] // (self.images or 1)) * (self.images or 1)
        size = mask_bytes(out[0].numel())
        return [torch.empty(samples, size, dtype=torch.uint8, device=out.device) for _ in range(2)]

    def forward(self, x: Tensor, out: Tensor, saved: Saved, samples: int) -> None:
        w, run = self.weights, self._wrap(_forward)
        for chunk in micro_batches(x, out, samples, self.images):
            masks = [mask[chunk] for mask in saved]
            run(w.stride, x[chunk], out[chunk], *masks, w.w1, w.b1, w.w2, w.b2, w.projection)

    def backward(self, g: Tensor, x: Tensor, saved: Saved, samples: int, rectified: int) -> None:
        assert rectified == 0, "a receiver is masked as a whole"
        w, run = self.weights, self._wrap(_backward)
        for chunk in micro_batches(x, g, samples, self.images):
            masks = [mask[chunk] for mask in saved]
            run(w.stride, g[chunk], x[chunk], *masks, w.w1, w.w2, w.rows)


def write_gradient(x: Tensor, g_x: Tensor, rectified: int, shortcut: Tensor | None = None, stride: int = 1) -> None:
    """Overwrite x with its gradient; that of a shortcut is added to every ``stride``-th row.

    The first ``rectified`` samples of x are outputs of a ReLU, whose input's gradient is written. ``g_x`` is working
    memory.
    """
    count = min(max(rectified, 0), x.shape[0])
    if count:
        if shortcut is not None:
            g_x[:count, :, ::stride] += shortcut[:count]
        torch.ops.aten.threshold_backward(g_x[:count], x[:count], 0, grad_input=x[:count])
    if count == x.shape[0]:
        return
    if shortcut is None:
        x[count:].copy_(g_x[count:])
        return
    # sum and copy in one pass
    torch.add(g_x[count:, :, ::stride], shortcut[count:], out=x[count:, :, ::stride])
    for row in range(1, stride):
        x[count:, :, row::stride].copy_(g_x[count:, :, row::stride])


def micro_batches(x: Tensor, out: Tensor, samples: int, images: int | None = None) -> Iterator[slice]:
    """Micro-batches: of exactly ``images`` each, or of as many as make up CHUNK_BYTES."""
    largest = max(x[0].numel(), out[0].numel()) * x.element_size()
    step = images or max(8, CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cpu"]) // largest)
    for start in range(0, samples, step):
        yield slice(start, start + step if images else min(start + step, samples))


def _infer(w: BlockWeights, x: Tensor, out: Tensor, samples: int) -> None:
    for chunk in micro_batches(x, out, samples):
        _second_half(w, convolve(x[chunk], w.w1, w.b1, w.stride).relu_(), x[chunk], out[chunk])


def _second_half(w: BlockWeights, hidden: Tensor, x: Tensor, out: Tensor) -> None:
    """From the output of the inner ReLU to that of the block."""
    y = convolve(hidden, w.w2, w.b2, 1).contiguous(memory_format=torch.channels_last)
    if w.projection is None:
        y += x
    else:
        add_projection(y, x, w.projection, w.stride)
    torch.clamp_min(y, 0, out=out)


def _forward(
    stride: int,
    x: Tensor,
    out: Tensor,
    hidden_mask: Tensor,
    out_mask: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    projection: Tensor | None,
) -> None:
    inner = convolve(x, w1, b1, stride)
    shortcut = x if projection is None else convolve(x, projection, None, stride)
    y = convolve(inner.clamp_min(0), w2, b2, 1) + shortcut
    hidden_mask.copy_(pack_mask(inner))
    out_mask.copy_(pack_mask(y))
    out.copy_(y.clamp_min(0))


def _backward(
    stride: int,
    g: Tensor,
    x: Tensor,
    hidden_mask: Tensor,
    out_mask: Tensor,
    w1: Tensor,
    w2: Tensor,
    rows: Tensor | None,
) -> None:
    g = apply_mask(g, out_mask)
    g_hidden = apply_mask(input_gradient(g, g, w2, 1), hidden_mask)
    g_x = input_gradient(g_hidden, x, w1, stride)
    if rows is None:
        g_x = g_x + g
    else:
        g_x[:, :, ::stride] += projection_gradient(g, rows, stride, x.shape[3])
    x.copy_(g_x)
