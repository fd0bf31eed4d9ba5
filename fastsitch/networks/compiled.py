"""Residual blocks through torch.compile: one graph per block shape serves every receiver and every group.

Weights are arguments, and images come in micro-batches of a fixed number (the last one padded), so that neither the
network nor the number of stitches makes another graph.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsitch.networks.frozen import FrozenBlock, FrozenNetwork, Saved

BACKEND = "inductor"

_MOST_GRAPHS = 64
"""Graphs per function: block shapes times dtypes of everything that one process ever compiles."""


def compile_blocks(network: FrozenNetwork) -> FrozenNetwork:
    """Let torch.compile generate the passes of all residual blocks of ``network``; other segments stay as they are."""
    images = micro_batch(network.device)
    network.segments = [
        CompiledBlock(segment, images) if isinstance(segment, FrozenBlock) else segment for segment in network.segments
    ]
    return network


def micro_batch(device: torch.device) -> int:
    """Images per micro-batch: enough to fill a GPU, small enough for a CPU's cache."""
    return 2048 if device.type == "cuda" else 256


class CompiledBlock:
    """A frozen block whose passes are compiled; the same interface and, up to rounding, the same values."""

    def __init__(self, block: FrozenBlock, images: int) -> None:
        self.images = images
        self._stride = block.conv1.stride[0]
        projection = block.projection.weight if block.projection is not None else None
        self._weights = (block.conv1.weight, block.conv1.bias, block.conv2.weight, block.conv2.bias, projection)
        self._gradient_weights = (block.conv1.weight, block.conv2.weight, projection)

    def infer(self, x: Tensor, out: Tensor) -> None:
        self.forward(x, out)

    def forward(self, x: Tensor, out: Tensor) -> Saved:
        hidden = torch.empty_like(out)
        self._in_micro_batches(_forward, (x,), (hidden, out), self._weights)
        return (hidden,)

    def backward(self, g: Tensor, x: Tensor, out: Tensor, saved: Saved) -> Tensor:
        g_x = torch.empty_like(x)
        self._in_micro_batches(_backward, (g, x, out, *saved), (g_x,), self._gradient_weights)
        return g_x

    def _in_micro_batches(
        self,
        function: Callable[..., Any],
        read: tuple[Tensor, ...],
        written: tuple[Tensor, ...],
        weights: tuple[Tensor | None, ...],
    ) -> None:
        """Call ``function(stride, *read, *written, *weights)`` on slices of ``self.images`` samples."""
        run = _compiled(function)
        samples = read[0].shape[0]
        for start in range(0, samples, self.images):
            end = min(start + self.images, samples)
            if end - start == self.images:
                run(self._stride, *(t[start:end] for t in read), *(t[start:end] for t in written), *weights)
                continue
            padded = [_padded(tensor[start:end], self.images) for tensor in read]
            results = [_padded(tensor[start:start], self.images) for tensor in written]
            run(self._stride, *padded, *results, *weights)
            for tensor, result in zip(written, results, strict=True):
                tensor[start:end].copy_(result[: end - start])


def _forward(
    stride: int,
    x: Tensor,
    hidden: Tensor,
    out: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    projection: Tensor | None,
) -> None:
    inner = F.conv2d(x, w1, b1, stride, 1).clamp_min(0)
    shortcut = x if projection is None else F.conv2d(x, projection, None, stride)
    hidden.copy_(inner)
    out.copy_((F.conv2d(inner, w2, b2, 1, 1) + shortcut).clamp_min(0))


def _backward(
    stride: int,
    g: Tensor,
    x: Tensor,
    out: Tensor,
    hidden: Tensor,
    g_x: Tensor,
    w1: Tensor,
    w2: Tensor,
    projection: Tensor | None,
) -> None:
    g = torch.ops.aten.threshold_backward(g, out, 0)
    g_hidden = torch.ops.aten.threshold_backward(_input_gradient(g, hidden, w2, 1, 1), hidden, 0)
    shortcut = g if projection is None else _input_gradient(g, x, projection, stride, 0)
    g_x.copy_(_input_gradient(g_hidden, x, w1, stride, 1) + shortcut)


def _input_gradient(g: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    gradient: Tensor = torch.ops.aten.convolution_backward(
        g, x, weight, None, [stride, stride], [padding, padding], [1, 1], False, [0, 0], 1, [True, False, False]
    )[0]
    return gradient


_cache: dict[Callable[..., Any], Callable[..., Any]] = {}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    if function not in _cache:
        import torch._dynamo

        # beyond its limit dynamo would run the function uncompiled, without a word
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        _cache[function] = torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND)
    return _cache[function]


def _padded(tensor: Tensor, images: int) -> Tensor:
    """The samples of ``tensor`` followed by zeros, in channels-last memory."""
    _, channels, height, width = tensor.shape
    whole = torch.zeros(images, height, width, channels, dtype=tensor.dtype, device=tensor.device).permute(0, 3, 1, 2)
    whole[: tensor.shape[0]].copy_(tensor)
    return whole
