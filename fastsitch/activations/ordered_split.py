"""One split of a network's representations in the order of the data set, for passes that need no shuffling."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastsitch.activations.representation_batch import Shape
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.activations.store import ActivationStore
from fastsitch.chains.layout import index_among_equal_shapes

_READ_IMAGES = 1024
"""Images per read from a store: whole chunks at every position."""


class OrderedSplit(Protocol):
    """``shapes`` lists the shape of every position, (C, H, W) for maps; ``labels`` and ``ids`` (N,) say which images
    these are.

    ``images(position, start, stop)`` are the rows of images start ... stop - 1, (n, H, W, C) for maps.
    """

    shapes: Sequence[Shape]
    labels: Tensor
    ids: Tensor

    def images(self, position: int, start: int, stop: int) -> Tensor: ...


class ResidentSplitInOrder:
    """The training or test images of a resident source; nothing is copied."""

    def __init__(self, source: ResidentSource, split: str = "train") -> None:
        self._split = source.train if split == "train" else source.test
        self.shapes: Sequence[Shape] = source.shapes
        self._stack_index = index_among_equal_shapes(source.shapes)
        self.labels = self._split.labels
        self.ids = self._split.ids

    def images(self, position: int, start: int, stop: int) -> Tensor:
        return self._split.stack(self.shapes[position])[self._stack_index[position], start:stop]


class StoredSplitInOrder:
    """One split of a store, read chunk by chunk: at most 1,024 images of every position are in memory.

    Values are those of the compute dtype, as any other source of this store would hold them.
    """

    def __init__(
        self, store: ActivationStore, split: str = "train", *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._store = store
        self._split = split
        self._dtype = dtype
        self._device = device
        self.shapes: Sequence[Shape] = store.shapes()
        self.labels = store.labels(split).to(device)
        self.ids = store.ids(split).to(device)
        self._blocks: dict[int, tuple[int, Tensor]] = {}

    def images(self, position: int, start: int, stop: int) -> Tensor:
        first = start - start % _READ_IMAGES
        assert stop <= first + _READ_IMAGES, "a request must not cross a multiple of 1,024 images"
        if self._blocks.get(position, (-1,))[0] != first:
            end = min(first + _READ_IMAGES, len(self.labels))
            block = self._store.read(self._split, position, first, end).to(self._device, self._dtype)
            self._blocks[position] = (first, block)
        return self._blocks[position][1][start - first : stop - first]
