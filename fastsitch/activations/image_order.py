"""The order in which images are seen: one two-level permutation, the same for every source and grouping."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsitch.identity import numpy_generator


@dataclass(frozen=True, kw_only=True)
class ImageOrder:
    """Blocks of ``block`` consecutive images are shuffled, then the images within each window of ``window``.

    Depends on (seed, epoch) and the number of images alone. Blocks let a store be read in whole chunks, the window
    bounds how many images have to be in memory at a time.
    """

    seed: int
    block: int = 256
    window: int = 8192

    def epoch(self, epoch: int, images: int) -> Tensor:
        """The permutation of ``range(images)`` for this epoch, int64 on the CPU."""
        generator = numpy_generator("order", self.seed, epoch)
        blocks = np.array_split(np.arange(images), range(self.block, images, self.block))
        order = np.concatenate([blocks[k] for k in generator.permutation(len(blocks))])
        for start in range(0, images, self.window):
            generator.shuffle(order[start : start + self.window])
        return torch.from_numpy(order)
