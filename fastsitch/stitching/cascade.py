"""One pass through a frozen receiver for stitches into all its positions.

The batch grows on the way: what left block j, then the outputs of the stitches into position j, goes into
block j+1. One forward and one backward pass serve every cell of a group.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fastsitch.chains.layout import elements, stored_size
from fastsitch.receivers.contract import FrozenReceiver, Saved

Fill = Callable[[int, Tensor], None]
"""fill(j, out_KBPQD): write the outputs of the stitches into position j."""


class Cascade:
    """Buffers and passes for ``counts[j]`` stitches into each receiver position j, ``images`` images each.

    Samples are ordered stitch by stitch, stitches by position; the batch at position j holds all stitches into
    positions 0 ... j. On the way back gradients overwrite the activations. All passes use the same memory.
    """

    def __init__(self, receiver: FrozenReceiver, counts: Sequence[int], images: int) -> None:
        assert len(counts) == len(receiver.positions)
        self.receiver = receiver
        self.images = images
        self.ends = list(accumulate(counts))
        self.starts = [end - count for end, count in zip(self.ends, counts, strict=True)]
        self._kept: list[Tensor] = []
        self._passing: list[Tensor] = []
        self._saved: list[Saved] = []

    def forward(self, fill: Fill) -> Tensor:
        """Logits (stitches, images, classes), in the accumulation dtype; keeps what ``backward`` needs."""
        if not self._kept:
            self._allocate()
        return self._run(fill, self._kept, self._saved)

    def infer(self, fill: Fill) -> Tensor:
        """The same logits; keeps nothing."""
        if not self._passing:
            self._passing = self._buffers(reuse=True)
        return self._run(fill, self._passing, None)

    def backward(self, g_logits: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Given the gradient of the logits, yield (j, gradient (K, B, P, Q, D) of the stitch outputs), last j first."""
        segments = self.receiver.segments
        g = self._kept[-1]
        self.receiver.head.backward(g_logits.flatten(0, 1), g[: self._samples(-1)], self._rectified(-1))
        for j in range(len(self.ends) - 1, -1, -1):
            if self.ends[j] > self.starts[j]:
                yield j, self._slots(g, j)
            if self.starts[j] == 0:
                return
            x = self._kept[j - 1]
            segments[j].backward(g, x, self._saved[j], self._samples(j - 1), self._rectified(j - 1))
            g = x

    def _run(self, fill: Fill, buffers: list[Tensor], saved: list[Saved] | None) -> Tensor:
        fill(0, self._slots(buffers[0], 0))
        for j in range(1, len(self.ends)):
            segment, x, out, carried = self.receiver.segments[j], buffers[j - 1], buffers[j], self._samples(j - 1)
            if carried and saved is not None:
                segment.forward(x, out, saved[j], carried)
            elif carried:
                segment.infer(x, out, carried)
            # after the block, which may write beyond what was carried
            fill(j, self._slots(out, j))
        x = buffers[-1][: self._samples(-1)]
        return torch.unflatten(self.receiver.head.forward(x), 0, (self.ends[-1], self.images))

    def _allocate(self) -> None:
        segments = self.receiver.segments
        self._kept = self._buffers(reuse=self.receiver.masked)
        self._saved = [[]]
        for j in range(1, len(self.ends)):
            carried = self._samples(j - 1)
            self._saved.append(segments[j].memory(self._kept[j][:carried]) if carried else [])

    def _buffers(self, *, reuse: bool) -> list[Tensor]:
        """One buffer per position; with ``reuse`` every other position has the same memory."""
        receiver = self.receiver
        rounded = [-(-end * self.images // receiver.micro_batch) * receiver.micro_batch for end in self.ends]
        sizes = [
            samples * elements(position.rows) for samples, position in zip(rounded, receiver.positions, strict=True)
        ]
        memory = [_empty(max(sizes[first::2], default=0), receiver) for first in (range(2) if reuse else ())]
        buffers = []
        for j, (samples, position) in enumerate(zip(rounded, receiver.positions, strict=True)):
            flat = memory[j % 2][: sizes[j]] if reuse else _empty(sizes[j], receiver)
            buffers.append(position.to_raw(flat.view(samples, *stored_size(position.rows), position.rows[0])))
        return buffers

    def _samples(self, j: int) -> int:
        return self.ends[j] * self.images

    def _rectified(self, j: int) -> int:
        """Samples at position j whose gradient is wanted before the ReLU they come from."""
        return self.starts[j] * self.images if self.receiver.segments[j].rectifies else 0

    def _slots(self, batch: Tensor, j: int) -> Tensor:
        """The samples of the batch at position j that the stitches into it write, as (K, B, P, Q, D)."""
        stitches = self.ends[j] - self.starts[j]
        rows = self.receiver.positions[j].to_rows(batch)[self.starts[j] * self.images : self._samples(j)]
        return torch.unflatten(rows, 0, (stitches, self.images))


def _empty(size: int, receiver: FrozenReceiver) -> Tensor:
    return torch.empty(size, dtype=receiver.dtype, device=receiver.device)


def cross_entropy(logits_KBc: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy per stitch, a mean over the batch (K,), and the gradient of their sum for the logits."""
    log_probability = torch.log_softmax(logits_KBc, -1)
    labels_KB1 = labels_B.expand(logits_KBc.shape[0], -1).unsqueeze(-1)
    images = labels_B.shape[0]
    loss_K = -log_probability.gather(-1, labels_KB1).squeeze(-1).mean(-1)
    gradient = log_probability.exp().scatter_add_(
        -1, labels_KB1, torch.full_like(labels_KB1, -1, dtype=logits_KBc.dtype)
    )
    return loss_K, gradient.div_(images)
