"""What tracing takes as fixed, what it does where torch.fx fails, and what it finds inside wrappers and outputs."""

import logging
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastsitch.chains.chain import Chain
from fastsitch.errors import NetworkError


def images(count: int, side: int = 8) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))


class Base(nn.Module):
    """Three layers; what comes between them is for others to say."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)
        self.register_buffer("mask", torch.ones(1, 1, 8, 8).tril())

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Any:
        return self.last(self.second(self.between(self.first(x))).mean((2, 3)))


@torch.no_grad()
def assert_exact(model: nn.Module, *names: str) -> Chain:
    """At every position, for one image and for several."""
    model.eval()
    chain = Chain.from_module(model, images(1), positions="*")
    assert set(names) <= {position.name for position in chain.positions}
    for count in (1, 4, 5):
        expected = model(images(count))
        for index, representation in enumerate(chain.representations(images(count))):
            assert torch.equal(chain.tail(representation, index), expected), (count, chain.positions[index].name)
    return chain


class Asks(Base):
    """Asks for all that the size of the images fixes, and for their number."""

    def between(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        assert channels == 4, f"expected 4 channels, found {channels}"
        torch._assert(height == width, f"expected squares, found {height}x{width}")
        if height == 8 and x.ndim == len(x.size()) == 4 and x.shape[-2:] == self.mask.shape[2:]:
            x = x * self.mask
        for row in range(height // 4):
            x = x + row
        if x.dtype == torch.float16 or x.is_cuda or not x.is_floating_point():
            x = x.float()
        places = torch.arange(height * width, device=x.device, dtype=x.dtype).view(1, 1, height, -1)
        x = x + torch.zeros(batch, 1, height, width, dtype=x.dtype, device=x.device) + places / int(height**0.5)
        lowest = torch.full((batch, channels), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device)
        x = x.maximum(lowest[..., None, None].to(x.dtype))
        first, *others = x.chunk(2, 1)
        x = torch.cat([first, *others], 1) + self.mask.to(x.device, x.dtype).expand(batch, -1, -1, -1)
        x[:, :, 0] = 0.5
        x.mul_(2)
        largest = x.max(1, keepdim=True)
        return x + largest.values


def test_what_the_size_of_the_images_fixes_is_a_constant() -> None:
    model = Asks()
    chain = assert_exact(model, "first", "second")
    # nothing fixes the dtype
    doubled = chain.double()
    assert torch.equal(doubled(images(3).double()), model.double()(images(3).double()))


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if x.shape[0] % 2 else x.clamp(min=0)


def test_a_way_that_depends_on_the_number_of_images_is_run_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    model = Base()
    model.second = Odd()  # type: ignore[assignment]
    with caplog.at_level(logging.INFO, "fastsitch"):
        assert_exact(model, "first", "second")
    assert "module second is run as a whole" in caplog.text
    assert "its way depends on the number of images" in caplog.text


class Counts(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(Counts, self).forward(image[None])[0] for image in x])


def test_a_network_that_takes_images_one_by_one_is_refused() -> None:
    expected = r"cannot trace Counts, .*its way depends on the number of images; torch\.export: .*size\(\)\[0\]"
    with pytest.raises(NetworkError, match=expected):
        Chain.from_module(Counts().eval(), images(1))


class Alone(Base):
    def between(self, x: Tensor) -> Tensor:
        return x.relu() if x.shape[0] == 1 else x


def test_another_way_for_one_image_is_noticed() -> None:
    with pytest.raises(NetworkError, match="its segments do not reproduce its output for one image alone"):
        Chain.from_module(Alone().eval(), images(1))


class Sees(Base):
    def between(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > 0 else -x


def test_values_are_never_fixed() -> None:
    with pytest.raises(NetworkError, match=r"cannot trace Sees, .*values in a tensor; torch\.export: .*from_segments"):
        Chain.from_module(Sees().eval(), images(1))


class Typed(Base):
    """Asks for the class of its input, for which torch.fx has a stand-in."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor | list[Tensor] = self.first(x)
        if isinstance(y, Tensor):
            y = [y]
        assert all(isinstance(each, Tensor) for each in y)
        size = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device).shape
        return self.last(self.second(torch.cat(y, 1)).relu().mean((2, 3))) + torch.zeros(size[0], 5, device=x.device)


@torch.no_grad()
def test_what_fx_cannot_trace_is_exported() -> None:
    model = Typed()
    chain = assert_exact(model, "first", "second", "relu", "mean")
    assert [(p.name, p.shape, p.layout) for p in chain.positions[:3]] == [
        ("first", (4, 8, 8), "map"),
        ("cat", (4, 8, 8), "map"),
        ("second", (4, 8, 8), "map"),
    ]
    doubled = chain.double()
    torch.testing.assert_close(doubled(images(2).double()), model.double()(images(2).double()))
    assert {tuple(parameter.shape) for parameter in chain.parameters()} == {
        tuple(parameter.shape) for parameter in model.parameters()
    }


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@torch.no_grad()
def test_wrappers_are_taken_off(caplog: pytest.LogCaptureFixture) -> None:
    model = Base().eval()
    expected = Chain.from_module(model, images(1))
    inside = Base().eval()
    inside.second = DataParallel(inside.second)
    for wrapped, said in (
        (DataParallel(model), "Base is taken out of DataParallel"),
        (DistributedDataParallel(model), "Base is taken out of DistributedDataParallel"),
        (torch.compile(DataParallel(model)), "Base is taken out of OptimizedModule, DataParallel"),
        (inside, "Conv2d is taken out of DataParallel"),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "fastsitch"):
            chain = Chain.from_module(wrapped, images(1))
        assert said in caplog.text
        assert chain.positions == expected.positions
        assert torch.equal(chain(images(3)), model(images(3)))
    # the network that was given is as it was
    assert isinstance(inside.second, DataParallel)


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


Pair = namedtuple("Pair", ["features", "scores"])


class Returns(Base):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.second(self.first(x)))
        return self.make(y, self.last(y.mean((2, 3))))


@pytest.mark.parametrize(
    ("make", "output"),
    [
        (lambda y, logits: {"features": y.mean((2, 3)), "logits": logits}, None),
        (lambda y, logits: {"out": logits, "aux": -logits}, None),
        (lambda y, logits: Output(None, logits), None),
        (lambda y, logits: (y, logits, -logits), None),
        (lambda y, logits: [-logits, logits], 1),
        (lambda y, logits: (-logits, (y, y), logits), "2"),
        (lambda y, logits: Pair(y.mean((2, 3)), logits), "scores"),
    ],
    ids=["logits", "out", "dataclass", "tuple", "index", "nested", "name"],
)
@torch.no_grad()
def test_logits_are_found_in_what_a_network_returns(make: Any, output: str | int | None) -> None:
    model = Returns(make).eval()
    names = [*model.state_dict()]
    chain = Chain.from_module(model, images(1), output=output)
    plain = Chain.from_module(Returns(lambda y, logits: logits).eval(), images(1))
    assert torch.equal(chain(images(3)), plain(images(3)))
    assert chain.positions == plain.positions
    assert [*model.state_dict()] == names
    # the network that was given still returns all of it
    assert not isinstance(model(images(1)), Tensor)


def test_a_sequential_may_end_in_a_dict() -> None:
    class End(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), End(4, 5)).eval()
    chain = Chain.from_module(model, images(1))
    assert [position.name for position in chain.positions] == ["0", "1"]
    with torch.no_grad():
        assert torch.equal(chain(images(2)), model(images(2))["logits"])


@pytest.mark.parametrize(
    ("make", "output", "message"),
    [
        (lambda y, logits: {"a": y, "b": None}, None, r"found a dict of a \(3, 4, 8, 8\), b NoneType"),
        (lambda y, logits: (y, logits), "third", r"output='third': expected a part .* 0 \(3, 4, 8, 8\), 1 \(3, 5\)"),
        (lambda y, logits: (y, logits), 0, r"expected logits \(B, classes\), found \(3, 4, 8, 8\) at 0"),
        (lambda y, logits: logits, "logits", r"expected a part of what the network returns, \(3, 5\)"),
    ],
)
def test_outputs_without_logits_are_listed(make: Any, output: Any, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        Chain.from_module(Returns(make).eval(), images(1), output=output)
