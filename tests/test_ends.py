"""What networks end in beside logits: bounded, normalised, or a softmax over something else than classes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.chains.chain import Chain
from fastsitch.errors import NetworkError

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class End(nn.Module):
    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.end = nn.Conv2d(3, 8, 3), end
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.last(self.first(x)))


class Head(nn.Module):
    def __init__(self, model: End) -> None:
        super().__init__()
        self.last, self.end = model.last, model.end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.last(x))


WAYS: dict[str, Callable[[End], Chain]] = {
    "module": lambda model: Chain.from_module(model, IMAGES),
    "Sequential": lambda model: Chain.from_module(nn.Sequential(model.first, Head(model)), IMAGES),
    "segments": lambda model: Chain.from_segments([model.first], ["first"], Head(model), IMAGES),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("end", "shown"),
    [
        (torch.tanh, "tanh"),
        (nn.Tanh(), "tanh"),
        (lambda x: 2 * x.sigmoid() - 1, "sigmoid, mul, sub"),
        (lambda x: 30 * torch.tanh(x / 30), "tanh, mul"),
        (lambda x: F.hardtanh(x).float(), "hardtanh, float"),
    ],
    ids=["tanh", "Tanh", "2 sigmoid - 1", "soft cap", "hardtanh"],
)
def test_outputs_with_bounds_are_said(
    way: str, end: Callable[[Tensor], Tensor], shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = End(end).eval()
    chain = WAYS[way](model)
    (record,) = caplog.records
    assert f"ends in {shown}: its outputs have bounds, and are taken for logits as they are" in record.getMessage()
    assert torch.equal(chain(IMAGES), model(IMAGES))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("end", "message"),
    [
        (F.normalize, "outputs of length 1 for every image, as behind F.normalize: expected logits"),
        (lambda x: x.softmax(0), "gives an image other values beside other images of its batch"),
        (nn.Softmax(0), "gives an image other values beside other images of its batch"),
        (lambda x: F.softmax(x, dim=-2), "gives an image other values beside other images of its batch"),
    ],
    ids=["normalize", "softmax(0)", "Softmax(0)", "dim=-2"],
)
def test_what_cannot_be_logits_is_refused(way: str, end: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        WAYS[way](End(end))


def test_a_softmax_over_the_batch_at_the_end_of_a_sequence_is_refused() -> None:
    with pytest.raises(NetworkError, match="beside other images of its batch"):
        Chain.from_module(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(1568, 10), nn.Softmax(0)), IMAGES)
