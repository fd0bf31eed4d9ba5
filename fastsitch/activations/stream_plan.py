"""When each block of images is read, and where each image lies in memory while it is needed."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def stream_capacity(images: int, batch: int, *, block: int, window: int) -> int:
    """Images in memory at a time: a window, a batch and a block; never more than there are.

    A batch that begins in one window may need all of the next one. A block may reach into the window after that:
    windows count images, and the short block at the end of the data set can come anywhere in the order.
    """
    return min(images, window + batch + block)


@dataclass(frozen=True)
class StreamPlan:
    """How the images of ``sequence`` are read block by block, into slots in memory that are used again.

    Blocks are read in the order in which their first image is used. An image takes the slot that has been free for the
    longest time, so its slot does not depend on how fast anything runs. Blocks of which no image is used are left out.
    """

    blocks: list[tuple[int, int]]
    """First image, and the one after the last."""
    slots: Tensor
    """(images read,) int64: the slot of each image, in the order of reading."""
    index: Tensor
    """(images used,) int64: the slot of each image, in the order of use."""
    needed: NDArray[np.int64]
    """(images used,): how many blocks must have been read for this image and all before it."""
    ends: NDArray[np.int64]
    """(blocks,): images read with this block and all before it."""
    capacity: int

    @classmethod
    def of(cls, sequence: Tensor, images: int, *, block: int, capacity: int) -> "StreamPlan":
        """The plan for using ``sequence`` (int64, on the CPU), made of images 0 ... images - 1, each at most once."""
        used = sequence.numpy()
        numbers, firsts, which = np.unique(used // block, return_index=True, return_inverse=True)
        order = np.argsort(firsts)
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        blocks = [(int(k) * block, min((int(k) + 1) * block, images)) for k in numbers[order]]
        slot_of = np.empty(images, np.int64)
        ends = np.cumsum([stop - start for start, stop in blocks], dtype=np.int64)
        for (start, stop), end in zip(blocks, ends, strict=True):
            reading = np.arange(end - (stop - start), end)
            fresh, freed = reading[reading < capacity], reading[reading >= capacity]
            slot_of[start:stop] = np.concatenate([fresh, slot_of[used[freed - capacity]]])
        return cls(
            blocks=blocks,
            slots=torch.from_numpy(np.concatenate([slot_of[start:stop] for start, stop in blocks])),
            index=torch.from_numpy(slot_of[used]),
            needed=np.maximum.accumulate(rank[which]) + 1,
            ends=ends,
            capacity=capacity,
        )

    def fits(self, block: int, used: int) -> bool:
        """Whether all slots of a block are free once ``used`` images have been used."""
        return bool(self.ends[block] - self.capacity <= used)
