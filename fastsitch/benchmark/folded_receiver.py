"""The receiver as a careful user would write it in plain torch: frozen, BatchNorm folded, differentiated by autograd.

Peers use it, and the engine is checked against it; it shares only the folding with the engine.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.networks.resnet import BasicBlock, Classifier, SmallResNet
from fastsitch.receivers.convolution import accumulation_dtype, fold_batchnorm


class FoldedConv(nn.Module):
    """A frozen convolution with BatchNorm folded in; channels-last weight, everything in the compute dtype."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = fold_batchnorm(conv, bn)
        self.weight = nn.Parameter(weight.to(dtype, memory_format=torch.channels_last), requires_grad=False)
        self.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        self.stride = conv.stride[0]
        self.padding = cast(int, conv.padding[0])

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class FoldedBlock(nn.Module):
    """A frozen residual block."""

    def __init__(self, block: BasicBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv1 = FoldedConv(block.conv1, block.bn1, dtype)
        self.conv2 = FoldedConv(block.conv2, block.bn2, dtype)
        self.projection: FoldedConv | None = None
        if block.projection is not None:
            conv, bn = block.projection
            self.projection = FoldedConv(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, bn), dtype)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.projection is None else self.projection(x)
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + shortcut)


class FoldedTail(nn.Module):
    """Everything behind position 0: ``blocks[p - 1]`` leads to position p, the last position to the logits."""

    def __init__(self, chain: SmallResNet, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FoldedBlock(cast(BasicBlock, block), dtype) for block in chain.segments[1:])
        self.accumulation = accumulation_dtype(dtype)
        linear = cast(Classifier, chain.head).linear
        self.weight = nn.Parameter(linear.weight.detach().to(self.accumulation, copy=True), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().to(self.accumulation, copy=True), requires_grad=False)

    def forward(self, x: Tensor, j: int) -> Tensor:
        """Logits (B, classes) when ``x`` stands for the output of position ``j``."""
        for block in list(self.blocks)[j:]:
            x = block(x)
        return F.linear(x.mean((2, 3), dtype=self.accumulation), self.weight, self.bias)
