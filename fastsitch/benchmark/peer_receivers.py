"""The receiver as a careful user would write it in plain torch: frozen, differentiated by autograd.

Peers use it, and the engine is checked against it. BatchNorm of small ResNets is folded, which is all that it shares
with the engine; any other network is taken as it is.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.chains.chain import Chain
from fastsitch.networks.resnet import BasicBlock, Classifier, SmallResNet
from fastsitch.receivers.convolution import accumulation_dtype, fold_batchnorm
from fastsitch.receivers.frozen_segments import frozen_copy


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


class PeerTail(nn.Module):
    """Everything behind position 0: ``blocks[p - 1]`` leads to position p, ``classify`` from the last to logits."""

    def __init__(self, chain: Chain, dtype: torch.dtype) -> None:
        super().__init__()
        self.accumulation = accumulation_dtype(dtype)
        frozen = frozen_copy(chain, dtype, next(chain.parameters()).device)
        assert isinstance(frozen, Chain)
        self.blocks = nn.ModuleList(frozen.segments[1:])
        self._head = frozen.head

    def classify(self, x: Tensor) -> Tensor:
        """Logits (B, classes), in the accumulation dtype."""
        return cast(Tensor, self._head(x)).to(self.accumulation)

    def forward(self, x: Tensor, j: int) -> Tensor:
        """Logits (B, classes) when ``x`` stands for the output of position ``j``."""
        for block in list(self.blocks)[j:]:
            x = block(x)
        return self.classify(x)


class FoldedTail(PeerTail):
    """That of a small ResNet."""

    def __init__(self, chain: SmallResNet, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.accumulation = accumulation_dtype(dtype)
        self.blocks = nn.ModuleList(FoldedBlock(cast(BasicBlock, block), dtype) for block in chain.segments[1:])
        linear = cast(Classifier, chain.head).linear
        self.weight = nn.Parameter(linear.weight.detach().to(self.accumulation, copy=True), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().to(self.accumulation, copy=True), requires_grad=False)

    def classify(self, x: Tensor) -> Tensor:
        return F.linear(x.mean((2, 3), dtype=self.accumulation), self.weight, self.bias)


def peer_tail(chain: Chain, dtype: torch.dtype, device: torch.device) -> PeerTail:
    """The receiver of peers in one dtype on a device."""
    made = FoldedTail(chain, dtype) if isinstance(chain, SmallResNet) else PeerTail(chain, dtype)
    return made.to(device)
