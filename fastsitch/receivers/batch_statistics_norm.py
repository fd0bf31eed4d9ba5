"""BatchNorm with statistics of each stitch's samples alone, as a network in training mode would compute them.

Many stitches pass through a layer side by side, each with the same number of consecutive samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.errors import ConfigError, NetworkError, argument
from fastsitch.receivers.convolution import accumulation_dtype

BATCH, USE_FROZEN = argument("receiver_bn", "batch"), f"use {argument('receiver_bn', 'frozen')}"
"""How errors name the option, and what they advise."""


@dataclass(frozen=True)
class NormWeights:
    """A frozen BatchNorm layer: weights and the network's statistics (D,), in the accumulation dtype."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    variance: Tensor
    eps: float
    momentum: float

    @classmethod
    def of(cls, layer: nn.BatchNorm2d, dtype: torch.dtype, device: torch.device) -> "NormWeights":
        """Copies for a receiver that computes in ``dtype``; raises NetworkError for a layer of another kind."""
        mean, variance, momentum = layer.running_mean, layer.running_var, layer.momentum
        if mean is None or variance is None or momentum is None:
            raise NetworkError(
                f"{BATCH}: expected BatchNorm layers with running statistics and a momentum; {USE_FROZEN}"
            )
        exact = accumulation_dtype(dtype)
        gamma, beta = (
            layer.weight.detach().to(device, exact, copy=True) if layer.affine else None,
            layer.bias.detach().to(device, exact, copy=True) if layer.affine else None,
        )
        mean, variance = (tensor.to(device, exact, copy=True) for tensor in (mean, variance))
        return cls(gamma, beta, mean, variance, layer.eps, momentum)


class StitchNorm:
    """One BatchNorm layer for the K stitches that pass through it.

    y, out and g are (k * images, D, P, Q), channels-last: the samples of k stitches, the first of which is ``first``.
    Running statistics begin as the network's, and move with the layer's momentum to the mean and the unbiased variance
    of each batch, as nn.BatchNorm2d does it.
    """

    def __init__(self, weights: NormWeights, stitches: int) -> None:
        self.weights = weights
        self.running_mean_KD = weights.mean.repeat(stitches, 1)
        self.running_var_KD = weights.variance.repeat(stitches, 1)
        self._mean_KD = torch.empty_like(self.running_mean_KD)
        self._invstd_KD = torch.empty_like(self.running_mean_KD)

    def infer(self, y: Tensor, out: Tensor, first: int, images: int) -> None:
        """Normalise by the running statistics; ``out`` may be y itself."""
        w = self.weights
        for k, (y_k, out_k) in _stitches(first, images, y, out):
            mean, variance = self.running_mean_KD[k], self.running_var_KD[k]
            out_k.copy_(F.batch_norm(y_k, mean, variance, w.gamma, w.beta, False, 0.0, w.eps))

    def forward(self, y: Tensor, out: Tensor, first: int, images: int) -> None:
        """Normalise by the mean and the biased variance of the batch, and move the running statistics.

        Raises ConfigError where a stitch has a single value per channel, which has no variance.
        """
        w = self.weights
        _require_statistics(y, images)
        for k, (y_k, out_k) in _stitches(first, images, y, out):
            torch.ops.aten.native_batch_norm.out(
                y_k,
                w.gamma,
                w.beta,
                self.running_mean_KD[k],
                self.running_var_KD[k],
                True,
                w.momentum,
                w.eps,
                out=out_k,
                save_mean=self._mean_KD[k],
                save_invstd=self._invstd_KD[k],
            )

    def backward(self, g: Tensor, y: Tensor, out: Tensor, first: int, images: int, *, relu: bool = False) -> None:
        """Write the gradient for the y of the last ``forward`` into ``out``, which may be g itself.

        ``g`` is that of the layer's output or, with ``relu``, that of a ReLU behind it.
        """
        w = self.weights
        for k, (g_k, y_k, out_k) in _stitches(first, images, g, y, out):
            mean, invstd = self._mean_KD[k], self._invstd_KD[k]
            if relu:
                # computed once more, one stitch at a time, rather than kept for all of them
                normalised = F.batch_norm(y_k, mean, invstd.pow(-2) - w.eps, w.gamma, w.beta, False, 0.0, w.eps)
                g_k = torch.ops.aten.threshold_backward(g_k, normalised, 0)
            gradient = torch.ops.aten.native_batch_norm_backward(
                g_k, y_k, w.gamma, None, None, mean, invstd, True, w.eps, [True, False, False]
            )[0]
            out_k.copy_(gradient)

    def differentiable(self, y: Tensor, first: int, images: int, *, batch: bool) -> Tensor:
        """What ``forward`` (with ``batch``) or ``infer`` writes, as a tensor that autograd can differentiate."""
        w = self.weights
        if batch:
            _require_statistics(y, images)
        return torch.cat(
            [
                F.batch_norm(
                    y_k, self.running_mean_KD[k], self.running_var_KD[k], w.gamma, w.beta, batch, w.momentum, w.eps
                )
                for k, (y_k,) in _stitches(first, images, y)
            ]
        )


def _require_statistics(y: Tensor, images: int) -> None:
    if images * y.shape[2] * y.shape[3] < 2:
        raise ConfigError(
            f"{BATCH}: a batch of one 1x1 map has no variance: expected {argument('batch_size')} of 2 or more"
        )


def _stitches(first: int, images: int, *tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """The number of every stitch, and its samples."""
    return enumerate(zip(*(torch.split(tensor, images) for tensor in tensors), strict=True), first)
