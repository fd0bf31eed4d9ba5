"""A sender that runs again for every batch: nothing is stored, and every epoch can show other views of the images."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.represent import PASS_IMAGES, represent
from fastsitch.activations.representation_batch import Batch, Shape
from fastsitch.activations.resident_source import stack_positions
from fastsitch.chains.layout import ABSENT
from fastsitch.data import ImageFiles, Split, Transform, Views
from fastsitch.identity import torch_generator
from fastsitch.receivers.frozen_network import FrozenNetwork


class LiveSplit:
    """One split of a data set, and the sender that represents its images.

    The images stay on the device as uint8, or in their files, and pass through the sender's transform. The sender
    computes in its own dtype; representations are rounded to ``stored``, as in a store, then cast to the compute dtype
    ``dtype``. Batches have the positions that are ``chosen``; None: all.
    """

    def __init__(
        self,
        sender: FrozenNetwork,
        transform: Transform,
        split: Split,
        *,
        stored: torch.dtype,
        dtype: torch.dtype,
        chosen: Sequence[int] | None = None,
    ) -> None:
        self._sender = sender
        self._transform = transform
        self._images = split.images.to(sender.device)
        self._size = split.size
        self._stored = stored
        self._dtype = dtype
        self.positions = sender.positions
        self._held = range(len(sender.positions)) if chosen is None else sorted(chosen)
        self.shapes: Sequence[Shape] = [
            position.rows if index in self._held else ABSENT for index, position in enumerate(sender.positions)
        ]
        self.labels = split.labels.to(sender.device)
        self.ids = torch.arange(len(split), device=sender.device)
        self._kept: Mapping[Shape, Tensor] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @torch.no_grad()
    def represent(self, images: Tensor | slice, views: Views | None = None) -> list[Tensor]:
        """The raw representations of some images at every position: maps (n, C, H, W), channels-last in memory."""
        shown = self._images[images]
        views = None if views is None else views.to(shown.device)
        return represent(self._sender, self._transform, shown, stored=self._stored, dtype=self._dtype, views=views)

    def shuffled(self, order: ImageOrder, epoch: int, images: int, *, augment: bool = False) -> Iterator[Batch]:
        """An epoch in batches of ``images``; what is left over at the end is dropped.

        A batch is valid until the next one is drawn. With ``augment``, the view of the k-th image of an epoch depends
        on the order's seed, the epoch and k alone.
        """
        permutation = order.epoch(epoch, len(self)).to(self.labels.device)
        if isinstance(self._images, ImageFiles):
            self._images[permutation].announce()
        views = self._views(order.seed, epoch) if augment else None
        # all batches lie in the same memory, that of the last epoch if its size fits; two epochs at once never share it
        stacks, self._kept = self._kept, {}
        if stacks and next(iter(stacks.values())).shape[1] != images:
            stacks = {}
        try:
            for start in range(0, len(self) - images + 1, images):
                drawn = slice(start, start + images)
                batch = self._batch(permutation[drawn], None if views is None else views[drawn], stacks)
                stacks = batch.stacks
                yield batch
        finally:
            self._kept = stacks

    def in_order(self, images: int) -> Iterator[Batch]:
        """All images once, without augmentation, in the order of the data set; the last batch may be smaller."""
        if isinstance(self._images, ImageFiles):
            self._images.announce()
        for index in torch.split(self.ids, images):
            yield self._batch(index, None, {})

    def _views(self, seed: int, epoch: int) -> Views:
        # those of images of several sizes are taken of what the sender's preprocessing gives
        size = self._transform.viewed(self._size or (0, 0))
        return Views.draw(len(self), *size, torch_generator("views", seed, epoch))

    def _batch(self, index: Tensor, views: Views | None, into: Mapping[Shape, Tensor]) -> Batch:
        raw = self.represent(index, views)
        held = [self.positions[k] for k in self._held], [raw[k] for k in self._held]
        stacks = stack_positions(*held, into)
        return Batch(stacks, torch.arange(len(index), device=index.device), self.labels.index_select(0, index))


class LiveSource:
    """Both splits of a data set, run through one sender; ``shapes`` lists the shape of every position."""

    def __init__(self, train: LiveSplit, test: LiveSplit) -> None:
        self.shapes = train.shapes
        self.train = train
        self.test = test


class LiveSplitInOrder:
    """The images of a live split without augmentation, in the order of the data set; 256 of them are in memory."""

    def __init__(self, split: LiveSplit) -> None:
        self._split = split
        self._first = -1
        self._block: list[Tensor] = []
        self.shapes = split.shapes
        self.labels = split.labels
        self.ids = split.ids

    def images(self, position: int, start: int, stop: int) -> Tensor:
        first = start - start % PASS_IMAGES
        assert stop <= first + PASS_IMAGES, f"a request must not cross a multiple of {PASS_IMAGES} images"
        if first != self._first:
            self._block = self._split.represent(slice(first, first + PASS_IMAGES))
            self._first = first
        return self._split.positions[position].to_rows(self._block[position])[start - first : stop - first]
