"""Frozen segments as graphs: the values and gradients of the modules they come from, with less kept in between."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from fastsitch.chains.chain import Chain
from fastsitch.receivers.affine_folding import fold_affine
from fastsitch.receivers.frozen_graph import FrozenGraph, trace_frozen
from fastsitch.receivers.frozen_segments import AutogradSegment
from fastsitch.receivers.graph_halves import GraphHalves, halve
from tests.test_cut import randomised

CPU = torch.device("cpu")
IMAGES = 5


def frozen(module: nn.Module, x: Tensor) -> tuple[FrozenGraph, GraphHalves]:
    graph = trace_frozen(module, module, x)
    fold_affine(graph)
    return graph, halve(graph, CPU)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "vit":
        return models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10
        )
    if name == "densenet":
        return models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=10)
    if name == "swin":
        return models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=10)
    if name == "convnext":
        return models.ConvNeXt([models.convnext.CNBlockConfig(8, 16, 2), models.convnext.CNBlockConfig(16, None, 2)])
    return models.get_model(name, num_classes=10)


@pytest.mark.parametrize(
    ("name", "most_kept"),
    [
        ("resnet18", 0.5),
        ("mobilenet_v3_small", 0.4),
        ("efficientnet_b0", 0.5),
        ("regnet_y_400mf", 0.5),
        ("densenet", 0.5),
        ("convnext", 1),
        ("vit", 1),
        ("swin", 1),
    ],
)
def test_values_and_gradients_are_those_of_autograd(name: str, most_kept: float) -> None:
    model = randomised(network(name)).eval().double().requires_grad_(False)
    chain = Chain.from_module(model, torch.zeros(1, 3, 32, 32))
    x = torch.randn(IMAGES, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    before = copy.deepcopy(chain.state_dict())
    kept = keeps = 0
    for segment in chain.segments:
        graph, halves = frozen(segment, x)
        constants = graph.values()
        given = x.clone().requires_grad_()
        expected = segment(given)
        autograd = AutogradSegment(segment, torch.float64, CPU)
        autograd.note_cost(x, expected.detach())
        g = torch.randn_like(expected)
        (wanted,) = torch.autograd.grad(expected, given, g)
        with torch.no_grad():
            y, between = halves.forward(IMAGES, *constants, x)
            assert torch.equal(halves.infer(IMAGES, *constants, x), y)
            arriving = g * (y > 0) if halves.rectifies else g
            found = halves.backward(IMAGES, *constants, x, *between, arriving)
            y = y.relu() if halves.rectifies else y
        assert (y - expected).norm() <= 1e-12 * expected.norm()
        assert (found - wanted).norm() <= 1e-12 * wanted.norm()
        assert IMAGES * halves.kept_bytes == sum(tensor.nbytes for tensor in between)
        if segment is not chain.segments[0]:
            kept, keeps = kept + IMAGES * halves.kept_bytes, keeps + IMAGES * autograd.cost.kept
        x = expected.detach()
    assert kept <= most_kept * keeps
    assert all(torch.equal(tensor, before[key]) for key, tensor in chain.state_dict().items())


def test_frozen_affine_maps_become_part_of_what_they_follow() -> None:
    torch.manual_seed(0)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gamma = nn.Linear(6, 4), nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :4] + self.gamma * self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = randomised(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Dropout(), Scaled()))
    model = model.eval().requires_grad_(False)
    x = torch.randn(3, 3, 8, 8)
    graph, _ = frozen(model, x)
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert not [name for name in called if "norm" in name or "aten.mul" in name or "dropout" in name]
    assert sum("aten.add." in name for name in called) == 1
    # in the exact dtype, before it is cast
    assert all(value.dtype == torch.float32 for value in graph.exact.values())


def test_what_other_operations_read_is_not_folded_away() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + self.norm(y)

    model = randomised(Twice()).eval().double().requires_grad_(False)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    graph, halves = frozen(model, x)
    torch.testing.assert_close(halves.infer(3, *graph.values(), x), model(x), rtol=1e-12, atol=1e-12)
    assert halves.kept_bytes == 0
