"""Frozen convolutions: BatchNorm folded in, gradients of their input only."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, losses and master parameters: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fold_batchnorm(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals ``conv`` followed by ``bn`` in eval mode, at least in fp32.

    ``torch.nn.utils.fusion`` gives the same weight, but multiplies in another order for the bias, whose last bit then
    often differs.
    """
    dtype = accumulation_dtype(conv.weight.dtype)
    mean, variance = cast(Tensor, bn.running_mean).to(dtype), cast(Tensor, bn.running_var).to(dtype)
    scale = bn.weight.detach().to(dtype) * torch.rsqrt(variance + bn.eps)
    weight = conv.weight.detach().to(dtype) * scale[:, None, None, None]
    bias = bn.bias.detach().to(dtype) - mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias.detach().to(dtype) * scale
    return weight, bias


def folded(conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight in ``dtype``, channels-last, on the device; bias still exact, on the CPU."""
    weight, bias = fold_batchnorm(conv, bn)
    return weight.to(device, dtype).contiguous(memory_format=torch.channels_last), bias


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """A convolution that keeps the size, or divides it by ``stride``: 3x3 with padding 1, or 1x1."""
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)


def input_gradient(g: Tensor, like: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The gradient for the input of :func:`convolve`; of ``like``, which has that input's shape, no value is read."""
    padding = weight.shape[-1] // 2
    gradient: Tensor = torch.ops.aten.convolution_backward(
        g,
        like,
        weight,
        None,
        [stride, stride],
        [padding, padding],
        [1, 1],
        False,
        [0, 0],
        1,
        [True, False, False],
    )[0]
    return gradient


def add_projection(y: Tensor, x: Tensor, weight: Tensor, stride: int) -> None:
    """Add a 1x1 convolution of x to y, which is contiguous in channels-last memory: one GEMM."""
    rows = x.permute(0, 2, 3, 1)[:, ::stride, ::stride].reshape(-1, x.shape[1])
    y.permute(0, 2, 3, 1).view(-1, y.shape[1]).addmm_(rows, weight[:, :, 0, 0].t())


def projection_rows(weight: Tensor, stride: int) -> Tensor:
    """The weight (D, C, 1, 1) of a projection as (D, stride * C): zeros for the columns that it skips."""
    rows = weight.new_zeros(weight.shape[0], stride * weight.shape[1])
    rows[:, : weight.shape[1]] = weight[:, :, 0, 0]
    return rows


def projection_gradient(g: Tensor, rows_DF: Tensor, stride: int, width: int) -> Tensor:
    """The gradient (B, C, P, width) of a projection for every ``stride``-th row of its input; it is 0 for the others.

    One GEMM. The zeros of :func:`projection_rows` make whole rows of it, which add up faster than single columns. (The
    library's gradient of such a convolution ran at 8 to 20 % of the speed of the 3x3 ones.)
    """
    images, channels, height, columns = g.shape
    rows = (g.permute(0, 2, 3, 1).reshape(-1, channels) @ rows_DF).view(images, height, columns * stride, -1)
    # where the width is no multiple of the stride, the last columns do not exist
    return rows[:, :, :width].permute(0, 3, 1, 2)
