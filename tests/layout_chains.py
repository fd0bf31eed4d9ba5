"""Two small chains with representations of every layout, and a stitch between any two of them in plain modules."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.activations.resident_source import ResidentSource
from fastsitch.chains.chain import Chain
from fastsitch.chains.layout import Layout
from fastsitch.chains.position import Position
from fastsitch.data import Dataset, Split
from fastsitch.identity import torch_generator
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.stitching.geometry import Geometry, Rules

CPU = torch.device("cpu")


class Apply(nn.Module):
    """A function of a tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Prepend(nn.Module):
    """Puts learned tokens before all others."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, tokens, channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.tokens.expand(len(x), -1, -1), x], 1)


class Attention(nn.Module):
    """A transformer block of one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.mlp = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 9), nn.GELU(), nn.Linear(9, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.scaled_dot_product_attention(*self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.mlp(x)


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _token(x: Tensor, index: int) -> Tensor:
    return x[:, index]


def _mix(x: Tensor) -> Tensor:
    """Six tokens out of a class token and four others."""
    return torch.cat([x[:, 1:], x[:, 1:3] * x[:, :1]], 1)


def first_chain() -> Chain:
    """Maps 8x8 and 7x7, channels last 7x7, tokens on 4x4 without, with one and with two prefix tokens, a vector."""
    segments = {
        "map8": nn.Sequential(nn.Conv2d(3, 3, 4, 4), nn.Tanh()),
        "map7": nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh()),
        "last7": nn.Sequential(Apply(_last), nn.Linear(4, 5), nn.Tanh()),
        "tokens4": nn.Sequential(Apply(_first), nn.Conv2d(5, 6, 4), Apply(_tokens)),
        "class4": nn.Sequential(Prepend(1, 6), Attention(6)),
        "register4": nn.Sequential(Prepend(1, 6), Attention(6)),
        "vector": nn.Sequential(Apply(partial(_token, index=1)), nn.Linear(6, 7), nn.Tanh()),
    }
    layouts = {"last7": Layout("map-last"), "class4": Layout("tokens", 1), "register4": Layout("tokens", 2)}
    return _chain("first", segments, nn.Linear(7, 10), layouts)


def second_chain() -> Chain:
    """A map 6x8, channels last 4x4, tokens on 2x2 without and with a class token, on 2x3 behind two, a vector."""
    segments = {
        "map6x8": nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.AdaptiveAvgPool2d((6, 8)), nn.Tanh()),
        "last4": nn.Sequential(nn.AdaptiveAvgPool2d(4), Apply(_last), nn.Linear(4, 5), nn.Tanh()),
        "tokens2": nn.Sequential(Apply(_first), nn.Conv2d(5, 6, 2, 2), Apply(_tokens)),
        "class2": nn.Sequential(Prepend(1, 6), Attention(6)),
        "register2x3": nn.Sequential(Apply(_mix), Prepend(2, 6), Attention(6)),
        "vector": nn.Sequential(Apply(partial(torch.mean, dim=1)), nn.Linear(6, 8), nn.Tanh()),
    }
    layouts = {
        "last4": Layout("map-last"),
        "class2": Layout("tokens", 1),
        "register2x3": Layout("tokens", 2, grid=(2, 3)),
    }
    return _chain("second", segments, nn.Linear(8, 10), layouts)


def _chain(seed: str, segments: dict[str, nn.Module], head: nn.Module, layouts: dict[str, Layout]) -> Chain:
    chain = Chain(list(segments.values()), head, list(segments), (3, 32, 32), layouts)
    generator = torch_generator("mixed chain", seed)
    with torch.no_grad():
        for parameter in chain.parameters():
            # of a size that lets signals and gradients through
            spread = 1.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return chain.double().eval()


def representations(chain: Chain, data: Dataset, split: Split, images: int) -> list[Tensor]:
    """Raw representations of the first real images, in fp64."""
    with torch.no_grad():
        return chain.representations(data.normalisation.apply(split.images[:images], torch.float64))


def source_of(chain: Chain, data: Dataset, train: int = 24, test: int = 10) -> ResidentSource:
    """The chain's representations of the first real images, computed by its frozen network."""
    model = FrozenNetwork(chain, dtype=torch.float64, device=CPU)
    with torch.no_grad():
        splits = [
            model.representations(data.normalisation.apply(split.images[:count], torch.float64))
            for split, count in ((data.train, train), (data.test, test))
        ]
    return ResidentSource.from_tensors(
        *splits, data.train.labels[:train], data.test.labels[:test], positions=chain.positions
    )


def geometry_of(sender: Chain, receiver: Chain, i: int, j: int, rules: Rules) -> Geometry:
    return Geometry.between(sender.positions[i].rows, receiver.positions[j].rows, rules)


class PlainStitch(nn.Module):
    """From raw representation to raw representation; the map itself is one convolution, ``conv``."""

    def __init__(self, sender: Position, receiver: Position, geometry: Geometry, rules: Rules) -> None:
        super().__init__()
        self.sender, self.receiver, self.rules = sender, receiver, rules
        down = geometry.down
        self.conv = nn.Conv2d(geometry.sender[0], geometry.receiver[0], down, stride=down).double()

    def forward(self, x: Tensor) -> Tensor:
        grid, tokens = self._read(x)
        size = {
            "map": self.receiver.shape[1:],
            "map-last": self.receiver.shape[:2],
            "tokens": self.receiver.grid or (int((self.receiver.shape[0] - self.receiver.prefix_tokens) ** 0.5),) * 2,
            "vector": (1, 1),
        }[self.receiver.layout]
        if self.receiver.layout == "vector":
            return self.conv(grid.mean((2, 3), keepdim=True)).flatten(1)
        y = self.conv(self._fit(grid, size))
        if y.shape[2:] != size:
            y = F.interpolate(y, size, mode="nearest")
        if self.receiver.layout == "map":
            return y
        if self.receiver.layout == "map-last":
            return y.permute(0, 2, 3, 1)
        first = [self._prefix(k, grid, tokens) for k in range(self.receiver.prefix_tokens)]
        return torch.cat([*first, y.flatten(2).transpose(1, 2)], 1)

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The grid (B, C, H, W) and the prefix tokens (B, T, C)."""
        if self.sender.layout == "map":
            return x, x.new_empty(len(x), 0, x.shape[1])
        if self.sender.layout == "map-last":
            return x.permute(0, 3, 1, 2), x.new_empty(len(x), 0, x.shape[3])
        if self.sender.layout == "vector":
            return x[:, :, None, None], x.new_empty(len(x), 0, x.shape[1])
        prefix = self.sender.prefix_tokens
        side = int((x.shape[1] - prefix) ** 0.5)
        return x[:, prefix:].transpose(1, 2).unflatten(2, self.sender.grid or (side, side)), x[:, :prefix]

    def _fit(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """Resampled where neither size is the same whole multiple of the other."""
        (height, width), (rows, columns) = grid.shape[2:], size
        whole = height / rows == width / columns and (height % rows == 0 or rows % height == 0)
        if whole or self.sender.layout == "vector":
            return grid
        if self.rules.resample == "area":
            return F.interpolate(grid, size, mode="area")
        return F.interpolate(grid, size, mode="bilinear", align_corners=False, antialias=True)

    def _prefix(self, k: int, grid: Tensor, tokens: Tensor) -> Tensor:
        """The k-th prefix token (B, 1, D)."""
        token = grid[:, :, :1, :1] * 0
        if self.rules.class_token == "sender" and k < tokens.shape[1]:
            token = tokens[:, k, :, None, None]
        elif self.rules.class_token != "zero":
            down = self.conv.stride[0]
            if down > 1:
                # of what the convolution gives, which is the same
                return self.conv(grid).mean((2, 3)).unsqueeze(1)
            token = grid.mean((2, 3), keepdim=True)
        return self.conv(token.expand(-1, -1, *self.conv.kernel_size)).flatten(1).unsqueeze(1)
