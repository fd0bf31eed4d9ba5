"""The parameters of all stitches in a group: stacked per geometry, in one flat tensor for one optimizer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsitch.activations.representation_batch import Batch
from fastsitch.chains.layout import index_among_equal_shapes
from fastsitch.identity import torch_generator
from fastsitch.kernels import stitch_functions
from fastsitch.kernels.reference import gemm_weight
from fastsitch.receivers.convolution import accumulation_dtype
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.geometry import DEFAULT_RULES, Geometry, Rules, Shape

_ALIGNMENT = 64
"""Every stack starts at a multiple of so many elements, so that kernels may load 16 bytes at a time."""


@dataclass(frozen=True)
class Stack:
    """K stitches of one geometry into one receiver position."""

    geometry: Geometry
    cells: tuple[Cell, ...]
    source: tuple[int, ...]
    weight_KFD: Tensor
    bias_KD: Tensor
    weight_grad_KFD: Tensor
    bias_grad_KD: Tensor
    master_weight_KFD: Tensor
    master_bias_KD: Tensor


class StitchBank:
    """All stitches of a group: fp32 (or fp64) masters, their gradients, and a copy in the compute dtype, ``dtype``.

    ``kernel`` names the implementation of the stitch operator, ``rules`` says what shapes leave open. ``cells`` (read
    it after construction) is the order of the receiver's batch: by receiver position, within one position by geometry.
    ``parameters`` is the flat master tensor that the optimizer owns.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        sender: Sequence[Shape],
        receiver: Sequence[Shape],
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernel: str = "torch",
        rules: Rules = DEFAULT_RULES,
    ) -> None:
        self.kernel = kernel
        self.dtype = dtype
        self._apply, self._differentiate = stitch_functions(kernel)
        layout = _layout(cells, sender, receiver, rules)
        sizes = [len(group) * geometry.parameters for _, geometry, group in layout]
        starts, total = [], 0
        for size in sizes:
            starts.append(total)
            total += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.parameters = torch.zeros(total, dtype=accumulation_dtype(dtype), device=device)
        self.parameters.grad = torch.zeros_like(self.parameters)
        self._compute = self.parameters if dtype == self.parameters.dtype else self.parameters.to(dtype)
        self.stacks: dict[int, list[Stack]] = {}
        stack_index = index_among_equal_shapes(sender)
        for (j, geometry, group), start in zip(layout, starts, strict=True):
            master = _views(self.parameters, start, len(group), geometry)
            stack = Stack(
                geometry,
                tuple(group),
                tuple(stack_index[cell.i] for cell in group),
                *_views(self._compute, start, len(group), geometry),
                *_views(self.parameters.grad, start, len(group), geometry),
                *master,
            )
            self.stacks.setdefault(j, []).append(stack)
            for k, cell in enumerate(group):
                weight, bias = initial_stitch(cell, geometry)
                master[0][k].copy_(gemm_weight(weight))
                master[1][k].copy_(bias)
        self.cells = [cell for _, _, group in layout for cell in group]
        self.counts = [sum(cell.j == j for cell in cells) for j in range(len(receiver))]

    def load(self, stitches: Mapping[Cell, tuple[Tensor, Tensor]]) -> None:
        """Put weight (F, D) and bias (D,) of every cell in ``stitches`` in place of its initial ones."""
        for stacks in self.stacks.values():
            for stack in stacks:
                for k, cell in enumerate(stack.cells):
                    if cell in stitches:
                        weight_FD, bias_D = stitches[cell]
                        stack.master_weight_KFD[k].copy_(weight_FD)
                        stack.master_bias_KD[k].copy_(bias_D)
        self.refresh()

    def refresh(self) -> None:
        """Bring the compute copy up to date with the masters."""
        if self._compute is not self.parameters:
            self._compute.copy_(self.parameters)

    def forward(self, j: int, batch: Batch, out_KBPQD: Tensor) -> None:
        """Write the outputs of all stitches into position ``j``, in the order of ``cells``."""
        start = 0
        for stack in self.stacks.get(j, ()):
            end = start + len(stack.cells)
            x, index, down, up = self._operand(stack.geometry, batch)
            self._apply(
                x,
                stack.weight_KFD,
                stack.bias_KD,
                out_KBPQD[start:end],
                stack.source,
                index,
                down=down,
                up=up,
            )
            start = end

    def backward(self, j: int, batch: Batch, g_KBPQD: Tensor) -> None:
        """Write the parameter gradients of all stitches into position ``j``."""
        start = 0
        for stack in self.stacks.get(j, ()):
            end = start + len(stack.cells)
            x, index, down, up = self._operand(stack.geometry, batch)
            self._differentiate(
                x,
                g_KBPQD[start:end],
                stack.weight_grad_KFD,
                stack.bias_grad_KD,
                stack.source,
                index,
                down=down,
                up=up,
            )
            start = end

    def _operand(self, geometry: Geometry, batch: Batch) -> tuple[Tensor, Tensor | None, int, int]:
        """What the operator gets as x, index, down and up."""
        if geometry.alignment is not None:
            return batch.aligned(geometry.alignment), None, 1, 1
        return *batch.operand(geometry.sender, geometry.down, self.kernel), geometry.up

    def stitches(self) -> Mapping[Cell, tuple[Tensor, Tensor]]:
        """Per cell the master weight (F, D) and bias (D,), copied to the CPU."""
        return {
            cell: (stack.master_weight_KFD[k].cpu().clone(), stack.master_bias_KD[k].cpu().clone())
            for stacks in self.stacks.values()
            for stack in stacks
            for k, cell in enumerate(stack.cells)
        }

    def finite(self) -> Tensor:
        """Per cell, in the order of ``cells``, whether all its parameters are finite (bool, on the device)."""
        return torch.cat(
            [
                stack.master_weight_KFD.isfinite().flatten(1).all(1) & stack.master_bias_KD.isfinite().all(1)
                for j in sorted(self.stacks)
                for stack in self.stacks[j]
            ]
        )


def initial_stitch(cell: Cell, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The initial weight (D, C, k, k) and bias (D,) of a cell, fp32 on the CPU: those of a PyTorch convolution.

    Drawn from a generator seeded by the cell's identity alone, so neither grouping nor device matters.
    """
    generator = torch_generator(*cell.identity)
    channels = geometry.sender[0]
    weight = torch.empty(geometry.receiver[0], channels, geometry.down, geometry.down)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(geometry.features)
    bias = torch.empty(geometry.receiver[0]).uniform_(-bound, bound, generator=generator)
    return weight, bias


def _layout(
    cells: Sequence[Cell], sender: Sequence[Shape], receiver: Sequence[Shape], rules: Rules
) -> list[tuple[int, Geometry, list[Cell]]]:
    """Cells by receiver position, then by geometry in the order of the sender's positions, then sorted."""
    groups: dict[tuple[int, Geometry], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.j, cell.i, cell.unit)):
        geometry = Geometry.between(sender[cell.i], receiver[cell.j], rules)
        groups.setdefault((cell.j, geometry), []).append(cell)
    return [(j, geometry, group) for (j, geometry), group in groups.items()]


def _views(flat: Tensor, start: int, stitches: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    features, channels = geometry.features, geometry.receiver[0]
    middle = start + stitches * features * channels
    end = middle + stitches * channels
    return flat[start:middle].view(stitches, features, channels), flat[middle:end].view(stitches, channels)
