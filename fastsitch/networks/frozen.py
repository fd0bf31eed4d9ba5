"""A network that no longer learns: BatchNorm folded, weights cast once, gradients only of activations.

Tensors are (B, C, H, W) in channels-last memory. Every segment offers three things:
    infer(x, out)             write the segment's output into ``out``
    forward(x, out)           the same, and return what ``backward`` needs beside x and out
    backward(g, x, out, ...)  the gradient for x, given the gradient g of out
"""

import copy
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.networks.chain import Chain, Position
from fastsitch.networks.resnet import BasicBlock, Classifier, Stem

Saved = tuple[Tensor, ...]


class FrozenSegment(Protocol):
    """What the engine asks of a segment; see the module's docstring."""

    def infer(self, x: Tensor, out: Tensor) -> None: ...
    def forward(self, x: Tensor, out: Tensor) -> Saved: ...
    def backward(self, g: Tensor, x: Tensor, out: Tensor, saved: Saved) -> Tensor: ...


class FrozenHead(Protocol):
    """From the last representation to logits in the accumulation dtype, and back."""

    def forward(self, x: Tensor) -> Tensor: ...
    def backward(self, g: Tensor, x: Tensor) -> Tensor: ...


class FrozenNetwork:
    """The frozen form of a chain, in one dtype on one device.

    BatchNorm is folded into the convolutions in fp32 (fp64 for a chain in fp64), then cast. Networks other than the
    small ResNets run as they are, through autograd. The chain itself is only read.
    """

    def __init__(self, chain: Chain, *, dtype: torch.dtype, device: torch.device) -> None:
        self.positions: tuple[Position, ...] = chain.positions
        self.dtype = dtype
        self.device = device
        self.segments: list[FrozenSegment] = [_freeze(segment, dtype, device) for segment in chain.segments]
        self.head = _freeze_head(chain.head, dtype, device)

    def representations(self, x: Tensor) -> list[Tensor]:
        """The representation at every position; x is cast to the network's dtype."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        outputs = []
        for segment, position in zip(self.segments, self.positions, strict=True):
            out = channels_last(x.shape[0], position.shape, self.dtype, self.device)
            segment.infer(x, out)
            outputs.append(out)
            x = out
        return outputs

    def tail(self, x: Tensor, j: int) -> Tensor:
        """Logits when ``x`` stands for the output of position ``j``."""
        for segment, position in zip(self.segments[j + 1 :], self.positions[j + 1 :], strict=True):
            out = channels_last(x.shape[0], position.shape, self.dtype, self.device)
            segment.infer(x, out)
            x = out
        return self.head.forward(x)


def channels_last(images: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (images, C, H, W) tensor in channels-last memory."""
    channels, height, width = shape
    return torch.empty(images, height, width, channels, dtype=dtype, device=device).permute(0, 3, 1, 2)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, losses and master parameters: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Conv:
    """A frozen convolution with BatchNorm folded in."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype, device: torch.device) -> None:
        weight, self.bias_exact = fold_batchnorm(conv, bn)
        self.weight = weight.to(device, dtype).contiguous(memory_format=torch.channels_last)
        self.bias: Tensor | None = self.bias_exact.to(device, dtype)
        self.stride = [conv.stride[0], conv.stride[1]]
        self.padding = [cast(int, conv.padding[0]), cast(int, conv.padding[1])]

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def backward(self, g: Tensor, x: Tensor) -> Tensor:
        gradient: Tensor = torch.ops.aten.convolution_backward(
            g, x, self.weight, None, self.stride, self.padding, [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]
        return gradient


class _FrozenStem:
    def __init__(self, stem: Stem, dtype: torch.dtype, device: torch.device) -> None:
        self.conv = _Conv(stem.conv, stem.bn, dtype, device)

    def infer(self, x: Tensor, out: Tensor) -> None:
        torch.clamp_min(self.conv(x), 0, out=out)

    def forward(self, x: Tensor, out: Tensor) -> Saved:
        self.infer(x, out)
        return ()

    def backward(self, g: Tensor, x: Tensor, out: Tensor, saved: Saved) -> Tensor:
        return self.conv.backward(_through_relu(g, out), x)


class FrozenBlock:
    """A basic block; the gradient needs only the outputs of its two ReLUs, which are the inputs of what follows."""

    def __init__(self, block: BasicBlock, dtype: torch.dtype, device: torch.device) -> None:
        self.conv1 = _Conv(block.conv1, block.bn1, dtype, device)
        self.conv2 = _Conv(block.conv2, block.bn2, dtype, device)
        self.projection: _Conv | None = None
        if block.projection is not None:
            conv, bn = block.projection
            self.projection = _Conv(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, bn), dtype, device)
            # both branches are added, so one bias serves them
            self.conv2.bias = (self.conv2.bias_exact + self.projection.bias_exact).to(device, dtype)
            self.projection.bias = None

    def infer(self, x: Tensor, out: Tensor) -> None:
        self.forward(x, out)

    def forward(self, x: Tensor, out: Tensor) -> Saved:
        hidden = self.conv1(x).relu_()
        y = self.conv2(hidden)
        y += x if self.projection is None else self.projection(x)
        torch.clamp_min(y, 0, out=out)
        return (hidden,)

    def backward(self, g: Tensor, x: Tensor, out: Tensor, saved: Saved) -> Tensor:
        (hidden,) = saved
        g = _through_relu(g, out)
        g_hidden = _through_relu(self.conv2.backward(g, hidden), hidden)
        g_x = self.conv1.backward(g_hidden, x)
        g_x += g if self.projection is None else self.projection.backward(g, x)
        return g_x


class _AutogradSegment:
    """Any other segment: a frozen copy, differentiated by autograd."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.module = _frozen_copy(module, dtype, device)

    def infer(self, x: Tensor, out: Tensor) -> None:
        with torch.no_grad():
            out.copy_(self.module(x))

    def forward(self, x: Tensor, out: Tensor) -> Saved:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = self.module(leaf)
        out.copy_(y.detach())
        return (leaf, y)

    def backward(self, g: Tensor, x: Tensor, out: Tensor, saved: Saved) -> Tensor:
        leaf, y = saved
        gradient = torch.autograd.grad(y, leaf, g)[0]
        return gradient.contiguous(memory_format=torch.channels_last)


class _FrozenClassifier:
    def __init__(self, head: Classifier, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = accumulation_dtype(dtype)
        self.weight = head.linear.weight.detach().to(device, self.dtype, copy=True)
        self.bias = head.linear.bias.detach().to(device, self.dtype, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.mean((2, 3), dtype=self.dtype), self.weight, self.bias)

    def backward(self, g: Tensor, x: Tensor) -> Tensor:
        pooled = (g @ self.weight) / (x.shape[2] * x.shape[3])
        out = torch.empty_like(x)
        return out.copy_(pooled[:, :, None, None].expand_as(x))


class _AutogradHead:
    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = accumulation_dtype(dtype)
        self.module = _frozen_copy(module, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, self.module(x)).to(self.dtype)

    def backward(self, g: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = self.module(leaf)
        gradient = torch.autograd.grad(logits, leaf, g.to(logits.dtype))[0]
        return gradient.contiguous(memory_format=torch.channels_last)


def fold_batchnorm(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals ``conv`` followed by ``bn`` in eval mode, at least in fp32."""
    dtype = accumulation_dtype(conv.weight.dtype)
    mean, variance = cast(Tensor, bn.running_mean).to(dtype), cast(Tensor, bn.running_var).to(dtype)
    scale = bn.weight.detach().to(dtype) * torch.rsqrt(variance + bn.eps)
    weight = conv.weight.detach().to(dtype) * scale[:, None, None, None]
    bias = bn.bias.detach().to(dtype) - mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias.detach().to(dtype) * scale
    return weight, bias


def _through_relu(g: Tensor, output: Tensor) -> Tensor:
    gradient: Tensor = torch.ops.aten.threshold_backward(g, output, 0)
    return gradient


def _frozen_copy(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    return copy.deepcopy(module).to(device, dtype).eval().requires_grad_(False)


def _freeze(segment: nn.Module, dtype: torch.dtype, device: torch.device) -> FrozenSegment:
    if isinstance(segment, Stem):
        return _FrozenStem(segment, dtype, device)
    if isinstance(segment, BasicBlock):
        return FrozenBlock(segment, dtype, device)
    return _AutogradSegment(segment, dtype, device)


def _freeze_head(head: nn.Module, dtype: torch.dtype, device: torch.device) -> FrozenHead:
    return (
        _FrozenClassifier(head, dtype, device) if isinstance(head, Classifier) else _AutogradHead(head, dtype, device)
    )
