"""Blocks that keep something for evaluation, or have several outputs."""

import torch
from torch import nn

from fastsitch.chains.chain import Chain


class CachedBias(nn.Module):
    """As LeViT's attention: derived from a weight that begins with zeros, once for all of evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))
        self.cache: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> "CachedBias":
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias[[3, 2, 1, 0]].view(1, 4, 1, 1)
        return torch.tanh(x) + self.cache["bias"]


def test_what_a_network_derives_from_its_weights_for_evaluation_stays_true() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), CachedBias(), nn.Sequential(nn.Flatten(), nn.LazyLinear(5))).eval()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    chain = Chain.from_module(model, x)
    assert torch.equal(chain(x), before)
    assert torch.equal(model(x), before)


class Pair(nn.Module):
    """A block with a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        x = x + self.conv(x)
        return x + 1, 7


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = nn.Conv2d(3, 4, 1), Pair(), Pair(), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.one(self.stem(x))
        x, _ = self.two(x)
        return self.head(x.mean((2, 3)))


def test_the_first_of_several_outputs_has_the_name_of_its_module_and_that_of_its_operation() -> None:
    """By the latter it was named before, so networks that were added then still are what they were."""
    x = torch.randn(2, 3, 8, 8)
    assert [position.name for position in Chain.from_module(Pairs(), x).positions] == ["stem", "one", "two"]
    named = Chain.from_module(Pairs(), x, ["one.add", "one.add_1", "two", "mean"])
    assert [position.name for position in named.positions] == ["one.add", "one.add_1", "two", "mean"]


class Gate(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weights = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weights(x.mean((2, 3), keepdim=True)).sigmoid()


class Separable(nn.Module):
    def __init__(self, channels: int, gated: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.gate = Gate(channels) if gated else nn.Identity()
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pointwise(self.gate(self.depthwise(x).relu())).relu()


class Separables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)
        self.stages = nn.Sequential(
            nn.Sequential(Separable(4, gated=False), Separable(4, gated=False)), nn.Sequential(Separable(4, gated=True))
        )
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def test_gates_alone_are_parts_of_blocks() -> None:
    chain = Chain.from_module(Separables(), torch.randn(2, 3, 8, 8))
    assert [position.name for position in chain.positions] == ["stem", "stages.0.0", "stages.0.1", "stages.1.0"]


class ClassAttention(nn.Module):
    """As VOLO's and CaiT's: the class token alone is computed anew, from all tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        token = x[:, :1]
        token = token + self.mix(self.mix(x).mean(1, keepdim=True))
        return torch.cat([token, x[:, 1:]], 1)


class ClassTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 6, 4, 4), nn.Parameter(torch.randn(1, 1, 6))
        self.blocks, self.head = nn.Sequential(ClassAttention(6), ClassAttention(6)), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.reshape(x.shape[0], -1, 6)], 1)
        return self.head(self.blocks(x)[:, 0])


def test_tokens_behind_a_new_class_token_are_on_the_grid_that_they_were_on() -> None:
    chain = Chain.from_module(ClassTokens(), torch.randn(2, 3, 12, 12))
    assert [(position.name, position.prefix_tokens, position.grid) for position in chain.positions[1:]] == [
        ("blocks.0", 1, (3, 3)),
        ("blocks.1", 1, (3, 3)),
    ]
