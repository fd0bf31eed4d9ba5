"""Training computes some gradients in another way on CPUs: they are the same."""

import copy

import pytest
import torch
from torch import nn

from fastsitch.networks.strided_gradients import steady_convolution, steady_gradients

CPU = torch.device("cpu")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(2, 1), bias=False),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.Conv2d(8, 8, 1, stride=2),
        nn.Conv2d(8, 8, 3, padding="same"),
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_are_those_of_autograd(mixed: bool) -> None:
    plain, steady = model(), model()
    x = torch.randn(4, 3, 33, 33)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = []
    for network, given, changes in ((plain, inputs[0], False), (steady, inputs[1], True)):
        with (
            steady_gradients(network, CPU if changes else torch.device("meta")),
            torch.autocast("cpu", torch.bfloat16, enabled=mixed),
        ):
            assert ("forward" in network[0].__dict__) == changes
            outputs.append(network(given))
        outputs[-1].float().square().sum().backward()
    tolerance = {"rtol": 0.05, "atol": 0.05} if mixed else {"rtol": 1e-4, "atol": 1e-4}
    assert outputs[0].dtype == outputs[1].dtype
    torch.testing.assert_close(*outputs, **tolerance)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)
    for one, other in zip(plain.parameters(), steady.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        scale = one.grad.abs().max()
        assert (one.grad - other.grad).abs().max() <= (0.03 if mixed else 1e-4) * scale
    assert not any("forward" in module.__dict__ for module in steady)


def test_frozen_weights_and_threads_are_left_as_they_are() -> None:
    network = model()
    network[0].requires_grad_(False)
    before, threads = copy.deepcopy(network.state_dict()), torch.get_num_threads()
    with steady_gradients(network, CPU):
        network(torch.randn(2, 3, 33, 33)).sum().backward()
    assert network[0].weight.grad is None
    assert network[2].weight.grad is not None
    assert torch.get_num_threads() == threads
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert network[0].forward.__func__ is nn.Conv2d.forward


def test_a_single_convolution_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((4, 6, 16, 16), (5, 6, 4, 4), (5,)))
    found = []
    for convolve in (nn.functional.conv2d, steady_convolution):
        given = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        convolve(*given, 4).square().sum().backward()
        found.append([tensor.grad for tensor in given])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [9, 16])
def test_projections_of_few_channels_are_those_of_autograd_in_fp64(size: int) -> None:
    torch.manual_seed(2)
    projection = nn.Conv2d(2, 4, 1, stride=2).to(memory_format=torch.channels_last)
    exact = copy.deepcopy(projection).double()
    # again and again: on some processors the gradient of oneDNN writes beyond its memory, which shows later
    for _ in range(50):
        x = torch.randn(16, 2, size, size).contiguous(memory_format=torch.channels_last)
        projection.zero_grad()
        exact.zero_grad()
        with steady_gradients(projection, CPU):
            projection(x).square().sum().backward()
        exact(x.double()).square().sum().backward()
        assert projection.weight.grad is not None
        assert exact.weight.grad is not None
        torch.testing.assert_close(projection.weight.grad.double(), exact.weight.grad, rtol=1e-4, atol=1e-3)
