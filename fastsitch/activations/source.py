"""What the engine asks of a sender's representations, wherever they come from."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from fastsitch.activations.batch import Batch, Shape
from fastsitch.activations.order import ImageOrder


class SourceSplit(Protocol):
    """The training or the test images; ``labels`` and ``ids`` (N,) int64, on the device, say which they are."""

    labels: Tensor
    ids: Tensor

    def __len__(self) -> int: ...

    def shuffled(self, order: ImageOrder, epoch: int, images: int) -> Iterator[Batch]:
        """An epoch in batches of ``images``; what is left over at the end is dropped."""
        ...

    def in_order(self, images: int) -> Iterator[Batch]:
        """All images once, in the order of the data set; the last batch may be smaller."""
        ...


class Source(Protocol):
    """Both splits of one sender; ``shapes`` lists the shape (C, H, W) of every position."""

    shapes: Sequence[Shape]

    @property
    def train(self) -> SourceSplit: ...
    @property
    def test(self) -> SourceSplit: ...
