"""Foreign networks as users bring them: a right number, or one line that names the position and what to do."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fastsitch
from fastsitch.chains.chain import Chain
from fastsitch.chains.vet_chain import gradient_faults
from fastsitch.data import Dataset, Split
from fastsitch.errors import NetworkError
from fastsitch.receivers.frozen_network import FrozenNetwork
from tests.conftest import Command

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Apply(nn.Module):
    """A function of itself and the images, with modules of these names."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def convolution() -> nn.Module:
    return nn.Conv2d(3, 8, 3, padding=1)


def head() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def unsteady_norm() -> nn.Module:
    return nn.BatchNorm2d(8, track_running_stats=False)


class Stubborn(nn.BatchNorm2d):
    """Does not leave training."""

    def train(self, mode: bool = True) -> "Stubborn":
        super().train(True)
        return self


WAYS: dict[str, Callable[[nn.Module], Chain]] = {
    "module": lambda middle: Chain.from_module(
        Apply(lambda s, x: s.head(s.middle(s.first(x))), first=convolution(), middle=middle, head=head()), IMAGES
    ),
    "Sequential": lambda middle: Chain.from_module(nn.Sequential(convolution(), middle, head()), IMAGES),
    "segments": lambda middle: Chain.from_segments([convolution(), middle], ["first", "middle"], head(), IMAGES),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (unsteady_norm, r"(1|middle) the \w+ gives an image other values beside .* track_running_stats=True"),
        (lambda: Apply(lambda _, x: x - x.mean(0, keepdim=True)), "beside other images of its batch"),
        (lambda: Apply(lambda _, x: x + x[-1:]), "beside other images of its batch"),
        (lambda: Apply(lambda _, x: torch.cat([x[:1], x[1:] + x[:-1]])), "beside other images of its batch"),
        (lambda: Apply(lambda _, x: x + x.cumsum(0)), "beside other images of its batch"),
        (lambda: Apply(lambda s, x: x + s.place.weight[: len(x), :, None, None], place=nn.Embedding(64, 8)), "beside"),
        (lambda: Apply(lambda _, x: x / x.shape[0]), "beside other images of its batch"),
        (lambda: Apply(lambda _, x: torchvision.ops.stochastic_depth(x, 0.01, "row", True)), "draws random numbers"),
        (lambda: Stubborn(8), "beside other images of its batch"),
        (lambda: Apply(lambda _, x: F.dropout(x, 0.5)), "gives other outputs for the same images"),
        (lambda: Apply(lambda _, x: x + torch.rand(8, 1, 1)), "gives other outputs for the same images"),
    ],
    ids=[
        *("batch norm", "mean of the batch", "last of the batch", "image before", "all before", "place in the batch"),
        *("size of the batch", "rarely random", "in training for ever", "dropout", "noise"),
    ],
)
def test_answers_that_depend_on_chance_or_on_the_batch_are_refused(
    way: str, middle: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(NetworkError, match=message):
        WAYS[way](middle())


def test_a_pass_that_changes_the_next_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return x * self.passes

    with pytest.raises(NetworkError, match="at position b the chain gives other outputs for the same images"):
        Chain.from_segments([convolution(), Counts()], ["a", "b"], head(), IMAGES)


def test_a_chain_made_by_hand_is_checked_where_it_is_used(fashion: Dataset) -> None:
    good = Chain([convolution()], head(), ["a"], (3, 16, 16))
    bad = Chain([nn.Sequential(convolution(), unsteady_norm())], head(), ["a"], (3, 16, 16))
    for pair, role in (((bad, good), "sender"), ((good, bad), "receiver")):
        with pytest.raises(NetworkError, match=f"at position a the {role} gives an image other values"):
            fastsitch.stitch(*pair, fashion)


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.Sigmoid()])
def test_logits_are_what_a_network_gives_a_softmax_or_sigmoid(end: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    first, last = convolution(), head()
    for model in (
        nn.Sequential(first, last, end),
        nn.Sequential(first, nn.Sequential(last, end)),
        Apply(lambda s, x: s.end(s.last(s.first(x))), first=first, last=last, end=end),
        Apply(lambda s, x: s.last(s.first(x)).softmax(-1), first=first, last=last),
        Apply(lambda s, x: F.softmax(s.last(s.first(x)), dim=1), first=first, last=last),
        Apply(lambda s, x: torch.sigmoid(s.last(s.first(x))), first=first, last=last),
    ):
        caplog.clear()
        chain = Chain.from_module(model, IMAGES)
        assert torch.equal(chain(IMAGES), last(first(IMAGES)))
        assert "ends in probabilities" in caplog.text
    with pytest.raises(NetworkError, match="probabilities, which sum to 1: expected logits; leave out the softmax"):
        Chain.from_segments([first], ["a"], nn.Sequential(last, nn.Softmax(1)), IMAGES)
    with pytest.raises(NetworkError, match="probabilities, which sum to 1"):
        Chain.from_module(Apply(lambda s, x: s.last(s.first(x)).softmax(1) * 1, first=first, last=last), IMAGES)
    # those of a softmax's logarithm are logits too
    Chain.from_module(nn.Sequential(first, last, nn.LogSoftmax(1)), IMAGES)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda x: 100 * x.softmax(1), "sum to 100 for every image"),
        (lambda x: -x.log_softmax(1), "ends in -log_softmax"),
        (lambda x: x.softmax(1).log10(), "log10 of a softmax"),
    ],
    ids=["percent", "negative", "decimal"],
)
def test_forms_of_probabilities_are_no_logits(end: Callable[[Tensor], Tensor], message: str) -> None:
    last = nn.Sequential(head(), Apply(lambda _, x: end(x)))
    with pytest.raises(NetworkError, match=message):
        Chain.from_module(Apply(lambda s, x: s.last(s.first(x)), first=convolution(), last=last), IMAGES)
    with pytest.raises(NetworkError, match=message):
        Chain.from_segments([convolution()], ["first"], last, IMAGES)
    Chain.from_segments([convolution()], ["first"], nn.Sequential(head(), nn.LogSoftmax(1)), IMAGES)


def test_modes_that_forward_changes_are_seen() -> None:
    """The modules of a chain are those of its network."""

    class Switches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.head = convolution(), nn.BatchNorm2d(8), head()

        def forward(self, x: Tensor) -> Tensor:
            self.norm.train()
            y: Tensor = self.head(self.norm(self.first(x)))
            return y

    with pytest.raises(NetworkError):
        Chain.from_module(Switches(), IMAGES)


def test_a_softmax_at_the_end_does_not_change_what_is_trained(fashion: Dataset) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), head())
    train, test = (
        Split(split.images[:count], split.labels[:count]) for split, count in ((fashion.train, 128), (fashion.test, 64))
    )
    few = replace(fashion, train=train, test=test)
    pairs = []
    for model in (plain, nn.Sequential(*plain, nn.Softmax(1))):
        chain = Chain.from_module(model, torch.zeros(1, 3, 32, 32))
        pairs.append(fastsitch.stitch(chain, chain, few, epochs=1, batch_size=32, precision="fp32", device="cpu"))
    assert np.array_equal(pairs[0].loss, pairs[1].loss)
    assert (pairs[0].loss > 1.5).all()


@pytest.mark.parametrize(
    "between",
    [
        (lambda x: x > 0, lambda x: x.float()),
        (lambda x: (x > 0).int(), lambda x: x.float()),
        (lambda x: x.round().long(), lambda x: x.float()),
        (lambda x: x.to(torch.complex64), lambda x: x.real * 1),
    ],
    ids=["bool", "int", "long", "complex"],
)
def test_only_real_floating_point_numbers_are_positions(between: Any) -> None:
    there, back = between
    model = Apply(
        lambda s, x: s.head(s.relu(back(there(s.first(x))))), first=convolution(), relu=nn.ReLU(), head=head()
    )
    chain = Chain.from_module(model, IMAGES, "*")
    assert {"first", "relu"} <= {position.name for position in chain.positions}
    assert all(representation.is_floating_point() for representation in chain.representations(IMAGES))
    kind = str(there(torch.zeros(1)).dtype).removeprefix("torch.")
    middle = [Apply(lambda _, x: there(x)), Apply(lambda _, x: back(x))]
    with pytest.raises(NetworkError, match=f"position 'b' is a tensor of {kind}: expected one of real floating-point"):
        Chain.from_segments([convolution(), *middle], ["a", "b", "c"], head(), IMAGES)


def detaching() -> nn.Module:
    torch.manual_seed(0)
    return Apply(
        lambda s, x: s.head(s.second(s.first(x).detach().relu())),
        first=convolution(),
        second=nn.Conv2d(8, 8, 1),
        head=head(),
    )


def test_positions_without_a_gradient_are_found(fashion: Dataset) -> None:
    chain = Chain.from_module(detaching(), IMAGES, "first,second")
    assert gradient_faults(chain, range(2)) == (["first"], [])
    rounding = Apply(lambda s, x: s.head(s.first(x).round()), first=convolution(), head=head())
    assert gradient_faults(Chain.from_module(rounding, IMAGES, "first"), [0]) == ([], ["first"])
    refusal = r"the receiver cannot be a receiver at first: no gradient .* other positions of it \(second\)"
    with pytest.raises(NetworkError, match=refusal):
        fastsitch.stitch(chain, chain, fashion)


FACTORY = """
import torch
from torch import nn

class Cut(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 4), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.second(self.first(x).detach().relu()).mean((2, 3)))

def cut(classes):
    return Cut(classes)

def small(classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)
    )

def trained(classes):
    model = small(classes)
    torch.manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model

def half(classes):
    model = small(classes)
    nn.init.eye_(model[4].weight)
    return model
"""


def test_a_sweep_into_a_position_without_a_gradient_is_refused_before_any_store(
    few: str, tmp_path: Path, run_cli: Command
) -> None:
    (tmp_path / "factory.py").write_text(FACTORY)
    where = ["--dataset", few, "--root", tmp_path / "root"]
    added = run_cli("add", "cut", "--from", f"{tmp_path}/factory.py:cut", "--positions", "first,second", *where)
    assert added.returncode == 0, added.stderr
    assert "no gradient gets to first: no receiver positions" in added.stderr
    assert run_cli("train", "cut", "--epochs", "1", *where).returncode == 0
    line = ["sweep", "--senders", "cut", "--receivers", "cut", "--batch-size", "32", "--epochs", "1", *where]
    refused = run_cli(*line)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "cut cannot be a receiver at first: no gradient of its logits gets there" in refused.stderr
    assert not (tmp_path / "root" / "activations").exists()
    assert not list((tmp_path / "root").glob("runs/*/*"))
    assert run_cli(*line, "--positions", "second").returncode == 0
    # matched stitches need none
    assert run_cli(*line[:-2], "--root", tmp_path / "root", "--loss", "match", "--run", "m").returncode == 0


def test_a_network_that_brings_its_weights_counts_as_trained_and_has_no_control(
    few: str, tmp_path: Path, run_cli: Command
) -> None:
    (tmp_path / "factory.py").write_text(FACTORY)
    where = ["--dataset", few, "--root", tmp_path / "root"]
    added = run_cli("add", "brought", "--from", f"{tmp_path}/factory.py:trained", *where)
    assert added.returncode == 0, added.stderr
    assert "brings its weights along: it counts as trained, and has no untrained control" in added.stderr
    assert "test accuracy 0." in added.stdout
    line = ["sweep", "--senders", "brought", "--receivers", "brought", "--batch-size", "32", "--epochs", "1", *where]
    refused = run_cli(*line, "--settings", "T2T,R2T")
    assert refused.returncode == 2
    assert "brought brings its weights along, whatever the seed, and has no untrained control" in refused.stderr
    assert "--settings with R" in refused.stderr
    assert run_cli(*line).returncode == 0
    # a few weights that are always the same are said, no more
    half = run_cli("add", "half", "--from", f"{tmp_path}/factory.py:half", *where)
    assert "4.weight do not depend on the seed" in half.stderr
    assert "train it with" in half.stdout


def test_hooks_of_containers_are_part_of_the_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(convolution(), nn.ReLU(), head())
    model.register_forward_hook(lambda module, inputs, output: output * 2)
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    chain = Chain.from_module(model, IMAGES)
    assert [position.name for position in chain.positions] == ["0", "1"]
    assert torch.equal(chain(IMAGES), model(IMAGES))
    child = nn.Sequential(convolution(), nn.Sequential(nn.ReLU(), nn.ReLU()), head())
    child[1].register_forward_hook(lambda module, inputs, output: output * 3)
    assert torch.equal(Chain.from_module(child, IMAGES)(IMAGES), child(IMAGES))


class Hidden(nn.Module):
    """Its graph does not show that what it keeps is changed in place, and a head of zeros hides it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = convolution(), nn.Conv2d(8, 8, 1), nn.Linear(8, 10)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = x.view(-1)
        y.mul_(2)
        return self.head(self.second(x).mean((2, 3)))


def test_a_chain_that_differs_from_its_network_is_refused_even_behind_a_head_of_zeros() -> None:
    model = Hidden().eval()
    assert not model(IMAGES).diff(dim=0).any()
    with pytest.raises(NetworkError, match="cannot cut a Hidden: its segments do not reproduce the output of second"):
        Chain.from_module(model, IMAGES, "first,second")
    with pytest.raises(NetworkError, match="cannot cut a Hidden: its segments do not reproduce its output"):
        Chain.from_module(model, IMAGES, "first")


def test_weights_of_zero_stay_zero() -> None:
    model = nn.Sequential(convolution(), head())
    nn.init.zeros_(model[1][2].weight)
    chain = Chain.from_module(model, IMAGES)
    assert not chain.head.get_parameter("0.2.weight").any()
    assert not model[1][2].weight.any()


def test_tensors_that_a_pass_left_behind_do_not_hinder() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = convolution(), head()
            self.kept: list[Any] = []

        def forward(self, x: Tensor) -> Tensor:
            self.features = self.first(x)
            self.kept = [{"features": (self.features,)}]
            self.kept.append(self.kept)
            return self.head(self.features)

    model = Keeps().eval()
    expected = model(IMAGES)
    assert torch.equal(Chain.from_module(model, IMAGES)(IMAGES), expected)
    assert model.features.grad_fn is not None
    with pytest.warns(FutureWarning):
        linear = torch.nn.utils.weight_norm(nn.Linear(8, 10))
    normed = nn.Sequential(convolution(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    expected = normed(IMAGES)
    assert torch.equal(Chain.from_module(normed, IMAGES)(IMAGES), expected)
    assert torch.equal(Chain.from_segments([normed[0]], ["a"], normed[1:], IMAGES)(IMAGES), expected)


def test_what_is_right_is_cut_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Chain.from_module(nn.Sequential(convolution(), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU(), head()), IMAGES)
    assert not caplog.records


def test_weights_that_are_computed_in_every_pass_are_frozen_too() -> None:
    """A pass leaves them behind with their history, which no copy can have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = nn.utils.weight_norm(convolution())
        spectral = nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
    chain = Chain.from_module(nn.Sequential(normed, spectral, head()), IMAGES)
    frozen = FrozenNetwork(chain, dtype=torch.float32, device=torch.device("cpu"))
    expected = chain.representations(IMAGES)
    for given, wanted in zip(frozen.representations(IMAGES), expected, strict=True):
        torch.testing.assert_close(given, wanted)
