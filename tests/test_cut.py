"""Any traceable network as a chain: exact composition, identity stitches, names, layouts, refusals."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fastsitch.chains.chain import Chain
from fastsitch.chains.layout import Layout
from fastsitch.errors import NetworkError

TORCHVISION: dict[str, tuple[int, dict[str, int]]] = {
    "resnet18": (32, {}),
    "resnet50": (32, {}),
    "vgg11_bn": (32, {}),
    "densenet121": (32, {}),
    "mobilenet_v3_small": (32, {}),
    "efficientnet_b0": (32, {}),
    "convnext_tiny": (32, {}),
    "regnet_y_400mf": (32, {}),
    "vit_b_16": (32, {"image_size": 32}),
    "swin_t": (64, {}),
}
"""Side of the images, and options."""

TIMM = {"resnet10t": 32, "vit_tiny_patch16_224": 32, "convnext_atto": 32, "swin_tiny_patch4_window7_224": 64}


def images(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def randomised(model: nn.Module) -> nn.Module:
    """With BatchNorm that is not the identity, and no weights that are zero or tiny from the start."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and (tensor.dim() < 2 or name.endswith("layer_scale")):
            low = 0.5 if name.endswith(("weight", "var", "gamma", "layer_scale")) else -0.3
            nn.init.uniform_(tensor, low, low + 0.6, generator=generator)
        elif tensor.is_floating_point() and not tensor.any():
            nn.init.normal_(tensor, std=0.1, generator=generator)
    return model.eval()


def torchvision_model(name: str) -> tuple[nn.Module, int]:
    side, options = TORCHVISION[name]
    torch.manual_seed(0)
    return randomised(torchvision.models.get_model(name, weights=None, num_classes=7, **options)), side


def timm_model(name: str) -> tuple[nn.Module, int]:
    timm = pytest.importorskip("timm")
    side = TIMM[name]
    torch.manual_seed(0)
    options = {"img_size": side} if "patch" in name else {}
    return randomised(timm.create_model(name, pretrained=False, num_classes=7, **options)), side


@torch.no_grad()
def assert_cuts_are_exact(model: nn.Module, side: int) -> Chain:
    """At every position: the segments give the network's output, bit by bit, also for another batch size."""
    everywhere = Chain.from_module(model, images(1, side), positions="*")
    for count in (2, 5):
        x = images(count, side)
        expected = model(x)
        assert not torch.equal(expected, model(x.flip(2)))
        assert torch.equal(everywhere(x), expected)
        representations = everywhere.representations(x)
        for position, representation in zip(everywhere.positions, representations, strict=True):
            assert tuple(representation.shape) == (count, *position.shape)
            # a tail from every position is much work: of the second size from some
            if count == 2 or position.index % 4 == 0:
                assert torch.equal(everywhere.tail(representation, position.index), expected), position
    assert len({position.name for position in everywhere.positions}) == len(everywhere.positions)
    chain = Chain.from_module(model, images(1, side))
    x = images(3, side)
    assert torch.equal(chain(x), model(x))
    return chain


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks_are_cut_exactly(name: str) -> None:
    chain = assert_cuts_are_exact(*torchvision_model(name))
    assert len(chain.positions) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm_networks_are_cut_exactly(name: str) -> None:
    chain = assert_cuts_are_exact(*timm_model(name))
    assert len(chain.positions) > 4


def positions(name: str, chosen: str | None = None) -> list[tuple[str, tuple[int, ...]]]:
    model, side = torchvision_model(name)
    return [
        (position.name, position.shape)
        for position in Chain.from_module(model, images(1, side), positions=chosen).positions
    ]


@pytest.mark.slow
def test_the_default_is_the_stem_and_the_outputs_of_blocks() -> None:
    assert positions("resnet18") == [
        ("maxpool", (64, 8, 8)),
        *((f"layer1.{block}", (64, 8, 8)) for block in (0, 1)),
        *((f"layer2.{block}", (128, 4, 4)) for block in (0, 1)),
        *((f"layer3.{block}", (256, 2, 2)) for block in (0, 1)),
        *((f"layer4.{block}", (512, 1, 1)) for block in (0, 1)),
    ]
    vit = positions("vit_b_16")
    assert vit[0] == ("encoder.dropout", (5, 768))
    assert [name for name, _ in vit[1:]] == [f"encoder.layers.encoder_layer_{block}" for block in range(12)]
    mobilenet = positions("mobilenet_v3_small")
    assert [name for name, _ in mobilenet] == ["features.0.2", *(f"features.{block}" for block in range(1, 12))]
    densenet = positions("densenet121")
    assert [name for name, _ in densenet] == [
        "features.pool0",
        *(f"features.denseblock{block}" for block in range(1, 5)),
    ]
    # nothing branches: every layer up to its activation
    vgg = positions("vgg11_bn")
    assert [name for name, _ in vgg] == [
        *(f"features.{layer}" for layer in (2, 6, 10, 13, 17, 20, 24, 27)),
        "classifier.2",
        "classifier.5",
    ]


def test_positions_are_chosen_by_name_and_pattern_and_named_as_asked() -> None:
    blocks = [f"layer{stage}.{block}" for stage in range(1, 5) for block in (0, 1)]
    assert [name for name, _ in positions("resnet18", "layer*.?")] == blocks
    assert [name for name, _ in positions("resnet18", "layer4, layer1,bn1")] == ["bn1", "layer1", "layer4"]
    with pytest.raises(NetworkError, match=r"no position of ResNet matches 'layer5'; it has conv1, bn1, relu"):
        positions("resnet18", "layer1,layer5")
    with pytest.raises(NetworkError, match=r"no position of ResNet matches 'layer1\.0\.conv1'"):
        positions("resnet18", "layer1.0.conv1")


@pytest.mark.slow
def test_layouts_follow_the_axes_through_the_network() -> None:
    model, side = torchvision_model("vit_b_16")
    chain = Chain.from_module(model, images(1, side), positions="*")
    found = {
        position.name: (position.shape, position.layout, position.prefix_tokens, position.grid)
        for position in chain.positions
    }
    assert found["conv_proj"] == ((768, 2, 2), "map", 0, None)
    assert found["permute"] == ((4, 768), "tokens", 0, (2, 2))
    assert found["encoder.layers.encoder_layer_3"] == ((5, 768), "tokens", 1, (2, 2))
    assert found["getitem"] == ((768,), "vector", 0, None)
    # (B, C, N) is no layout
    assert "reshape" not in found
    model, side = torchvision_model("swin_t")
    swin = Chain.from_module(model, images(1, side))
    assert {position.layout for position in swin.positions} == {"map-last"}
    assert [position.shape for position in swin.positions[:3]] == [(16, 16, 96)] * 3
    model, side = torchvision_model("resnet18")
    resnet = Chain.from_module(model, images(1, side), positions="layer4,flatten")
    assert [(position.shape, position.layout) for position in resnet.positions] == [
        ((512, 1, 1), "map"),
        ((512,), "vector"),
    ]
    model, side = timm_model("vit_tiny_patch16_224")
    vit = Chain.from_module(model, images(1, side))
    assert {(position.layout, position.prefix_tokens, position.grid) for position in vit.positions} == {
        ("tokens", 1, (2, 2))
    }


def test_the_network_itself_is_unchanged() -> None:
    model, side = torchvision_model("densenet121")
    model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    chain = Chain.from_module(model, images(1, side))
    assert model.training
    assert any(getattr(module, "inplace", False) for module in model.modules())
    assert not any(getattr(module, "inplace", False) for module in chain.modules())
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "densenet121", "vit_b_16"])
def test_segments_run_in_another_dtype_and_have_gradients(name: str) -> None:
    model, side = torchvision_model(name)
    chain = Chain.from_module(model, images(1, side)).to(torch.float64)
    x = images(2, side).double()
    middle = len(chain.positions) // 2
    representation = chain.representations(x)[middle].detach().requires_grad_()
    kept = representation.detach().clone()
    chain.tail(representation, middle).logsumexp(1).sum().backward()
    assert torch.equal(representation, kept)
    assert representation.grad is not None
    assert representation.grad.abs().max() > 0


class Sized(nn.Module):
    """Sizes of the image are used behind every cut, and one activation is in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 5, 1)
        self.token = nn.Parameter(torch.randn(1, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        token = self.token.to(x.device, x.dtype).expand(batch, -1, -1)
        y = self.first(x)
        y = y.add_(-0.1)
        y = F.relu(y, inplace=True)
        y = self.second(y).reshape(batch, 5, height * width)
        return torch.cat([token, y], 2).view(batch * 5, -1).mean(1).reshape(batch, 5)


@torch.no_grad()
def test_sizes_from_before_a_cut_follow_from_what_it_gives() -> None:
    torch.manual_seed(0)
    model = Sized().eval()
    chain = Chain.from_module(model, images(1, 4), positions="*")
    assert [position.name for position in chain.positions] == ["first", "add_", "relu", "second"]
    for count in (1, 3, 7):
        x = images(count, 4)
        expected, representations = model(x), chain.representations(x)
        for position, representation in zip(chain.positions, representations, strict=True):
            kept = representation.clone()
            assert torch.equal(chain.tail(representation, position.index), expected)
            assert torch.equal(representation, kept)
    # before the in-place addition and the in-place activation
    first, added, rectified, _ = chain.representations(x)
    assert torch.equal(first - 0.1, added)
    assert added.min() < 0 <= rectified.min()
    doubled = chain.to(torch.float64)
    assert doubled.tail(doubled.representations(x.double())[1], 1).dtype == torch.float64


class Hidden(Sized):
    """With an activation in place, which the tracer does not name by its result."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.view(-1).add_(1.0)
        return self.second(y).mean((2, 3))


def test_a_change_that_the_graph_does_not_show_is_noticed() -> None:
    with pytest.raises(
        NetworkError, match="its segments do not reproduce the output of second; .*give its segments yourself"
    ):
        Chain.from_module(Hidden(), images(1, 4))


class Dense(Sized):
    """Takes one tensor or a list of them, as dense layers do; the tracer's stand-in is neither."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor | list[Tensor] = self.first(x)
        if isinstance(y, Tensor):
            y = [y]
        return self.second(torch.cat(y, 1)).mean((2, 3))


@torch.no_grad()
def test_what_the_tracer_cannot_stand_for_is_exported() -> None:
    model = Dense().eval()
    chain = Chain.from_module(model, images(1, 4), positions="*")
    assert {"first", "second"} <= {position.name for position in chain.positions}
    assert torch.equal(chain(images(5, 4)), model(images(5, 4)))


class Choosy(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = self.conv(x)
        return x


class Whole(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, stride=2)
        self.stage = make()
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.stage(self.stem(x)).mean((2, 3)))
        return logits


class Decides(Whole):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() < 9 else x


@torch.no_grad()
def test_a_module_that_cannot_be_traced_is_run_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    model = Whole(lambda: nn.Sequential(Choosy(), nn.ReLU(inplace=True), Choosy())).eval()
    with caplog.at_level(logging.INFO, "fastsitch"):
        chain = Chain.from_module(model, images(1, 8), positions="*")
    names = [position.name for position in chain.positions]
    assert names == ["stem", "stage.0", "stage.1", "stage.2", "mean"]
    for x in (images(3, 8), -images(3, 8)):
        assert torch.equal(chain(x), model(x))
        for index, representation in enumerate(chain.representations(x)):
            assert torch.equal(chain.tail(representation, index), model(x))
    assert "module stage.0 is run as a whole, it cannot be traced: Choosy" in caplog.text
    assert "if x.sum() > 0:" in caplog.text
    with pytest.raises(
        NetworkError, match=r"no position of Whole matches 'stage\.0\.conv'.*stage\.0 is run as a whole: Choosy"
    ):
        Chain.from_module(model, images(1, 8), positions=["stage.0.conv"])


def test_a_network_that_cannot_be_traced_names_module_and_line_and_the_way_out() -> None:
    model = Decides(nn.Identity).eval()
    with pytest.raises(NetworkError) as refused:
        Chain.from_module(model, images(1, 8))
    text = str(refused.value)
    assert text.startswith("cannot trace Decides, ")
    assert f"{Path(__file__).name}:" in text
    assert "'return super().forward(x) if x.mean() < 9 else x'" in text
    assert "Chain.from_segments(segments, names, head, example_input)" in text


@torch.no_grad()
def test_segments_can_be_given_by_name() -> None:
    model = Decides(lambda: nn.ReLU(inplace=True)).eval()
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.last)
    chain = Chain.from_segments([model.stem, model.stage], ["stem", "stage"], head, images(1, 8))
    x = images(4, 8)
    torch.testing.assert_close(chain(x), model(x))
    stem, stage = chain.representations(x)
    assert stem.min() < 0 <= stage.min()
    assert [(position.name, position.shape, position.layout) for position in chain.positions] == [
        ("stem", (4, 4, 4), "map"),
        ("stage", (4, 4, 4), "map"),
    ]
    tokens = Chain.from_segments(
        [model.stem, nn.Flatten(2)],
        ["stem", "tokens"],
        nn.Flatten(),
        images(1, 8),
        {"tokens": Layout("tokens", 3, (1, 1))},
    )
    assert tokens.positions[1].prefix_tokens == 3
    assert [position.layout for position in tokens.with_input().positions] == ["map", "map", "tokens"]
    six = nn.Sequential(nn.Conv2d(3, 6, 8), nn.Flatten(2))
    for segments, names, message in (
        ([model.stem], ["a", "b"], "1 segments and the names"),
        ([model.stem, model.stem], ["a", "a"], "as many different names"),
        ([model.stem, model.stem], ["a", "b"], "the segments do not fit together"),
        ([six], ["six"], "position 'six' has 6 tokens, which form no grid in the proportions of an image of 8x8"),
    ):
        with pytest.raises(NetworkError, match=message):
            Chain.from_segments(segments, names, nn.Flatten(), images(1, 8))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"maps": x}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "cannot cut a Linear: it does not run on images"),
        (Branches(), r"cannot cut a Branches: expected logits \(B, classes\), found a dict of maps \(3, 3, 8, 8\)"),
        (nn.Flatten(), "no tensor between its image and its logits lies on every path"),
    ],
)
def test_what_cannot_be_cut_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        Chain.from_module(model, images(1, 8))
