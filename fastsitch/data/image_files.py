"""Images that stay in their files: decoded when they are wanted, the next ones ahead of time, by a pool of threads."""

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastsitch.data.preprocessing import Preprocessing, pixels
from fastsitch.errors import DataError

Index = Tensor | slice

_AHEAD_BYTES = 64 * 2**20
"""Decoded pixels that wait to be used."""


class ImageReader:
    """Decodes files in threads of its own; ``picture`` gives the image of a file, upright and in three channels.

    ``size`` is the height and width that all of them have; None: they have several.
    """

    def __init__(
        self, files: Sequence[Any], picture: Callable[[Any], Image.Image], size: tuple[int, int] | None = None
    ) -> None:
        self.files = files
        self.size = size
        self._picture = picture
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._order: Sequence[int] = range(len(files))
        self._places: dict[int, int] | None = None
        self._ahead: dict[Preprocessing | None, dict[int, Future[Tensor]]] = {}

    def announce(self, order: Sequence[int]) -> None:
        """The images that will be read next, in this order; without it they are expected as they lie."""
        with self._lock:
            self._order = order
            self._places = {index: place for place, index in enumerate(order)}

    def read(self, indices: Sequence[int], preprocessing: Preprocessing | None) -> Tensor:
        """uint8 (n, H, W, 3) of some images; decoding goes on with those that come next.

        Without a preprocessing they need one size.
        """
        with self._lock:
            ahead = self._ahead.pop(preprocessing, {})
            asked = [self._of(index, preprocessing, ahead) for index in indices]
            height, width = self._size(preprocessing)
            count = min(2 * len(indices), _AHEAD_BYTES // (3 * height * width))
            # what was expected and did not come is dropped
            self._ahead[preprocessing] = {
                index: self._of(index, preprocessing, ahead) for index in self._next(indices[-1], count)
            }
            for future in ahead.values():
                future.cancel()
        return torch.stack([future.result() for future in asked])

    def _next(self, last: int, count: int) -> Sequence[int]:
        place = last if self._places is None else self._places.get(last, len(self._order))
        return self._order[place + 1 : place + 1 + count]

    def _of(self, index: int, preprocessing: Preprocessing | None, ahead: dict[int, Future[Tensor]]) -> Future[Tensor]:
        """Taken from those that are decoded ahead, or begun now."""
        if index in ahead:
            return ahead.pop(index)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_threads(), "decode")
        return self._pool.submit(self._decode, index, preprocessing)

    def _decode(self, index: int, preprocessing: Preprocessing | None) -> Tensor:
        picture = self._picture(self.files[index])
        if self.size not in (None, (picture.height, picture.width)):
            height, width = self.size
            raise DataError(
                f"{self.files[index]} changed while it was read: expected {width}x{height}, found "
                f"{picture.width}x{picture.height}"
            )
        return pixels(picture if preprocessing is None else preprocessing.shown(picture))

    def _size(self, preprocessing: Preprocessing | None) -> tuple[int, int]:
        size = self.size if preprocessing is None else preprocessing.crop
        assert size is not None
        return size


@dataclass(frozen=True)
class ImageFiles:
    """Some images of a reader; indexing chooses among them and decodes nothing."""

    reader: ImageReader = field(repr=False)
    chosen: Tensor
    sizes: str
    """Of two that differ, for those who need images of one size."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(
        cls,
        files: Sequence[Any],
        picture: Callable[[Any], Image.Image],
        sizes: str = "",
        size: tuple[int, int] | None = None,
    ) -> "ImageFiles":
        """All of some files."""
        return cls(ImageReader(files, picture, size), torch.arange(len(files)), sizes)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of all images; None where they differ."""
        return self.reader.size

    @property
    def required_size(self) -> tuple[int, int]:
        """The same; raises DataError where they differ."""
        if self.size is None:
            raise self.of_several_sizes()
        return self.size

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Index) -> "ImageFiles":
        return replace(self, chosen=self.chosen[index if isinstance(index, slice) else index.cpu()])

    def to(self, device: torch.device) -> "ImageFiles":
        """The same images, which go to another device when they are read."""
        return replace(self, device=torch.device(device))

    def announce(self) -> None:
        """Say that these images will be read next, in this order."""
        self.reader.announce(self.chosen.tolist())

    def of_several_sizes(self) -> DataError:
        """What to say where images of one size are needed."""
        return DataError(
            f"{self.sizes}: expected images of one size; resize them first, let imagefolder:DIR@SIDE (or hf:NAME@SIDE) "
            "crop and resize them to squares, or take networks with a preprocessing of their own (add --pretrained)"
        )

    def read(self, preprocessing: Preprocessing | None) -> Tensor:
        """uint8 (n, H, W, 3), on the device; raises DataError where nothing gives them one size."""
        if preprocessing is None:
            _ = self.required_size
        x = self.reader.read(self.chosen.tolist(), preprocessing)
        return x.to(self.device) if self.device.type == "cpu" else x.pin_memory().to(self.device, non_blocking=True)


def files_hash(names: Sequence[str], labels: Sequence[int], digests: Sequence[bytes]) -> str:
    """sha256 over the names, labels and contents of files, in their order; ``digests`` are sha256 of their bytes."""
    digest = hashlib.sha256()
    for name, label, content in zip(names, labels, digests, strict=True):
        digest.update(f"{name}\0{label}\0{content.hex()}\n".encode())
    return digest.hexdigest()


def _threads() -> int:
    """As many as processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
