"""Stitches trained many at a time with what PyTorch offers: torch.func, and grouped convolutions.

Both take the cells of one receiver position after the other, from stored representations, through the frozen receiver
in the compute dtype. They are for small ResNets, whose blocks are written so that both can run them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from fastsitch.benchmark.bench_pair import BenchPair
from fastsitch.benchmark.one_by_one_peers import Stitch, Stitches, new_stitch, optimizer, provided
from fastsitch.benchmark.peer_receivers import FoldedBlock, FoldedConv, FoldedTail
from fastsitch.kernels.reference import gemm_weight
from fastsitch.networks.resnet import SmallResNet
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.geometry import Geometry


class StackedTrainer(ABC):
    """What both have in common: parameters stacked by receiver position and geometry, one optimizer."""

    def __init__(self, pair: BenchPair, cells: Sequence[Cell]) -> None:
        self.pair = pair
        assert isinstance(pair.receiver, SmallResNet)
        self.tail = FoldedTail(pair.receiver, pair.dtype).to(pair.device)
        self.groups: dict[int, dict[Geometry, list[Cell]]] = {}
        for cell in cells:
            self.groups.setdefault(cell.j, {}).setdefault(pair.geometry(cell), []).append(cell)
        self.modules: dict[tuple[int, Geometry], Stitch] = {}
        self.parameters: dict[tuple[int, Geometry], dict[str, Tensor]] = {}
        for j, geometries in self.groups.items():
            for geometry, members in geometries.items():
                modules = [new_stitch(pair, cell) for cell in members]
                self.modules[j, geometry] = modules[0]
                with torch.enable_grad():
                    self.parameters[j, geometry], _ = stack_module_state(modules)
        self._optimizer = optimizer([p for stack in self.parameters.values() for p in stack.values()])  # type: ignore[misc]

    @torch.enable_grad()
    def run(self, batches: Sequence[Tensor]) -> None:
        """One step of all stitches per batch."""
        for index in batches:
            labels = self.pair.source.train.labels[index]
            self._optimizer.zero_grad(set_to_none=True)
            for j in self.groups:
                logits = self.logits(j, index)
                stitches, _, classes = logits.shape
                loss = F.cross_entropy(logits.reshape(-1, classes), labels.repeat(stitches), reduction="sum")
                (loss / len(labels)).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()

    @abstractmethod
    def logits(self, j: int, index: Tensor) -> Tensor:
        """(K, B, classes) of the stitches into position j."""

    def stitches(self) -> Stitches:
        """What has been learned so far."""
        return {
            cell: (gemm_weight(stack["weight"][k].detach()), stack["bias"][k].detach())
            for (j, geometry), stack in self.parameters.items()
            for k, cell in enumerate(self.groups[j][geometry])
        }


class Vmapped(StackedTrainer):
    """torch.func: functional_call of the stacked stitches, then the receiver, both under vmap."""

    def logits(self, j: int, index: Tensor) -> Tensor:
        outputs = []
        for geometry, members in self.groups[j].items():
            module = self.modules[j, geometry]

            def call(parameters: dict[str, Tensor], x: Tensor, module: nn.Module = module) -> Tensor:
                y: Tensor = functional_call(module, parameters, (x,))
                return y

            x_KBHWC = torch.stack([provided(self.pair, cell.i, index) for cell in members])
            outputs.append(vmap(call)(self.parameters[j, geometry], x_KBHWC))
        logits: Tensor = vmap(lambda x: self.tail(x, j))(torch.cat(outputs))
        return logits


class Grouped(StackedTrainer):
    """Horizontally fused training: K copies of stitch and receiver as one network of grouped convolutions.

    Source: Wang et al. 2021, "Horizontally Fused Training Array" (HFTA).
    """

    def __init__(self, pair: BenchPair, cells: Sequence[Cell]) -> None:
        super().__init__(pair, cells)
        self._tails = {
            j: [_FusedBlock(block, self._count(j)) for block in list(self.tail.blocks)[j:]] for j in self.groups
        }

    def logits(self, j: int, index: Tensor) -> Tensor:
        count = self._count(j)
        outputs = []
        for geometry, members in self.groups[j].items():
            x = torch.cat([provided(self.pair, cell.i, index).permute(0, 3, 1, 2) for cell in members], 1)
            if geometry.up > 1:
                x = F.interpolate(x, scale_factor=geometry.up, mode="nearest")
            stack = self.parameters[j, geometry]
            weight, bias = stack["weight"].flatten(0, 1).to(x.dtype), stack["bias"].flatten().to(x.dtype)
            outputs.append(F.conv2d(x, weight, bias, geometry.down, groups=len(members)))
        y = torch.cat(outputs, 1)
        for block in self._tails[j]:
            y = block(y)
        pooled = torch.unflatten(y.mean((2, 3), dtype=self.tail.accumulation), 1, (count, -1)).transpose(0, 1)
        weights = self.tail.weight.t().expand(count, -1, -1)
        return torch.baddbmm(self.tail.bias.expand(count, 1, -1), pooled, weights)

    def _count(self, j: int) -> int:
        return sum(len(members) for members in self.groups[j].values())


class _FusedConv:
    def __init__(self, conv: FoldedConv, copies: int) -> None:
        self.weight = conv.weight.repeat(copies, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        self.bias = conv.bias.repeat(copies)
        self.stride, self.padding, self.copies = conv.stride, conv.padding, copies

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=self.copies)


class _FusedBlock:
    def __init__(self, block: nn.Module, copies: int) -> None:
        assert isinstance(block, FoldedBlock)
        self.conv1, self.conv2 = _FusedConv(block.conv1, copies), _FusedConv(block.conv2, copies)
        self.projection = None if block.projection is None else _FusedConv(block.projection, copies)

    def __call__(self, x: Tensor) -> Tensor:
        shortcut = x if self.projection is None else self.projection(x)
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + shortcut)
