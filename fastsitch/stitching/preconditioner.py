"""Gradients of stitches with whitened inputs, from the moments that matching computes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsitch.stitching.cells import Cell
from fastsitch.stitching.matching import Matched
from fastsitch.stitching.moments import Inputs
from fastsitch.stitching.stitch_bank import Stack, StitchBank

DAMPING = 0.1
"""Added to the covariance of the inputs, relative to their mean variance."""


@dataclass(frozen=True)
class _InputGroup:
    """The stitches of a stack that have the same inputs: views of their gradients, and what those are changed by."""

    weight_grad_KFD: Tensor
    bias_grad_KD: Tensor
    mean_F: Tensor
    inverse_FF: Tensor


class Preconditioner:
    """Changes a bank's gradients so that SGD on them is SGD on stitches of centred and whitened inputs.

    Features of a layer differ in variance by orders of magnitude and are correlated, so that plain SGD learns some
    directions quickly and most of them slowly. With mean m and covariance C of the inputs, a stitch is written as
    y = (x - m) W + c and the gradient of W is multiplied by P = (C / v + 0.1)^-1, where v is the mean variance: white
    inputs hardly change it. It is the input half of K-FAC (Martens and Grosse 2015), exact and constant here since the
    sender is frozen. Not finite where the moments are not.
    """

    def __init__(self, bank: StitchBank, init: Mapping[Cell, Matched]) -> None:
        inverses: dict[int, Tensor] = {}
        self._groups = [
            group
            for stacks in bank.stacks.values()
            for stack in stacks
            for group in _input_groups(stack, init, inverses)
        ]

    def apply(self) -> None:
        """Change the gradients of all weights and biases, in place."""
        for group in self._groups:
            centred_KFD = group.weight_grad_KFD - group.mean_F[:, None] * group.bias_grad_KD[:, None]
            torch.matmul(group.inverse_FF, centred_KFD, out=group.weight_grad_KFD)
            group.bias_grad_KD.sub_(group.mean_F @ group.weight_grad_KFD)


def _input_groups(stack: Stack, init: Mapping[Cell, Matched], inverses: dict[int, Tensor]) -> list[_InputGroup]:
    """One group per run of stitches with the same inputs; inverses are shared by all stacks."""
    groups = []
    weight_KFD, bias_KD = stack.weight_grad_KFD, stack.bias_grad_KD
    start = 0
    while start < len(stack.cells):
        inputs = init[stack.cells[start]].inputs
        end = start + 1
        while end < len(stack.cells) and init[stack.cells[end]].inputs is inputs:
            end += 1
        if id(inputs) not in inverses:
            inverses[id(inputs)] = _inverse(inputs).to(weight_KFD)
        run = slice(start, end)
        groups.append(_InputGroup(weight_KFD[run], bias_KD[run], inputs.mean_F.to(bias_KD), inverses[id(inputs)]))
        start = end
    return groups


def _inverse(inputs: Inputs) -> Tensor:
    """P (F, F); NaN where the moments are not finite."""
    variance = inputs.scatter_FF.diagonal().mean()
    system_FF = inputs.scatter_FF / torch.where(variance > 0, variance, torch.ones_like(variance))
    system_FF.diagonal().add_(DAMPING)
    factor_FF, failed = torch.linalg.cholesky_ex(system_FF)
    return torch.cholesky_inverse(factor_FF) if not bool(failed) else torch.full_like(system_FF, float("nan"))
