"""One pass through a frozen receiver for stitches into all its positions.

The batch grows on the way: what left block j, then the outputs of the stitches into position j, goes into
block j+1. One forward and one backward pass serve every cell of a group.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fastsitch.networks.frozen import FrozenNetwork, Saved, channels_last

Fill = Callable[[int, Tensor], None]
"""fill(j, out_KBPQD): write the outputs of the stitches into position j."""


class Cascade:
    """Buffers and passes for ``counts[j]`` stitches into each receiver position j, ``images`` images each.

    Samples are ordered stitch by stitch, stitches by position; the batch at position j holds all stitches into
    positions 0 ... j.
    """

    def __init__(self, receiver: FrozenNetwork, counts: Sequence[int], images: int) -> None:
        assert len(counts) == len(receiver.positions)
        self.receiver = receiver
        self.images = images
        self.ends = list(accumulate(counts))
        self.starts = [end - count for end, count in zip(self.ends, counts, strict=True)]
        self._buffers: list[Tensor] = []
        self._saved: list[Saved] = []

    def forward(self, fill: Fill) -> Tensor:
        """Logits (stitches, images, classes), in the accumulation dtype; keeps what ``backward`` needs."""
        if not self._buffers:
            self._buffers = [self._buffer(j) for j in range(len(self.ends))]
        self._saved = [()]
        fill(0, self._slots(self._buffers[0], 0))
        for j in range(1, len(self.ends)):
            x, out = self._buffers[j - 1], self._buffers[j]
            carried = x.shape[0]
            saved = self.receiver.segments[j].forward(x, out[:carried]) if carried else ()
            self._saved.append(saved)
            fill(j, self._slots(out, j))
        return self._logits(self._buffers[-1])

    def infer(self, fill: Fill) -> Tensor:
        """The same logits; keeps nothing."""
        x = self._buffer(0)
        fill(0, self._slots(x, 0))
        for j in range(1, len(self.ends)):
            out = self._buffer(j)
            carried = x.shape[0]
            if carried:
                self.receiver.segments[j].infer(x, out[:carried])
            fill(j, self._slots(out, j))
            x = out
        return self._logits(x)

    def backward(self, g_logits: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Given the gradient of the logits, yield (j, gradient (K, B, P, Q, D) of the stitch outputs), last j first."""
        g = self.receiver.head.backward(g_logits.flatten(0, 1), self._buffers[-1])
        for j in range(len(self.ends) - 1, -1, -1):
            if self.ends[j] > self.starts[j]:
                yield j, self._slots(g, j)
            if self.starts[j] == 0:
                return
            carried = self.starts[j] * self.images
            x, out = self._buffers[j - 1], self._buffers[j][:carried]
            g = self.receiver.segments[j].backward(g[:carried], x, out, self._saved[j])

    def _buffer(self, j: int) -> Tensor:
        receiver = self.receiver
        return channels_last(self.ends[j] * self.images, receiver.positions[j].shape, receiver.dtype, receiver.device)

    def _slots(self, batch: Tensor, j: int) -> Tensor:
        """The part of the batch at position j that belongs to the stitches into it, as (K, B, P, Q, D)."""
        stitches = self.ends[j] - self.starts[j]
        own = batch.permute(0, 2, 3, 1)[self.starts[j] * self.images :]
        return torch.unflatten(own, 0, (stitches, self.images))

    def _logits(self, x: Tensor) -> Tensor:
        return torch.unflatten(self.receiver.head.forward(x), 0, (self.ends[-1], self.images))


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
