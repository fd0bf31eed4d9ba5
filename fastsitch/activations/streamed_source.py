"""A sender's representations read from its store while they are used: for stores larger than memory."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.read_ahead import ReadAhead
from fastsitch.activations.representation_batch import Batch, Shape
from fastsitch.activations.resident_source import empty_stacks
from fastsitch.activations.source import refuse_augmentation
from fastsitch.activations.store import ActivationStore
from fastsitch.activations.stream_plan import StreamPlan, stream_capacity
from fastsitch.chains.layout import ABSENT, index_among_equal_shapes

READ_AHEAD = 2
"""Blocks that are read, or being read, and not yet copied to their slots."""

_Block = tuple[list[Tensor], torch.cuda.Event | None]


class StreamedSplit:
    """One split of a store, of which a window is in memory at a time.

    A thread reads whole blocks ahead, each once per pass. They take the slots of images that have been used, so that
    the next window is in memory when the last image of the one before it is drawn. A batch is valid until the next one
    is drawn. Iterators raise StoreError when they come to a damaged chunk.
    """

    def __init__(
        self,
        store: ActivationStore,
        split: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        chosen: Sequence[int] | None = None,
    ) -> None:
        self._store = store
        self._split = split
        self._dtype = dtype
        self._device = device
        shapes = store.shapes(chosen)
        self._held = [index for index, shape in enumerate(shapes) if shape != ABSENT]
        self._shapes = [shapes[index] for index in self._held]
        self._stack_index = index_among_equal_shapes(self._shapes)
        # opens every array here: how it is read depends on a setting that belongs to no thread
        self._chunk = max(store.chunk_images(split, index) for index in self._held)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._kept: dict[Shape, Tensor] = {}
        self.labels = store.labels(split).to(device)
        self.ids = store.ids(split).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def shuffled(self, order: ImageOrder, epoch: int, images: int, *, augment: bool = False) -> Iterator[Batch]:
        """An epoch in batches of ``images``; what is left over at the end is dropped."""
        refuse_augmentation(augment)
        sequence = order.epoch(epoch, len(self))[: len(self) // images * images]
        return self._stream(sequence, images, block=order.block, window=order.window)

    def in_order(self, images: int) -> Iterator[Batch]:
        """All images once, in the order of the data set; the last batch may be smaller."""
        return self._stream(torch.arange(len(self)), images, block=self._chunk, window=0)

    def _stream(self, sequence: Tensor, images: int, *, block: int, window: int) -> Iterator[Batch]:
        if len(sequence) == 0:
            return
        capacity = stream_capacity(len(self), images, block=block, window=window)
        plan = StreamPlan.of(sequence, len(self), block=block, capacity=capacity)
        index, slots = plan.index.to(self._device), plan.slots.to(self._device)
        labels = self.labels.index_select(0, sequence.to(self._device))
        stacks = self._take_stacks(capacity)
        copied = 0
        try:
            with ReadAhead(self._read, plan.blocks, ahead=READ_AHEAD) as reader:
                for start in range(0, len(sequence), images):
                    stop = min(start + images, len(sequence))
                    needed = plan.needed[stop - 1]
                    while copied < len(plan.blocks) and plan.fits(copied, start):
                        values = reader.take(wait=bool(copied < needed))
                        if values is None:
                            break
                        end = plan.ends[copied]
                        first, last = plan.blocks[copied]
                        self._copy(stacks, values, slots[end - (last - first) : end])
                        copied += 1
                    assert copied >= needed, "a window must fit into memory"
                    yield Batch(stacks, index[start:stop], labels[start:stop])
        finally:
            self._kept = stacks

    def _take_stacks(self, capacity: int) -> dict[Shape, Tensor]:
        """Memory for so many images, that of the last pass if its size fits; two passes at once never share it."""
        kept, self._kept = self._kept, {}
        if kept and next(iter(kept.values())).shape[1] == capacity:
            return kept
        del kept
        return empty_stacks(self._shapes, capacity, dtype=self._dtype, device=self._device)

    def _read(self, block: tuple[int, int]) -> _Block:
        """In the thread: a block at every position, on the device, in the store's dtype."""
        values = [self._store.read(self._split, index, *block) for index in self._held]
        if self._copies is None:
            return values, None
        with torch.cuda.stream(self._copies):
            values = [pinned(x).to(self._device, non_blocking=True) for x in values]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return values, event

    def _copy(self, stacks: dict[Shape, Tensor], block: _Block, slots: Tensor) -> None:
        values, event = block
        if event is not None:
            event.wait()
            for x in values:
                x.record_stream(torch.cuda.current_stream(self._device))
        for shape, stack_index, x in zip(self._shapes, self._stack_index, values, strict=True):
            stacks[shape][stack_index].index_copy_(0, slots, x.to(self._dtype))


class StreamedSource:
    """Both splits of one sender, read from its store in every pass; ``shapes`` lists the shape of every position."""

    def __init__(
        self, store: ActivationStore, *, dtype: torch.dtype, device: torch.device, chosen: Sequence[int] | None = None
    ) -> None:
        self.shapes: Sequence[Shape] = store.shapes(chosen)
        self.train, self.test = (
            StreamedSplit(store, split, dtype=dtype, device=device, chosen=chosen) for split in ("train", "test")
        )


def pinned(x: Tensor) -> Tensor:
    """A copy in page-locked memory, made by the calling thread alone: torch would start a team of threads for it."""
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    np.copyto(copy.view(-1).view(torch.uint8).numpy(), x.contiguous().view(-1).view(torch.uint8).numpy())
    return copy
