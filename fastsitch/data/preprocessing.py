"""How a pretrained network wants its images: resized, then cropped at the centre, as its publishers did."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastsitch.errors import ConfigError

Fit = Literal["shorter", "cover", "exact", "inside"]
Centre = Literal["nearest", "below"]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]

_LARGEST = 8192


@dataclass(frozen=True)
class Preprocessing:
    """Resizing and cropping of single images, in Pillow's arithmetic, which timm and torchvision share.

    Attributes:
        crop: height and width that are cut out of the centre, in pixels; what an image lacks is filled.
        resize: height and width before that, as ``fit`` reads them; None: images keep their size.
        fit: ``shorter``: the shorter side becomes ``resize[0]``; ``cover``: the smallest image of these proportions
            that covers ``resize``; ``exact``: the proportions are given up; ``inside``: the largest image inside.
        interpolation: of resizing, with antialias except for ``nearest``.
        fill: 0 to 255 of each channel, where the crop is larger than the image.
        centre: where an odd number of pixels is left over, the crop begins at the ``nearest`` whole pixel, halves to
            even, as torchvision's does; or at the one ``below``, as that of transformers.

    Raises:
        ConfigError: sides that are not from 1 to 8192, or a word that is not among these.
    """

    crop: tuple[int, int]
    resize: tuple[int, int] | None = None
    fit: Fit = "shorter"
    interpolation: Interpolation = "bilinear"
    fill: tuple[int, int, int] = (0, 0, 0)
    centre: Centre = "nearest"

    def __post_init__(self) -> None:
        for sides in (self.crop, self.resize or (1, 1)):
            if not all(1 <= side <= _LARGEST for side in sides):
                raise ConfigError(f"preprocessing to {sides[0]}x{sides[1]}: expected sides from 1 to {_LARGEST} pixels")
        for word, known in ((self.fit, Fit), (self.interpolation, Interpolation), (self.centre, Centre)):
            if word not in get_args(known):
                raise ConfigError(f"preprocessing with {word!r}: expected one of {', '.join(get_args(known))}")

    def shown(self, picture: Image.Image) -> Image.Image:
        """An image in three channels -> what the network sees of it, ``crop`` in size."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        if self.resize is not None:
            wanted = self._resized(picture.height, picture.width)
            picture = F.resize(picture, wanted, InterpolationMode(self.interpolation))
        height, width = self.crop
        missing_h, missing_w = max(0, height - picture.height), max(0, width - picture.width)
        if (missing_h or missing_w) and any(self.fill):
            left, top = missing_w // 2, missing_h // 2
            picture = F.pad(picture, [left, top, missing_w - left, missing_h - top], fill=self.fill)
        if self.centre == "below":
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            return picture.crop((left, top, left + width, top + height))
        cropped: Image.Image = F.center_crop(picture, [height, width])
        return cropped

    def apply(self, images_NHWC: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) -> uint8 (N, crop height, crop width, 3), on the images' device; Pillow works on CPUs."""
        out = torch.empty(len(images_NHWC), *self.crop, 3, dtype=torch.uint8)
        for row, image in zip(out, images_NHWC.cpu().numpy(), strict=True):
            row.copy_(pixels(self.shown(Image.fromarray(np.ascontiguousarray(image)))))
        return out.to(images_NHWC.device)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the inverse of :meth:`from_dict`."""
        return {
            "crop": list(self.crop),
            "resize": None if self.resize is None else list(self.resize),
            "fit": self.fit,
            "interpolation": self.interpolation,
            "fill": list(self.fill),
            # as before there was another
            **({} if self.centre == "nearest" else {"centre": self.centre}),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Preprocessing":
        """Raises KeyError, TypeError, ValueError or ConfigError."""
        resize = content["resize"]
        return cls(
            crop=_pair(content["crop"]),
            resize=None if resize is None else _pair(resize),
            fit=content["fit"],
            interpolation=content["interpolation"],
            fill=tuple(content["fill"]),
            centre=content.get("centre", "nearest"),
        )

    def _resized(self, height: int, width: int) -> list[int]:
        assert self.resize is not None
        if self.fit == "shorter":
            return [self.resize[0]]
        if self.fit == "exact":
            return list(self.resize)
        ratios = height / self.resize[0], width / self.resize[1]
        ratio = min(ratios) if self.fit == "cover" else max(ratios)
        return [round(height / ratio), round(width / ratio)]


def pixels(picture: Image.Image) -> Tensor:
    """uint8 (H, W, 3) of an image in three channels."""
    return torch.from_numpy(np.array(picture, copy=True))


def _pair(sides: list[int]) -> tuple[int, int]:
    height, width = sides
    return height, width
