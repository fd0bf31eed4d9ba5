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
