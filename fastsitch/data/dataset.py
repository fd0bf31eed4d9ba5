"""A data set in memory: uint8 images and labels, normalised on the device when they are used."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, images_NHWC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 (N, H, W, C) -> normalised (N, C, H, W) in channels-last memory, on the images' device."""
        x = images_NHWC.permute(0, 3, 1, 2).to(torch.float32)
        mean = torch.tensor(self.mean, device=x.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=x.device).view(1, -1, 1, 1)
        return ((x / 255 - mean) / std).to(dtype)


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, H, W, 3) and labels int64 (N,), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Both splits of a data set, its name as given by the user, and its number of classes."""

    name: str
    train: Split
    test: Split
    classes: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of an image."""
        _, height, width, channels = self.train.images.shape
        return channels, height, width

    @cached_property
    def hash(self) -> str:
        """sha256 over all images and labels of both splits."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(str(tuple(split.images.shape)).encode())
            digest.update(split.images.cpu().contiguous().numpy().data)
            digest.update(split.labels.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @cached_property
    def normalisation(self) -> Normalisation:
        """Mean and standard deviation of the training images, from exact integer sums."""
        pixels = self.train.images.reshape(-1, self.train.images.shape[-1])
        mean, std = [], []
        for channel in pixels.unbind(-1):
            counts = torch.bincount(channel.to(torch.int32), minlength=256).double().cpu()
            values = torch.arange(256, dtype=torch.float64) / 255
            average = (counts @ values / counts.sum()).item()
            variance = (counts @ (values - average) ** 2 / counts.sum()).item()
            mean.append(round(average, 6))
            # a channel without contrast is only shifted
            std.append(round(variance**0.5, 6) or 1.0)
        return Normalisation(tuple(mean), tuple(std))

    def to(self, device: torch.device) -> "Dataset":
        """The same data set on another device."""
        return Dataset(self.name, self.train.to(device), self.test.to(device), self.classes)


def augment(x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Random horizontal flip, translation by up to 2 pixels (zeros move in), and one 4x4 patch set to zero.

    Each image draws its own; the generator lives on the images' device. Source: the published recipe for networks.
    """
    x = x_BCHW.contiguous(memory_format=torch.channels_last)
    images, _, height, width = x.shape
    device = x.device

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (images, 1), generator=generator, device=device)

    columns = torch.arange(width, device=device).expand(images, -1)
    columns = torch.where(draw(0, 2).bool(), columns.flip(-1), columns) + draw(-2, 3)
    rows = torch.arange(height, device=device).expand(images, -1) + draw(-2, 3)
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2) & ((columns >= 0) & (columns < width)).unsqueeze(1)
    top, left = draw(-3, height), draw(-3, width)
    positions_y = torch.arange(height, device=device)
    positions_x = torch.arange(width, device=device)
    in_rows = (positions_y >= top) & (positions_y < top + 4)
    in_columns = (positions_x >= left) & (positions_x < left + 4)
    inside &= ~(in_rows.unsqueeze(2) & in_columns.unsqueeze(1))
    image = torch.arange(images, device=device).view(-1, 1, 1)
    picked = x.permute(0, 2, 3, 1)[
        image, rows.clamp(0, height - 1).unsqueeze(2), columns.clamp(0, width - 1).unsqueeze(1)
    ]
    return (picked * inside.unsqueeze(-1)).permute(0, 3, 1, 2)
