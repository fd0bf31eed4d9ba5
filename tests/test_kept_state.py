"""Networks that keep something between passes, or bring it along where nobody looks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastsitch
from fastsitch.chains.chain import Chain
from fastsitch.errors import NetworkError
from tests.conftest import Command

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def convolution() -> nn.Module:
    return nn.Conv2d(3, 8, 3, padding=1)


def head() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


class ActNorm(nn.Module):
    """Takes its scale from the first images that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.initialised = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            self.scale.data = 1 / x.std((0, 2, 3)).view(8, 1, 1)
            self.initialised = True
        return x * self.scale


class Cache(nn.Module):
    """Keeps it where it is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = x.detach().mean((0, 2, 3)).view(-1, 1, 1)
        return x - self.mean


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x


WAYS: dict[str, Callable[[nn.Module], Chain]] = {
    "module": lambda middle: Chain.from_module(Whole(middle), IMAGES),
    "Sequential": lambda middle: Chain.from_module(nn.Sequential(convolution(), middle, head()), IMAGES),
    "segments": lambda middle: Chain.from_segments([convolution(), middle], ["first", "middle"], head(), IMAGES),
}


class Whole(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.head = convolution(), middle, head()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.middle(self.first(x)))
        return y


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (ActNorm, r"changes (\w+\.)?scale of ActNorm when it runs .* run the network once on a few images beforehand"),
        (Cache, r"gives images that come first other outputs than later ones.* run the network once"),
        (Counter, r"changes (\w+\.)?passes of Counter when it runs"),
    ],
)
def test_what_the_first_pass_sets_is_not_set_by_a_check(
    way: str, middle: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(NetworkError, match=message):
        WAYS[way](middle())


def test_a_chain_made_by_hand_is_checked_too() -> None:
    with pytest.raises(NetworkError, match="the chain changes 1.scale of ActNorm when it runs"):
        Chain([nn.Sequential(convolution(), ActNorm())], head(), ["a"], (3, 16, 16))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("middle", [ActNorm, Cache])
def test_what_ran_once_keeps_what_it_took_from_its_first_images(way: str, middle: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, first = middle(), convolution()
    module(first(5 * IMAGES))
    expected = module(first(IMAGES))
    chain = (
        Chain.from_segments([nn.Sequential(first, module)], ["middle"], head(), IMAGES)
        if way == "segments"
        else Chain.from_module(nn.Sequential(nn.Sequential(first, module), head()), IMAGES, "0")
    )
    torch.testing.assert_close(chain.representations(IMAGES)[-1], expected)


FACTORY = """
import torch
from torch import nn
import torch.nn.functional as F

class Fixed(nn.Module):
    def __init__(self, classes, kind):
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        weights = [torch.randn(8, 3, 4, 4, generator=draw), torch.randn(8, 8, 3, 3, generator=draw) / 9]
        for k, weight in enumerate(weights):
            if kind == "buffer":
                self.register_buffer(f"w{k}", weight)
            else:
                setattr(self, f"w{k}", weight)
        self.head = nn.Linear(8, classes)
    def forward(self, x):
        x = F.conv2d(x, self.w0, stride=4).relu()
        return self.head(F.conv2d(x, self.w1, padding=1).relu().mean((2, 3)))

class Filters(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("filters", torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(7)))
    def forward(self, x):
        return F.conv2d(x, self.filters, stride=4)

def buffers(classes):
    return Fixed(classes, "buffer")

def attributes(classes):
    return Fixed(classes, "attribute")

def bank(classes):
    return nn.Sequential(
        Filters(), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)
    )

class ActNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.register_buffer("initialised", torch.tensor(False))
    def forward(self, x):
        if not bool(self.initialised):
            self.scale.data.copy_(1 / x.std((0, 2, 3)).view(8, 1, 1))
            self.initialised.fill_(True)
        return x * self.scale

def normed(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), ActNorm(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))

def ran(classes):
    model = normed(classes)
    with torch.no_grad():
        model(torch.rand(2, 3, 32, 32))
    return model
"""


@pytest.fixture
def where(few: str, tmp_path: Path) -> list[str | Path]:
    (tmp_path / "nets.py").write_text(FACTORY)
    return ["--dataset", few, "--root", tmp_path / "root"]


@pytest.mark.parametrize("name", ["buffers", "attributes"])
def test_weights_that_are_no_parameters_are_no_controls_either(
    name: str, where: list[str | Path], tmp_path: Path, run_cli: Command
) -> None:
    added = run_cli("add", "net", "--from", f"{tmp_path}/nets.py:{name}", *where)
    assert added.returncode == 0, added.stderr
    assert "brings its weights along: it counts as trained, and has no untrained control" in added.stderr
    assert "test accuracy 0." in added.stdout
    line = ["sweep", "--senders", "net", "--receivers", "net", "--batch-size", "32", "--epochs", "1", *where]
    refused = run_cli(*line, "--settings", "T2T,R2T")
    assert refused.returncode == 2
    assert "net brings its weights along, whatever the seed, and has no untrained control" in refused.stderr


def test_positions_that_do_not_depend_on_the_seed_are_named(
    where: list[str | Path], tmp_path: Path, run_cli: Command
) -> None:
    added = run_cli("add", "net", "--from", f"{tmp_path}/nets.py:bank", *where)
    assert added.returncode == 0, added.stderr
    assert added.stderr.count("depend on the seed") == 1
    assert "the outputs at 0, 1 do not depend on the seed, nor will they in an untrained control" in added.stderr
    assert "train it with" in added.stdout


def test_a_factory_that_sets_its_scale_runs_the_network_once(
    where: list[str | Path], tmp_path: Path, run_cli: Command
) -> None:
    refused = run_cli("add", "net", "--from", f"{tmp_path}/nets.py:normed", *where)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "changes 1.scale of ActNorm when it runs in eval mode" in refused.stderr
    assert "run the network once on a few images beforehand, in its factory" in refused.stderr
    assert not (tmp_path / "root").exists()
    assert run_cli("add", "net", "--from", f"{tmp_path}/nets.py:ran", *where).returncode == 0
    fastsitch.train("net", dataset=str(where[1]), epochs=1, root=tmp_path / "root")
