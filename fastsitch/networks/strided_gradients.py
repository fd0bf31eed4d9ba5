"""Weight gradients of strided convolutions on CPUs, for training beside other busy programs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MOST_THREADS = 4
"""Measured on two, where one thread takes as long as both; from here on more of them are left as they are."""


@contextmanager
def steady_gradients(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Let strided convolutions of a network in training compute the gradient of their weights on one thread.

    oneDNN's threads wait for each other inside that kernel, by spinning: beside one other busy program it took 1,024 ms
    instead of 2.6 (2 cores, bf16, 16 to 32 channels, 32x32, batch 128). One thread takes 2.8, busy or not. With many
    threads, which one would not keep up with, with devices other than CPUs and with grouped convolutions all is as
    torch does it.

    Those of 1x1 convolutions are one product, with any number of threads: oneDNN 3.12 (torch 2.14) writes beyond its
    memory there, with fewer than 8 channels of fp32 on processors without AVX-512, and the process dies.
    """
    steady = wants_steadiness(device)
    changed = [
        module
        for module in (network.modules() if device.type == "cpu" else ())
        if isinstance(module, nn.Conv2d)
        and _is_plain_and_strided(module)
        and (steady or (_is_pointwise(module.weight) and not any(module.padding)))
    ]
    for module in changed:
        module.forward = partial(_forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def wants_steadiness(device: torch.device) -> bool:
    """Whether one thread is as fast as all of them."""
    return device.type == "cpu" and torch.get_num_threads() <= _MOST_THREADS


def steady_convolution(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """A convolution without padding, the gradient of whose weight (D, C, k, k) is computed on one thread."""
    y: Tensor = _Convolution.apply(x, weight, (stride, stride), (0, 0), (1, 1))
    return y + bias.view(-1, 1, 1)


def _is_plain_and_strided(module: nn.Conv2d) -> bool:
    return (
        type(module) is nn.Conv2d
        and max(module.stride) > 1
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        # what somebody put there already
        and "forward" not in module.__dict__
    )


def _is_pointwise(weight: Tensor) -> bool:
    return weight.shape[2:].numel() == 1


def _forward(module: nn.Conv2d, x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    y: Tensor = _Convolution.apply(x, weight, module.stride, module.padding, module.dilation)
    return y if bias is None else y + bias.view(-1, 1, 1)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *geometry: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        stride, padding, dilation = geometry
        return F.conv2d(x, weight, None, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        x_gradient = _gradients(g, x, weight, ctx.geometry, [True, False, False])[0] if needs_x else None
        weight_gradient = None
        stride, padding, _ = ctx.geometry
        if needs_weight and _is_pointwise(weight) and not any(padding):
            rows = x[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1).reshape(-1, x.shape[1])
            weight_gradient = (g.permute(0, 2, 3, 1).reshape(-1, g.shape[1]).t() @ rows).view(weight.shape)
        elif needs_weight:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                weight_gradient = _gradients(g, x, weight, ctx.geometry, [False, True, False])[1]
            finally:
                torch.set_num_threads(threads)
        return x_gradient, weight_gradient, None, None, None


def _gradients(
    g: Tensor, x: Tensor, weight: Tensor, geometry: tuple[tuple[int, int], ...], wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation = geometry
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, [0, 0], 1, wanted
    )
    return found
