"""Matched stitches: the affine maps of least squared error to the expected representation, without training."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsitch.stitching.moments import CellMoments, Inputs

RIDGE = 1e-10
"""Added to the diagonal, which is 1 once the inputs are centred and scaled."""

_CONSTANT = 1e-24
"""An input with a variance below this share of its squared mean counts as constant: the variance is rounding."""


@dataclass(frozen=True)
class Matched:
    """A matched stitch, exact and in fp64: weight (F, D), features ordered (ky, kx, c), bias (D,), and its error ES."""

    weight_FD: Tensor
    bias_D: Tensor
    error: float
    """Mean squared error to the expected representation over the training images."""
    method: str
    """``cholesky``, or ``eigen`` where that failed."""
    inputs: Inputs
    """Moments of the stitch's inputs, shared with all cells that have the same."""


@torch.no_grad()
def match(moments: Mapping[tuple[int, int], CellMoments], ridge: float = RIDGE) -> dict[tuple[int, int], Matched]:
    """The matched stitch of every cell.

    Cells with the same inputs are solved together, by Cholesky or, where that fails, by eigendecomposition. Inputs
    that do not vary get weight 0. ``ridge`` is relative to the diagonal of the scaled system.
    """
    shared: dict[int, list[tuple[int, int]]] = {}
    for cell, cell_moments in moments.items():
        shared.setdefault(id(cell_moments.inputs), []).append(cell)
    matched: dict[tuple[int, int], Matched] = {}
    for cells in shared.values():
        cross = torch.cat([moments[cell].cross_FD for cell in cells], 1)
        weights, method = _solve(moments[cells[0]].inputs, cross, ridge)
        widths = [moments[cell].cross_FD.shape[1] for cell in cells]
        for cell, weight_FD in zip(cells, torch.split(weights, widths, 1), strict=True):
            known, weight_FD = moments[cell], weight_FD.contiguous()
            bias_D = known.mean_D - known.inputs.mean_F @ weight_FD
            matched[cell] = Matched(weight_FD, bias_D, known.error(weight_FD, bias_D), method, known.inputs)
    return {cell: matched[cell] for cell in moments}


def _solve(inputs: Inputs, cross_FD: Tensor, ridge: float) -> tuple[Tensor, str]:
    """Solve for the weights of all columns at once; NaN where the moments are not finite."""
    variance_F = inputs.scatter_FF.diagonal()
    varies_F = variance_F > _CONSTANT * inputs.rows * inputs.mean_F.square()
    # a zero row, column and right-hand side give weight 0
    inverse_F = torch.where(varies_F, variance_F, 1.0).rsqrt() * varies_F
    system_FF = inputs.scatter_FF * inverse_F[:, None] * inverse_F
    system_FF.diagonal().fill_(1.0 + ridge)
    right_FD = cross_FD * inverse_F[:, None]
    if not bool(system_FF.isfinite().all()):
        return torch.full_like(cross_FD, float("nan")), "none"
    factor_FF, failed = torch.linalg.cholesky_ex(system_FF)
    if not bool(failed):
        return torch.cholesky_solve(right_FD, factor_FF) * inverse_F[:, None], "cholesky"
    values_F, vectors_FF = torch.linalg.eigh(system_FF)
    cut = len(values_F) * torch.finfo(values_F.dtype).eps * values_F[-1]
    reciprocal_F = torch.where(values_F > cut, 1 / values_F, torch.zeros_like(values_F))
    solution_FD = vectors_FF @ (reciprocal_F[:, None] * (vectors_FF.T @ right_FD))
    return solution_FD * inverse_F[:, None], "eigen"
