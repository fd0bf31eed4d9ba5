"""From the images of a data set to the inputs of a network."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsitch.data.grey import grey
from fastsitch.data.image_files import ImageFiles
from fastsitch.data.normalisation import Normalisation
from fastsitch.data.preprocessing import Preprocessing
from fastsitch.data.random_views import Views
from fastsitch.errors import ConfigError


@dataclass(frozen=True)
class Transform:
    """How a network takes images.

    Images of another size are resized in fp32, bilinear with antialias, to exactly that height and width. A transform
    belongs to a network: two networks see the same images in the same order, each through its own transform.

    Attributes:
        normalisation: of the pixels.
        resolution: height and width in pixels, each at least 1; None: those of the images.
        preprocessing: of a pretrained network, instead of resizing alone; then images may have any sizes.
        grey: whether it sees the brightness of the images alone, as one channel.

    Raises:
        ConfigError: a resolution below 1.
    """

    normalisation: Normalisation
    resolution: tuple[int, int] | None = None
    preprocessing: Preprocessing | None = None
    grey: bool = False

    def __post_init__(self) -> None:
        if self.resolution is not None and min(self.resolution) < 1:
            raise ConfigError(f"resolution {self.resolution}: expected a height and a width of at least 1")

    def apply(self, images: Tensor | ImageFiles, views: Views | None = None) -> Tensor:
        """uint8 (N, H, W, C), or files -> fp32 (N, C, R, S) in channels-last memory, on the images' device.

        C is 1 if grey.

        ``views``, on the same device, show the images before they are resized: what a view leaves empty is 0 after
        normalisation, the mean of the data. Resizing is linear and keeps constants, so that it may come last. A
        preprocessing, which rounds to pixels, comes before the views.
        """
        if isinstance(images, ImageFiles):
            images = images.read(self.preprocessing)
        elif self.preprocessing is not None:
            images = self.preprocessing.apply(images)
        x = self.normalisation.apply(grey(images) if self.grey else images)
        return self.resize(x if views is None else views.apply(x))

    def viewed(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of what views are taken of, for images of this size."""
        return size if self.preprocessing is None else self.preprocessing.crop

    def resize(self, x_NCHW: Tensor) -> Tensor:
        """Bring images of any range to the network's resolution; those that have it come back as they are."""
        size = None if self.resolution is None else list(self.resolution)
        if size in (None, list(x_NCHW.shape[2:])):
            return x_NCHW
        resized = F.interpolate(x_NCHW, size, mode="bilinear", align_corners=False, antialias=True)
        return resized.contiguous(memory_format=torch.channels_last)

    def to_dict(self, size: tuple[int, int] | None) -> dict[str, Any]:
        """What a store of images of this height and width records: the resolution only where they are resized."""
        content: dict[str, Any] = {key: list(value) for key, value in asdict(self.normalisation).items()}
        if self.resolution is not None and self.resolution != size:
            content["resolution"] = list(self.resolution)
        if self.preprocessing is not None:
            content["preprocessing"] = self.preprocessing.to_dict()
        if self.grey:
            content["grey"] = True
        return content
