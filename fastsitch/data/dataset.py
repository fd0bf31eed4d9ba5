"""A data set: uint8 images, in memory or in files, and labels; normalised on the device when they are used."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fastsitch.data.grey import grey
from fastsitch.data.image_files import ImageFiles
from fastsitch.data.normalisation import Normalisation, PixelCounts, normalisation_of

_BLOCK = 256
"""Images that are decoded, counted and hashed at a time."""


@dataclass(frozen=True)
class Split:
    """The images of one split, on one device.

    Attributes:
        images: uint8 (N, H, W, 3), or files of images that need not have one size.
        labels: int64 (N,).
    """

    images: Tensor | ImageFiles
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of all images; None where they differ."""
        if isinstance(self.images, ImageFiles):
            return self.images.size
        return self.images.shape[1], self.images.shape[2]

    @property
    def image_bytes(self) -> int:
        """Memory that an image takes, in bytes; none where it stays in its file."""
        return 0 if isinstance(self.images, ImageFiles) else self.images[0].numel()

    @property
    def pixels(self) -> Tensor:
        """All images as uint8 (N, H, W, 3), decoded where need be; raises DataError where they have several sizes."""
        return self.images.read(None) if isinstance(self.images, ImageFiles) else self.images

    def blocks(self) -> Iterator[Tensor]:
        """The images in order, some at a time, uint8 (n, H, W, 3); raises DataError where they have several sizes."""
        if isinstance(self.images, ImageFiles):
            self.images.announce()
        for start in range(0, len(self), _BLOCK):
            yield self[start : start + _BLOCK].pixels

    def __getitem__(self, index: Tensor | slice) -> "Split":
        """Some of the images; those in files are not decoded."""
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "Split":
        """The same images on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Whole:
    """The data set that a subset was taken from: its name, its hash, and whether all of its test images were taken.

    The hash is None where images that were not taken are never decoded.
    """

    name: str
    hash: str | None
    all_tested: bool


@dataclass(frozen=True)
class Dataset:
    """A data set, in memory.

    Attributes:
        name: as the user gave it; results carry it.
        train: the images that stitches are trained on.
        test: the images that accuracies are counted on.
        classes: how many different labels there are, 0 ... classes - 1.
        class_names: one for every label, where they are known: names of folders, or labels that are texts.
        whole: what it is a subset of; None: it is no subset.
        files_hash: of images of several sizes: sha256 over the names, labels and bytes of their files.
        content: what is known of all pixels without looking at them; None: it is found when it is asked for.
    """

    name: str
    train: Split
    test: Split
    classes: int
    class_names: tuple[str, ...] | None = None
    whole: Whole | None = None
    files_hash: str | None = None
    content: "PixelFacts | None" = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of an image; raises DataError where they have several sizes."""
        images = self.train.images
        if isinstance(images, ImageFiles):
            return self.channels, *images.required_size
        _, height, width, channels = images.shape
        return channels, height, width

    @property
    def channels(self) -> int:
        """Of an image, whatever its size."""
        return 3

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of all images; None where they differ."""
        return self.train.size

    @cached_property
    def hash(self) -> str:
        """sha256 over all images and labels of both splits."""
        if self.files_hash is not None:
            return self.files_hash
        if self.content is not None:
            return self.content.hash
        return _look(self.train, self.test, None)

    @cached_property
    def normalisation(self) -> Normalisation:
        """Mean and standard deviation of the training images, from exact integer sums."""
        return self.content.normalisation if self.content is not None else normalisation_of(self.train.blocks())

    @cached_property
    def _grey_normalisation(self) -> Normalisation:
        if self.content is not None:
            return self.content.grey_normalisation
        return normalisation_of(grey(block) for block in self.train.blocks())

    def normalisation_for(self, channels: int) -> Normalisation:
        """Mean and standard deviation of the training images as a network of so many channels sees them."""
        return self._grey_normalisation if channels == 1 else self.normalisation

    def to(self, device: torch.device) -> "Dataset":
        """The same data set on another device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


@dataclass(frozen=True)
class PixelFacts:
    """What one look at all images of a data set says: their hash, and mean and deviation of those for training."""

    hash: str
    normalisation: Normalisation
    grey_normalisation: Normalisation

    @classmethod
    def of(cls, train: Split, test: Split) -> "PixelFacts":
        """Decodes every image once, some at a time; raises DataError for one that cannot be."""
        colours, brightness = PixelCounts(), PixelCounts()

        def count(block: Tensor) -> None:
            colours.add(block)
            brightness.add(grey(block))

        digest = _look(train, test, count)
        return cls(digest, colours.normalisation(), brightness.normalisation())


def _look(train: Split, test: Split, count: Callable[[Tensor], None] | None) -> str:
    """sha256 over the images and labels of both splits; ``count`` gets those for training."""
    digest = hashlib.sha256()
    for split in (train, test):
        height, width = split.size or (0, 0)
        digest.update(str((len(split), height, width, 3)).encode())
        for block in split.blocks():
            digest.update(block.cpu().contiguous().numpy().data)
            if count is not None and split is train:
                count(block)
        digest.update(split.labels.cpu().contiguous().numpy().data)
    return digest.hexdigest()
