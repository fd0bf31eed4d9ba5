"""A sender's representations held in device memory."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.representation_batch import Batch, Shape
from fastsitch.activations.source import refuse_augmentation
from fastsitch.activations.store import ActivationStore
from fastsitch.chains.layout import ABSENT, elements, index_among_equal_shapes, stored_size
from fastsitch.chains.position import Position
from fastsitch.errors import MemoryLimitError, argument
from fastsitch.machine import available_memory

_READ_IMAGES = 1024
"""Images per read from a store: whole chunks at every position."""

MEMORY_LIMIT = 0.9
"""A source may take at most this share of the free memory."""


class ResidentSplit:
    """One split: labels (N,) int64 and, per shape, the sender positions of that shape as one (S, N, H, W, C).

    ``ids`` (N,) int64 say which images these are; 0, 1, ... when left out.
    """

    def __init__(self, stacks: dict[Shape, Tensor], labels: Tensor, ids: Tensor | None = None) -> None:
        self._stacks = stacks
        self.labels = labels
        self.ids = torch.arange(len(labels), device=labels.device) if ids is None else ids

    def __len__(self) -> int:
        return len(self.labels)

    def stack(self, shape: Shape) -> Tensor:
        """All positions of one shape, in their order, as (S, N, H, W, C)."""
        return self._stacks[shape]

    def batch(self, index: Tensor) -> Batch:
        """The images ``index`` (int64, on the same device)."""
        return Batch(self._stacks, index, self.labels.index_select(0, index))

    def shuffled(self, order: ImageOrder, epoch: int, images: int, *, augment: bool = False) -> Iterator[Batch]:
        """An epoch in batches of ``images``; what is left over at the end is dropped."""
        refuse_augmentation(augment)
        permutation = order.epoch(epoch, len(self)).to(self.labels.device)
        for start in range(0, len(self) - images + 1, images):
            yield self.batch(permutation[start : start + images])

    def in_order(self, images: int) -> Iterator[Batch]:
        """All images once, in the order of the data set; the last batch may be smaller."""
        for start in range(0, len(self), images):
            yield self.batch(torch.arange(start, min(start + images, len(self)), device=self.labels.device))


class ResidentSource:
    """Both splits of one sender; ``shapes`` lists the shape of every position, (C, H, W) for maps."""

    def __init__(self, shapes: Sequence[Shape], train: ResidentSplit, test: ResidentSplit) -> None:
        self.shapes: Sequence[Shape] = list(shapes)
        self.train = train
        self.test = test

    @classmethod
    def load(
        cls, store: ActivationStore, *, dtype: torch.dtype, device: torch.device, chosen: Sequence[int] | None = None
    ) -> "ResidentSource":
        """Read a store, or its positions that are ``chosen``, into the memory of ``device``, in the compute dtype.

        Raises MemoryLimitError before anything is read when it does not fit.
        """
        shapes = store.shapes(chosen)
        needed = sum(map(elements, shapes)) * sum(store.sizes.values()) * dtype.itemsize
        available = available_memory(device)
        if needed > MEMORY_LIMIT * available:
            raise MemoryLimitError(
                f"the representations in {store.path} need {needed / 1e9:.1f} GB of {device.type} memory, "
                f"{available / 1e9:.1f} GB are free: "
                f"use {argument('source', 'streamed')} or {argument('source', 'live')}"
            )
        splits = {
            split: ResidentSplit(
                _read_stacks(store, split, shapes, dtype, device),
                store.labels(split).to(device),
                store.ids(split).to(device),
            )
            for split in store.sizes
        }
        return cls(shapes, splits["train"], splits["test"])

    @classmethod
    def from_tensors(
        cls,
        train: Sequence[Tensor],
        test: Sequence[Tensor],
        train_labels: Tensor,
        test_labels: Tensor,
        positions: Sequence[Position] | None = None,
    ) -> "ResidentSource":
        """From raw representations in memory, one tensor per position: maps (N, C, H, W) without ``positions``."""
        if positions is None:
            positions = [Position(index, str(index), tuple(x.shape[1:])) for index, x in enumerate(train)]
        return cls(
            [position.rows for position in positions],
            ResidentSplit(stack_positions(positions, train), train_labels),
            ResidentSplit(stack_positions(positions, test), test_labels),
        )


def stack_positions(
    positions: Sequence[Position], representations: Sequence[Tensor], into: Mapping[Shape, Tensor] | None = None
) -> dict[Shape, Tensor]:
    """The rows of raw representations at all positions, stacked per shape: (S, N, H, W, C) for maps.

    They are written ``into`` the tensors of an earlier call for as many images, where those are given.
    """
    rows: dict[Shape, list[Tensor]] = {}
    for position, x in zip(positions, representations, strict=True):
        rows.setdefault(position.rows, []).append(position.to_rows(x))
    return {shape: torch.stack(each, out=into[shape] if into else None) for shape, each in rows.items()}


def empty_stacks(
    shapes: Sequence[Shape], images: int, *, dtype: torch.dtype, device: torch.device
) -> dict[Shape, Tensor]:
    """Memory for the rows of so many images at positions of these shapes: (S, N, H, W, C) per shape, for maps."""
    return {
        shape: torch.empty(count, images, *stored_size(shape), shape[0], dtype=dtype, device=device)
        for shape, count in Counter(shapes).items()
        if shape != ABSENT
    }


def _read_stacks(
    store: ActivationStore, split: str, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device
) -> dict[Shape, Tensor]:
    images = store.sizes[split]
    stacks = empty_stacks(shapes, images, dtype=dtype, device=device)
    for position, stack_index in enumerate(index_among_equal_shapes(shapes)):
        if shapes[position] == ABSENT:
            continue
        stack = stacks[shapes[position]][stack_index]
        for start in range(0, images, _READ_IMAGES):
            stop = min(start + _READ_IMAGES, images)
            stack[start:stop] = store.read(split, position, start, stop).to(device)
    return stacks
