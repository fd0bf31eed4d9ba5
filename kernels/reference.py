"""The reference: one stitch after the other, each as the plain convolution that defines it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_weight(w_FD: Tensor, down: int) -> Tensor:
    """A stitch's weight as that of a convolution, to be used in torch.

    Args:
        w_FD: weight (F, D), features ordered (ky, kx, c), as stitches are kept.
        down: by how much the stitch scales down, in each direction; 1 where it keeps the size or scales up.

    Returns:
        The same values, a view (D, C, down, down) with C = F / down².

    Raises:
        RuntimeError: F is no multiple of down².
    """
    features, receiver_channels = w_FD.shape
    channels = features // (down * down)
    return w_FD.view(down, down, channels, receiver_channels).permute(3, 2, 0, 1)


def gemm_weight(w_DCkk: Tensor) -> Tensor:
    """The inverse of :func:`conv_weight`: (D, C, k, k) -> (F, D)."""
    return w_DCkk.permute(2, 3, 1, 0).reshape(-1, w_DCkk.shape[0])


def grouped_stitch_reference(
    x_SNHWC: Tensor,
    w_KFD: Tensor,
    b_KD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None = None,
    *,
    down: int = 1,
    up: int = 1,
) -> Tensor:
    """Apply K stitches and return (K, B, P, Q, D).

    Stitch k reads sender position ``x_SNHWC[source[k]]``; ``index_B`` (int64) picks the batch's images from the N
    in memory, None takes them all. Differentiable in every argument.
    """
    outputs = []
    for k, position in enumerate(source):
        x = x_SNHWC[position] if index_B is None else x_SNHWC[position][index_B]
        x = x.permute(0, 3, 1, 2)
        if up > 1:
            x = F.interpolate(x, scale_factor=up, mode="nearest")
        y = F.conv2d(x, conv_weight(w_KFD[k], down), b_KD[k], stride=down)
        outputs.append(y.permute(0, 2, 3, 1))
    return torch.stack(outputs)
