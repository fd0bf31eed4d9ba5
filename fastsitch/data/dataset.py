"""A data set in memory: uint8 images and labels, normalised on the device when they are used."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fastsitch.data.grey import grey
from fastsitch.data.image_files import ImageFiles
from fastsitch.errors import ConfigError

_COUNTED_PIXELS = 1 << 24


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of every channel, of pixels in [0, 1].

    Attributes:
        mean: one number per channel.
        std: one number above 0 per channel.

    Raises:
        ConfigError: they differ in length, or a standard deviation is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(0 < value < float("inf") for value in self.std):
            raise ConfigError(
                f"mean {self.mean}, std {self.std}: expected a mean and a std above 0 for every channel, of pixels in "
                "[0, 1]"
            )

    def apply(self, images_NHWC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 (N, H, W, C) -> normalised (N, C, H, W) in channels-last memory, on the images' device."""
        x = images_NHWC.permute(0, 3, 1, 2).to(torch.float32)
        mean = torch.tensor(self.mean, device=x.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=x.device).view(1, -1, 1, 1)
        return ((x / 255 - mean) / std).to(dtype)

    def invert(self, x_NCHW: Tensor) -> Tensor:
        """Pixels (N, H, W, C) of normalised images, 0 black and 1 white; not clamped, in the dtype of x."""
        return x_NCHW.permute(0, 2, 3, 1) * x_NCHW.new_tensor(self.std) + x_NCHW.new_tensor(self.mean)


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
    def pixels(self) -> Tensor:
        """The images as uint8 (N, H, W, 3); raises DataError where they have several sizes."""
        if isinstance(self.images, ImageFiles):
            raise self.images.of_several_sizes()
        return self.images

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
        files_hash: of images in files: sha256 over their names, labels and bytes.
    """

    name: str
    train: Split
    test: Split
    classes: int
    class_names: tuple[str, ...] | None = None
    whole: Whole | None = None
    files_hash: str | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of an image."""
        _, height, width, channels = self.train.pixels.shape
        return channels, height, width

    @property
    def channels(self) -> int:
        """Of an image, whatever its size."""
        return 3

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of all images; None where they differ."""
        return None if isinstance(self.train.images, ImageFiles) else self.input_shape[1:]

    @cached_property
    def hash(self) -> str:
        """sha256 over all images and labels of both splits."""
        if self.files_hash is not None:
            return self.files_hash
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(str(tuple(split.pixels.shape)).encode())
            digest.update(split.pixels.cpu().contiguous().numpy().data)
            digest.update(split.labels.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @cached_property
    def normalisation(self) -> Normalisation:
        """Mean and standard deviation of the training images, from exact integer sums."""
        return _statistics(self.train.pixels)

    @cached_property
    def _grey_normalisation(self) -> Normalisation:
        images = self.train.pixels
        parts = torch.split(images, max(1, _COUNTED_PIXELS // images[0, ..., 0].numel()))
        return _statistics(torch.cat([grey(part) for part in parts]))

    def normalisation_for(self, channels: int) -> Normalisation:
        """Mean and standard deviation of the training images as a network of so many channels sees them."""
        return self._grey_normalisation if channels == 1 else self.normalisation

    def to(self, device: torch.device) -> "Dataset":
        """The same data set on another device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def _statistics(images: Tensor) -> Normalisation:
    mean, std = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in range(images.shape[-1]):
        # some images at a time: counting takes four bytes per pixel
        blocks = torch.split(images[..., channel], max(1, _COUNTED_PIXELS // images[0, ..., 0].numel()))
        counted = [torch.bincount(block.reshape(-1).to(torch.int32), minlength=256) for block in blocks]
        counts = torch.stack(counted).sum(0).double().cpu()
        average = (counts @ values / counts.sum()).item()
        variance = (counts @ (values - average) ** 2 / counts.sum()).item()
        mean.append(round(average, 6))
        # a channel without contrast is only shifted
        std.append(round(variance**0.5, 6) or 1.0)
    return Normalisation(tuple(mean), tuple(std))
