"""What the engine asks of a receiver, of its segments and of its head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastsitch.chains.position import Position

Saved = list[Tensor]
"""What a segment keeps between its forward and its backward pass."""


@dataclass(frozen=True)
class SegmentMemory:
    """Bytes that a training step takes for a segment, beside the representations and the weights."""

    kept: int
    """Per image, between the forward and the backward pass."""
    working: int
    """Per image of a micro-batch, while one of the passes runs."""
    images: int | None
    """In a micro-batch; None: as many as pass through the segment."""


class FrozenSegment(Protocol):
    """What the engine asks of a segment.

    ``x`` and ``out`` may hold more samples than the first ``samples``, which alone are used. Gradients overwrite the
    activations they belong to, so that no memory is needed beside the activations.
    """

    @property
    def rectifies(self) -> bool:
        """Whether ``backward`` wants the gradient of the *input* of the segment's last ReLU.

        What overwrites the segment's output with its gradient has that output at hand, and applies the ReLU's.
        """
        ...

    @property
    def keeps_input(self) -> bool:
        """Whether ``backward`` reads values of x, so that x may not be overwritten in between."""
        ...

    def infer(self, x: Tensor, out: Tensor, samples: int) -> None:
        """Write the output for x into ``out``."""
        ...

    def memory(self, out: Tensor) -> Saved:
        """Buffers for what the gradient needs, for as many samples as ``out`` has."""
        ...

    def forward(self, x: Tensor, out: Tensor, saved: Saved, samples: int) -> None:
        """The same as ``infer``; fills ``saved``."""
        ...

    def backward(self, g: Tensor, x: Tensor, saved: Saved, samples: int, rectified: int) -> None:
        """Overwrite x with its gradient, given that of the output.

        The first ``rectified`` samples of x are outputs of a ReLU, and the gradient of its input is wanted.
        """
        ...


class FrozenHead(Protocol):
    """From the last representation to logits in the accumulation dtype, and back."""

    def forward(self, x: Tensor) -> Tensor: ...

    def backward(self, g: Tensor, x: Tensor, rectified: int) -> None:
        """Overwrite x with its gradient, as segments do."""
        ...


Statistics = Mapping[str, Tensor]
"""Running statistics of one stitch, (D,) each: ``block2.bn1.running_mean``, ``block2.bn1.running_var`` and so on, for
every BatchNorm layer of the segments that it passes through. Segment p ends in position p."""


class FrozenReceiver(Protocol):
    """What a pass for many stitches asks of a receiver; see :class:`FrozenNetwork`."""

    @property
    def positions(self) -> tuple[Position, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def masked(self) -> bool: ...
    @property
    def segments(self) -> Sequence[FrozenSegment]: ...
    @property
    def head(self) -> FrozenHead: ...

    def statistics(self, stitch: int) -> Statistics:
        """Running statistics of one stitch, copied to the CPU; none where BatchNorm is folded."""
        ...


class Receiver(Protocol):
    """What the engine asks of a receiver: its shapes, and its form for so many stitches into each position."""

    @property
    def positions(self) -> tuple[Position, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    def for_stitches(self, counts: Sequence[int]) -> FrozenReceiver:
        """What the stitches pass through, ``counts[j]`` of them from position j on."""
        ...
