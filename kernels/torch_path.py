"""The stitches of one geometry class in plain torch: used on the CPU, and on CUDA where it is named.

One GEMM per stitch at source resolution, written straight into the receiver's batch. Neither function has an
autograd formula: the engine calls the second in its backward pass.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def space_to_depth(x_NHWC: Tensor, down: int) -> Tensor:
    """(..., H, W, C) -> (..., H/k, W/k, k*k*C), features ordered (ky, kx, c); a view for k = 1, else one copy."""
    if down == 1:
        return x_NHWC
    *lead, height, width, channels = x_NHWC.shape
    cells = x_NHWC.reshape(*lead, height // down, down, width // down, down, channels)
    return cells.transpose(-4, -3).reshape(*lead, height // down, width // down, down * down * channels)


def stitch_out(
    x_SNHWC: Tensor,
    w_KFD: Tensor,
    b_KD: Tensor,
    out_KBPQD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None = None,
    *,
    down: int = 1,
    up: int = 1,
) -> None:
    """Apply K stitches and write them into ``out_KBPQD`` (contiguous; a slice of the receiver's batch).

    Stitch k reads ``x_SNHWC[source[k]]``; ``index_B`` (int64) picks the batch's images, None takes all N.
    All tensors share one dtype and device.
    """
    rows = _rows(x_SNHWC, source, index_B, down)
    for k, position in enumerate(source):
        x_MF = rows[position]
        out_BPQD = out_KBPQD[k]
        if up == 1:
            torch.addmm(b_KD[k], x_MF, w_KFD[k], out=out_BPQD.view(-1, out_BPQD.shape[-1]))
            continue
        images, height, width, channels = out_BPQD.shape
        y = torch.addmm(b_KD[k], x_MF, w_KFD[k]).view(images, height // up, 1, width // up, 1, channels)
        out_BPQD.view(images, height // up, up, width // up, up, channels).copy_(y)


def stitch_grad(
    x_SNHWC: Tensor,
    g_KBPQD: Tensor,
    dw_KFD: Tensor,
    db_KD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None = None,
    *,
    down: int = 1,
    up: int = 1,
) -> None:
    """Write the gradients of weights and biases of K stitches into ``dw_KFD`` and ``db_KD`` (the master dtype).

    ``g_KBPQD`` is the gradient of the receiver's batch. There is no gradient for x: the sender is frozen.
    """
    rows = _rows(x_SNHWC, source, index_B, down)
    for k, position in enumerate(source):
        g_BPQD = g_KBPQD[k]
        if up > 1:
            summed = F.avg_pool2d(g_BPQD.permute(0, 3, 1, 2), up, divisor_override=1)
            g_BPQD = summed.permute(0, 2, 3, 1)
        g_BMD = g_BPQD.flatten(1, 2)
        dw_KFD[k].copy_(rows[position].t() @ g_BMD.flatten(0, 1))
        # image by image first: a sum that changes the dtype on the way is many times slower
        torch.sum(g_BMD.sum(1), 0, dtype=db_KD.dtype, out=db_KD[k])


def _rows(x_SNHWC: Tensor, source: Sequence[int], index_B: Tensor | None, down: int) -> dict[int, Tensor]:
    """The GEMM rows (M, F) of every sender position that is used, each made once."""
    rows = {}
    for position in dict.fromkeys(source):
        x_BHWC = x_SNHWC[position] if index_B is None else x_SNHWC[position].index_select(0, index_B)
        cells = space_to_depth(x_BHWC, down)
        rows[position] = cells.reshape(-1, cells.shape[-1])
    return rows
