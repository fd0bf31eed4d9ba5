import pytest
import torch
import torchvision
from torch import nn

from fastsitch.chains.chain import Chain
from fastsitch.chains.chain_flops import chain_flops
from fastsitch.errors import NetworkError
from fastsitch.network_names import BLOCKS, NetworkName
from fastsitch.networks.resnet import SmallResNet, position_shapes, resnet_flops
from fastsitch.receivers.frozen_network import FrozenNetwork
from tests.conftest import network

CPU = torch.device("cpu")


def test_r2222_is_torchvisions_resnet18_with_a_cifar_stem(images: torch.Tensor) -> None:
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs = theirs.double().eval()
    ours = network("R2222", width=64)
    theirs.load_state_dict(
        {their_key: tensor for key, tensor in ours.state_dict().items() for their_key in [_torchvision_key(key)]}
    )
    expected = []
    for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        for block in stage:
            block.register_forward_hook(lambda _, __, output: expected.append(output))
    with torch.no_grad():
        logits = theirs(images[:2])
        representations = ours.representations(images[:2])
        torch.testing.assert_close(ours(images[:2]), logits, rtol=0, atol=1e-12)
    assert len(representations) == 1 + len(expected) == 9
    for ours_at, theirs_at in zip(representations[1:], expected, strict=True):
        torch.testing.assert_close(ours_at, theirs_at, rtol=0, atol=1e-12)


def _torchvision_key(key: str) -> str:
    """``segments.3.projection.0.weight`` -> ``layer2.0.downsample.0.weight``."""
    parts = key.split(".")
    if parts[0] == "head":
        return f"fc.{parts[-1]}"
    segment, rest = int(parts[1]), ".".join(parts[2:])
    if segment == 0:
        return rest.replace("conv.", "conv1.").replace("bn.", "bn1.")
    stage, block = divmod(segment - 1, 2)
    return f"layer{stage + 1}.{block}.{rest.replace('projection', 'downsample')}"


def test_sixteen_small_resnets_have_112_positions() -> None:
    small = [name for name in BLOCKS if name.startswith("R") and len(name) == 5]
    assert len(small) == 16
    assert sum(1 + sum(BLOCKS[name]) for name in small) == 112


@pytest.mark.parametrize("architecture", ["R1111", "R2121", "ResNet34"])
def test_positions_and_tails_agree_with_the_whole_network(architecture: str, images: torch.Tensor) -> None:
    chain = network(architecture)
    with torch.no_grad():
        logits, representations = chain(images), chain.representations(images)
        for j, representation in enumerate(representations):
            assert representation.shape[1:] == chain.positions[j].shape
            torch.testing.assert_close(chain.tail(representation, j), logits)
            assert chain.tail(representation[:3], j).shape == (3, 10)
    assert [(p.name, p.shape) for p in chain.positions] == position_shapes(BLOCKS[architecture], 4, (32, 32))


@pytest.mark.parametrize(("architecture", "size"), [("R1111", (32, 32)), ("R2121", (30, 25))])
def test_flops_without_weights_are_those_of_the_network(architecture: str, size: tuple[int, int]) -> None:
    chain = network(architecture, input_shape=(3, *size))
    flops = chain_flops(chain)
    assert len(flops) == len(chain.positions) + 1
    assert resnet_flops(BLOCKS[architecture], 4, 10, (3, *size)) == flops
    assert flops[0] == 2 * 3 * 9 * 4 * size[0] * size[1]


@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
def test_folded_batchnorm_reproduces_every_representation(size: tuple[int, int]) -> None:
    chain = network("R1212", input_shape=(3, *size))
    x = torch.randn(5, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frozen = FrozenNetwork(chain, dtype=torch.float64, device=CPU)
    with torch.no_grad():
        for ours, expected in zip(frozen.representations(x), chain.representations(x), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
        for j, representation in enumerate(frozen.representations(x)):
            torch.testing.assert_close(frozen.tail(representation, j), chain(x), rtol=1e-11, atol=1e-11)


def test_freezing_reads_the_chain_and_shares_nothing_with_it(images: torch.Tensor) -> None:
    chain = network("R1111")
    frozen = FrozenNetwork(chain, dtype=torch.float64, device=CPU)
    logits = frozen.tail(frozen.representations(images)[-1], 4)
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.zero_()
    torch.testing.assert_close(frozen.tail(frozen.representations(images)[-1], 4), logits, rtol=0, atol=0)
    assert logits.abs().max() > 0


def test_any_sequential_becomes_a_chain(images: torch.Tensor) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 16 * 16, 10),
    ).double()
    chain = Chain.from_module(model, images[:1], positions=["1", "2"])
    assert [(p.name, p.shape) for p in chain.positions] == [("1", (6, 32, 32)), ("2", (8, 16, 16))]
    with torch.no_grad():
        torch.testing.assert_close(chain(images), model(images))
    assert Chain.from_module(chain, images[:1]) is chain
    with pytest.raises(NetworkError, match="no position of Sequential matches '7'; it has 0, 1, 2, 3"):
        Chain.from_module(model, images[:1], positions=["7"])
    with pytest.raises(NetworkError, match="cannot cut a Linear"):
        Chain.from_module(nn.Linear(2, 2), images[:1])
    everywhere = Chain.from_module(model, images[:1])
    assert [(p.shape, p.layout) for p in everywhere.positions[2:]] == [((8, 16, 16), "map"), ((2048,), "vector")]


def test_a_sequential_that_uses_a_child_twice_keeps_both(images: torch.Tensor) -> None:
    relu = nn.ReLU()
    layers = nn.Conv2d(3, 6, 3, stride=4), relu, nn.Conv2d(6, 6, 3), relu, nn.Flatten(), nn.Linear(6 * 36, 10)
    model = nn.Sequential(*layers).double()
    chain = Chain.from_module(model, images[:1])
    assert [position.name for position in chain.positions] == ["0", "1", "2", "3", "4"]
    assert not chain.training
    with torch.no_grad():
        assert torch.equal(chain(images), model(images))


class Doubled(nn.Sequential):
    """More than its children."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * x)


def test_a_sequential_that_overrides_forward_is_traced(images: torch.Tensor) -> None:
    model = Doubled(nn.Conv2d(3, 6, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10)).double()
    chain = Chain.from_module(model, images[:1])
    with torch.no_grad():
        assert torch.equal(chain(images), model(images))


def test_in_place_activations_do_not_change_what_was_captured(images: torch.Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten()).double().eval()
    chain = Chain.from_module(model, images[:1])
    with torch.no_grad():
        _, normalised, rectified = chain.representations(images)
        torch.testing.assert_close(normalised, model[1](model[0](images)))
        assert normalised.min() < 0 <= rectified.min()
    assert model[2].inplace


def test_making_a_chain_changes_no_mode_and_no_statistics(images: torch.Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).double().train()
    Chain.from_module(model, images[:1], positions=["1"])
    assert model[1].training
    assert model[1].num_batches_tracked == 0


def test_positions_outside_the_network_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(NetworkError, match="position 5 does not exist: expected an index from 0 to 4"):
        network("R1111").tail(images, 5)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("R1111", NetworkName("R1111")),
        ("R1111@0", NetworkName("R1111")),
        ("R1212@3", NetworkName("R1212", seed=3)),
        ("R1111-random@1", NetworkName("R1111", True, 1)),
        ("ResNet34", NetworkName("ResNet34")),
    ],
)
def test_names_are_parsed_and_printed_alike(text: str, name: NetworkName) -> None:
    assert NetworkName.parse(text) == name
    assert NetworkName.parse(str(name)) == name


@pytest.mark.parametrize("text", ["R1113", "r1111", "R1111@x", "R111", "", "../R1111", "R1111-rand@0"])
def test_wrong_names_are_refused(text: str) -> None:
    with pytest.raises(NetworkError, match="expected an architecture out of R1111"):
        NetworkName.parse(text)


def test_widths_and_classes_shape_the_network() -> None:
    chain = SmallResNet((1, 1, 1, 1), width=6, classes=7, input_shape=(3, 24, 40))
    assert [position.shape for position in chain.positions] == [
        (6, 24, 40),
        (6, 24, 40),
        (12, 12, 20),
        (24, 6, 10),
        (48, 3, 5),
    ]
    assert chain(torch.zeros(2, 3, 24, 40)).shape == (2, 7)
