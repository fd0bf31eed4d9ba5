"""Random views of images."""

from dataclasses import dataclass

import torch
from torch import Tensor

_SHIFT = 2
_PATCH = 4


@dataclass(frozen=True)
class Views:
    """One view per image: mirrored or not, moved by up to 2 pixels (zeros move in), one 4x4 patch set to zero.

    All (N, 1) int64. Source: the published recipe.
    """

    mirrored: Tensor
    right: Tensor
    down: Tensor
    top: Tensor
    left: Tensor

    @classmethod
    def draw(cls, images: int, height: int, width: int, generator: torch.Generator) -> "Views":
        """One view for each of so many images, on the generator's device."""

        def draw(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (images, 1), generator=generator, device=generator.device)

        return cls(
            mirrored=draw(0, 2),
            right=draw(-_SHIFT, _SHIFT + 1),
            down=draw(-_SHIFT, _SHIFT + 1),
            top=draw(1 - _PATCH, height),
            left=draw(1 - _PATCH, width),
        )

    def __getitem__(self, images: slice) -> "Views":
        return Views(self.mirrored[images], self.right[images], self.down[images], self.top[images], self.left[images])

    def to(self, device: torch.device) -> "Views":
        return Views(*(x.to(device) for x in (self.mirrored, self.right, self.down, self.top, self.left)))

    def apply(self, x_BCHW: Tensor) -> Tensor:
        """Image k as view k shows it."""
        x = x_BCHW.contiguous(memory_format=torch.channels_last)
        images, _, height, width = x.shape
        columns, rows = (torch.arange(size, device=x.device) for size in (width, height))
        in_rows = (rows >= self.top) & (rows < self.top + _PATCH)
        in_columns = (columns >= self.left) & (columns < self.left + _PATCH)
        x_of = torch.where(self.mirrored.bool(), columns.flip(-1), columns) + self.right
        y_of = rows + self.down
        inside = ((y_of >= 0) & (y_of < height)).unsqueeze(2) & ((x_of >= 0) & (x_of < width)).unsqueeze(1)
        inside &= ~(in_rows.unsqueeze(2) & in_columns.unsqueeze(1))
        image = torch.arange(images, device=x.device).view(-1, 1, 1)
        picked = x.permute(0, 2, 3, 1)[
            image, y_of.clamp(0, height - 1).unsqueeze(2), x_of.clamp(0, width - 1).unsqueeze(1)
        ]
        return (picked * inside.unsqueeze(-1)).permute(0, 3, 1, 2)
