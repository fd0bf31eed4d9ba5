"""The small residual networks of the published study (CIFAR form: 3x3 stem, no max-pool)."""

import math
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

from fastsitch.chains.chain import Chain
from fastsitch.chains.chain_flops import chain_flops
from fastsitch.chains.layout import Shape


class Stem(nn.Module):
    """3x3 convolution, BatchNorm, ReLU."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, a shortcut (projection where shapes change), ReLU after the addition."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.projection: nn.Sequential | None = None
        if stride != 1 or channels_in != channels:
            self.projection = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.projection is None else self.projection(x)
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + shortcut)


class Classifier(nn.Module):
    """Global average pooling, then one linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.linear(x.mean((2, 3))))


class SmallResNet(Chain):
    """Residual blocks in four stages of width, 2, 4 and 8 times width channels, strides 1, 2, 2, 2.

    Position 0 is the stem, position p the p-th block. Source: Hernandez et al. 2022, section 3.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        *,
        width: int = 64,
        classes: int = 10,
        input_shape: tuple[int, int, int] = (3, 32, 32),
    ) -> None:
        segments: list[nn.Module] = [Stem(input_shape[0], width)]
        names = ["stem"]
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                segments.append(BasicBlock(channels, width << stage, stride))
                names.append(f"layer{stage + 1}.{block}")
                channels = width << stage
        super().__init__(segments, Classifier(channels, classes), names, input_shape)


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Draw new weights by PyTorch's rules for convolutions and linear layers; BatchNorm is the identity.

    The generator lives on the CPU, so a seed gives the same network on every machine.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def position_shapes(blocks: tuple[int, ...], width: int, input_size: tuple[int, int]) -> list[tuple[str, Shape]]:
    """Names and shapes (C, H, W) of all positions, by arithmetic alone."""
    height, breadth = input_size
    shapes: list[tuple[str, Shape]] = [("stem", (width, height, breadth))]
    for stage, count in enumerate(blocks):
        if stage > 0:
            height, breadth = -(-height // 2), -(-breadth // 2)
        shapes += [(f"layer{stage + 1}.{block}", (width << stage, height, breadth)) for block in range(count)]
    return shapes


@cache
def resnet_flops(
    blocks: tuple[int, ...], width: int, classes: int, input_shape: tuple[int, int, int]
) -> tuple[float, ...]:
    """Those of :func:`chain_flops`: the stem, every block, the classifier. No weights are made."""
    with torch.device("meta"):
        return chain_flops(SmallResNet(blocks, width=width, classes=classes, input_shape=input_shape))
