"""Modules that cannot be copied, or return something else than a tensor: one line, however they are brought."""

import re
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsitch
from fastsitch.chains.chain import Chain
from fastsitch.data import Dataset, Split
from fastsitch.errors import NetworkError

# torch's, of torch.jit
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated")

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Whole(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.head = convolution(), middle, head()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.middle(self.first(x)))
        return y


def convolution() -> nn.Module:
    return nn.Conv2d(3, 8, 3, padding=1)


def head() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


WAYS: dict[str, Callable[[nn.Module], Chain]] = {
    "module": lambda middle: Chain.from_module(Whole(middle), IMAGES),
    "Sequential": lambda middle: Chain.from_module(nn.Sequential(convolution(), middle, head()), IMAGES),
    "segments": lambda middle: Chain.from_segments([convolution(), middle], ["first", "middle"], head(), IMAGES),
}


def keeping(value: object) -> nn.Module:
    module = nn.ReLU()
    module.kept = value  # type: ignore[assignment]
    return module


class Raises(nn.ReLU):
    def __deepcopy__(self, memo: object) -> nn.Module:
        raise RuntimeError("no\ncopy")


class Drawn(nn.Conv2d):
    """A copy of it has other weights."""

    def __init__(self) -> None:
        super().__init__(8, 8, 1)

    def __deepcopy__(self, memo: object) -> nn.Module:
        return Drawn()


class Itself(nn.ReLU):
    def __deepcopy__(self, memo: object) -> nn.Module:
        return self


def sparse() -> nn.Module:
    module = nn.Conv2d(8, 8, 1)
    module.weight = nn.Parameter(module.weight.detach().to_sparse())
    return module


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (lambda: keeping(threading.Lock()), r"cannot copy \S*kept of a ReLU \(TypeError: cannot pickle"),
        (lambda: keeping(sys.__stderr__), r"cannot copy \S*kept of a ReLU \(TypeError"),
        (Raises, r"cannot copy a \w+ \(RuntimeError: no\)"),
        (Drawn, r"a copy of a \w+ is not equal to it \(\S*weight differs\)"),
        (Itself, r"a copy of a \w+ is not equal to it"),
        (lambda: nn.Conv2d(8, 8, 1, device="meta"), r"weights on the meta device, without values"),
        (sparse, r"sparse or quantised weights"),
    ],
    ids=["lock", "file", "raises", "fresh weights", "itself", "meta", "sparse"],
)
def test_what_cannot_be_copied_is_refused(way: str, middle: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(NetworkError, match=message) as refused:
        WAYS[way](middle())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("way", ["segments", "by hand"])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x, x), "b returns a tuple"),
        (lambda x: {"a": x}, "b returns a dict"),
        (lambda x: None, "b returns a NoneType"),
        (lambda x: x.to_sparse(), "b returns a tensor that is not dense"),
        (lambda x: x.mean(), "0 dimensions|Dimension out of range"),
        (lambda x: x.to(torch.complex64), "complex64|ComplexFloat"),
        (lambda x: {}["no\nkey"], r"b: KeyError: 'no\\nkey'"),
        (lambda x: 1 / 0, "b: ZeroDivisionError: division by zero"),
    ],
    ids=["tuple", "dict", "None", "sparse", "0-dim", "complex", "KeyError", "ZeroDivisionError"],
)
def test_segments_that_give_no_representation_are_refused(
    way: str, function: Callable[[Tensor], Any], message: str
) -> None:
    segments, names = [convolution(), Apply(function)], ["a", "b"]
    make = {
        "segments": lambda: Chain.from_segments(segments, names, head(), IMAGES),
        "by hand": lambda: Chain(segments, head(), names, (3, 16, 16)),
    }
    with pytest.raises(NetworkError, match=message) as refused:
        make[way]()
    assert "\n" not in str(refused.value)


def test_a_child_of_a_sequence_may_give_several_tensors_to_the_next() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(convolution(), Apply(lambda x: (x, -x)), Apply(lambda pair: pair[0] - pair[1]), head())
    chain = Chain.from_module(model, IMAGES)
    assert torch.equal(chain(IMAGES), model(IMAGES))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["script", "trace"])
def test_modules_of_torchscript_are_run_as_they_are(way: str, kind: str, fashion: Dataset) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 8, 3, padding=1)
    middle = torch.jit.script(plain) if kind == "script" else torch.jit.trace(plain, torch.randn(2, 8, 16, 16))
    chain = WAYS[way](middle)
    representations = chain.representations(IMAGES)
    torch.testing.assert_close(
        representations[-1], plain(representations[0]) if len(representations) > 1 else representations[0]
    )
    train, test = (Split(split.images[:64], split.labels[:64]) for split in (fashion.train, fashion.test))
    data = replace(fashion, train=train, test=test)
    pair = fastsitch.stitch(chain, chain, data, epochs=1, batch_size=32, device="cpu", precision="fp32")
    assert (pair.status == 1).all()


def test_a_network_that_wants_few_images_is_refused() -> None:
    def few(x: Tensor) -> Tensor:
        if len(x) > 3:
            raise ValueError("too many")
        return x

    with pytest.raises(NetworkError, match=re.escape("the chain does not run on 4 images (ValueError: too many)")):
        Chain.from_segments([convolution(), Apply(few)], ["a", "b"], head(), IMAGES)


def test_stitch_refuses_chains_made_by_hand_with_such_weights(fashion: Dataset) -> None:
    good = Chain([convolution()], head(), ["a"], (3, 16, 16))
    for fault, message in ((sparse, "sparse or quantised weights"), (Raises, r"cannot copy a \w+")):
        for place in ("sender", "receiver"):
            bad = Chain([convolution()], nn.Sequential(fault(), head()), ["a"], (3, 16, 16))
            with pytest.raises(NetworkError, match=message):
                fastsitch.stitch(*((bad, good) if place == "sender" else (good, bad)), fashion, device="cpu")
