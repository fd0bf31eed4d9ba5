"""All stitches in one pass through the receiver, as an engineer writes it in plain torch: the cascade by autograd."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsitch.benchmark.bench_pair import BenchPair
from fastsitch.benchmark.one_by_one_peers import Stitches, new_stitch, optimizer, provided
from fastsitch.benchmark.peer_receivers import peer_tail
from fastsitch.kernels.reference import gemm_weight
from fastsitch.stitching.cells import Cell


class PlainCascade:
    """From stored representations, through the frozen receiver in the compute dtype: stitches join where they lead to.

    On CUDA the whole pass is compiled.
    """

    def __init__(self, pair: BenchPair, cells: Sequence[Cell]) -> None:
        self._pair = pair
        self._tail = peer_tail(pair.receiver, pair.dtype, pair.device)
        self._stitches = {cell: new_stitch(pair, cell) for cell in sorted(cells, key=lambda cell: cell.j)}
        self._optimizer = optimizer([p for stitch in self._stitches.values() for p in stitch.parameters()])
        self._loss = torch.compile(self.loss) if pair.device.type == "cuda" else self.loss

    @torch.enable_grad()
    def run(self, batches: Sequence[Tensor]) -> None:
        """One step of all stitches per batch."""
        senders = sorted({cell.i for cell in self._stitches})
        for index in batches:
            self._optimizer.zero_grad(set_to_none=True)
            representations = {i: provided(self._pair, i, index) for i in senders}
            self._loss(representations, self._pair.source.train.labels[index]).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()

    def loss(self, representations: dict[int, Tensor], labels: Tensor) -> Tensor:
        """The sum over the stitches of their mean losses."""
        cells = list(self._stitches)
        carried: list[Tensor] = []
        for j in range(len(self._tail.blocks) + 1):
            if carried:
                carried = [self._tail.blocks[j - 1](torch.cat(carried))]
            carried += [self._stitches[cell](representations[cell.i]) for cell in cells if cell.j == j]
        logits = self._tail.classify(torch.cat(carried))
        return F.cross_entropy(logits, labels.repeat(len(cells)), reduction="sum") / len(labels)

    def stitches(self) -> Stitches:
        """What has been learned so far."""
        return {
            cell: (gemm_weight(stitch.weight.detach()), stitch.bias.detach()) for cell, stitch in self._stitches.items()
        }
