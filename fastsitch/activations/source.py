"""What the engine asks of a sender's representations, wherever they come from."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.representation_batch import Batch, Shape
from fastsitch.errors import ConfigError, argument


class SourceSplit(Protocol):
    """The training or the test images; ``labels`` and ``ids`` (N,) int64, on the device, say which they are."""

    labels: Tensor
    ids: Tensor

    def __len__(self) -> int: ...

    def shuffled(self, order: ImageOrder, epoch: int, images: int, *, augment: bool = False) -> Iterator[Batch]:
        """An epoch in batches of ``images``; what is left over at the end is dropped.

        A batch may be valid only until the next one is drawn. ``augment`` asks for a new random view of every image;
        raises ConfigError where representations are not computed anew.
        """
        ...

    def in_order(self, images: int) -> Iterator[Batch]:
        """All images once, in the order of the data set; the last batch may be smaller."""
        ...


class Source(Protocol):
    """Both splits of one sender; ``shapes`` lists the shape of every position, (C, H, W) for maps."""

    shapes: Sequence[Shape]

    @property
    def train(self) -> SourceSplit: ...
    @property
    def test(self) -> SourceSplit: ...


def refuse_augmentation(augment: bool) -> None:
    """For sources of representations that were computed before: raise ConfigError when new views are asked for."""
    if augment:
        raise ConfigError(
            "this recipe shows new views of the images in every epoch, which stored representations cannot: "
            f"use {argument('source', 'live')}"
        )
