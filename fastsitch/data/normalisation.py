"""Mean and standard deviation of pixels: applied to images, and counted over those of a data set."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsitch.errors import ConfigError

_COUNTED_PIXELS = 1 << 24

_CACHED_VALUES = 1 << 17
"""Of fp32, half a megabyte."""


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
        n, height, width, channels = images_NHWC.shape
        device = images_NHWC.device
        # rows as one long vector: three channels are too short for the processor's vectors
        mean, std = (torch.tensor(each, device=device).repeat(width) for each in (self.mean, self.std))
        rows = images_NHWC.reshape(n, height, width * channels)
        out = torch.empty(rows.shape, dtype=dtype, device=device)
        # on a processor so much at a time that it stays in its cache
        step = max(1, n if device.type == "cuda" else _CACHED_VALUES // (height * width * channels))
        for part, into in zip(torch.split(rows, step), torch.split(out, step), strict=True):
            values = into if dtype == torch.float32 else torch.empty_like(into, dtype=torch.float32)
            values.copy_(part).div_(255).sub_(mean).div_(std)
            if values is not into:
                into.copy_(values)
        return out.view(n, height, width, channels).permute(0, 3, 1, 2)

    def invert(self, x_NCHW: Tensor) -> Tensor:
        """Pixels (N, H, W, C) of normalised images, 0 black and 1 white; not clamped, in the dtype of x."""
        return x_NCHW.permute(0, 2, 3, 1) * x_NCHW.new_tensor(self.std) + x_NCHW.new_tensor(self.mean)


class PixelCounts:
    """How often every value occurs in every channel of the images that were added."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def add(self, images_NHWC: Tensor) -> None:
        """Count images, uint8 (N, H, W, C)."""
        counts = torch.stack([_counted(images_NHWC[..., channel]) for channel in range(images_NHWC.shape[-1])])
        self._counts = counts if self._counts is None else self._counts + counts

    def normalisation(self) -> Normalisation:
        """Mean and standard deviation of all images, from exact integer sums."""
        assert self._counts is not None
        values = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for counts in self._counts.double():
            average = (counts @ values / counts.sum()).item()
            variance = (counts @ (values - average) ** 2 / counts.sum()).item()
            mean.append(round(average, 6))
            # a channel without contrast is only shifted
            std.append(round(variance**0.5, 6) or 1.0)
        return Normalisation(tuple(mean), tuple(std))


def normalisation_of(blocks: Iterable[Tensor]) -> Normalisation:
    """Mean and standard deviation of images in blocks, uint8 (n, H, W, C) each."""
    counts = PixelCounts()
    for block in blocks:
        counts.add(block)
    return counts.normalisation()


def _counted(channel_NHW: Tensor) -> Tensor:
    # some images at a time: counting takes four bytes per pixel
    blocks = torch.split(channel_NHW, max(1, _COUNTED_PIXELS // channel_NHW[0].numel()))
    counted = [torch.bincount(block.reshape(-1).to(torch.int32), minlength=256) for block in blocks]
    return torch.stack(counted).sum(0).cpu()
