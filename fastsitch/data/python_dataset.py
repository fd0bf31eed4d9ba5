"""Data sets of PyTorch that exist in this Python process: registered under a name that stands for them."""

import hashlib
import logging
import operator
import re
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from fastsitch.data.background import BLACK
from fastsitch.data.dataset import Dataset, Split
from fastsitch.data.dataset_name import DatasetName
from fastsitch.data.file_formats import MAX_LABEL, padding
from fastsitch.data.image_files import ImageFiles
from fastsitch.data.picture_modes import as_rgb, decoding, require_known_pixels
from fastsitch.errors import ConfigError, DataError, argument, plain
from fastsitch.machine import available_memory

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.5
"""Share of the free memory that pixels may take; beyond it items are asked for again whenever they are needed."""

_ASKED_TWICE = 8
"""Items of a split that are compared with themselves."""

_EXPECTED_IMAGE = (
    "a PIL image, a tensor (C, H, W) or an array (H, W, C) of 1 or 3 channels, uint8 or floats from 0 to 1; leave out "
    "a normalisation"
)

_registered: dict[str, Dataset] = {}


class MapDataset(Protocol):
    """A ``torch.utils.data.Dataset`` with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def dataset_from(
    train: MapDataset, test: MapDataset, *, name: str, class_names: Sequence[str] | None = None
) -> Dataset:
    """Register two data sets of PyTorch as the training and test images of ``python:NAME``, in this process.

    All items are asked for once. Images of one size are kept in memory, in 8 bits; where they have several sizes, or
    memory does not hold them, they are asked for again, one at a time, whenever they are needed. Other processes, such
    as workers of a cluster, do not know the name.

    Args:
        train: a ``torch.utils.data.Dataset`` with a length, whose items are an image and its label: a PIL image, a
            uint8 tensor (C, H, W), floats from 0 to 1 of that shape, or such an array (H, W, C); always the same for
            an index, and not normalised.
        test: the same, of the test images.
        name: letters, digits, _ and -; what it stood for before is replaced.
        class_names: one for every label; None: ``train.classes``, if it has such.

    Returns:
        The data set, whose ``name`` every other function takes: ``fastsitch.train("R1111", dataset=data.name)``.

    Raises:
        ConfigError: the name, or the class names, cannot be.
        DataError: an item is none of these.
    """
    if not isinstance(name, str) or not re.fullmatch("[A-Za-z0-9_-]+", name):
        raise ConfigError(f"{argument('name', name)}: expected letters, digits, _ and -")
    splits = [_Items(f"python:{name}, {split}", items) for split, items in (("train", train), ("test", test))]
    for items in splits:
        items.look()
    labels = [torch.tensor(items.labels) for items in splits]
    least = int(labels[0].max()) + 1
    names = _class_names(class_names, train, least)
    classes = len(names) if names else least
    if int(labels[1].max()) >= classes:
        raise DataError(f"python:{name}: a test image has label {int(labels[1].max())}, expected 0 to {classes - 1}")
    held = [items.pixels for items in splits]
    several = splits[0].said_of_sizes(splits[1])
    images: list[Tensor | ImageFiles] = [torch.from_numpy(pixels) for pixels in held if pixels is not None]
    if several or len(images) < len(splits):
        images = [items.asked_again(several) for items in splits]
    both = hashlib.sha256(b"".join(items.digest.digest() for items in splits)).hexdigest()
    data = Dataset(
        f"python:{name}",
        Split(images[0], labels[0]),
        Split(images[1], labels[1]),
        classes,
        names,
        files_hash=both if several else None,
    )
    _registered[name] = data
    return data


def registered(name: DatasetName) -> Dataset:
    """The whole data set that has a name in this process; raises DataError where none has."""
    assert name.called is not None
    if name.called not in _registered:
        raise DataError(
            f"python:{name.called} is unknown in this process: data sets of Python exist where "
            f"fastsitch.dataset_from(train, test, name={name.called!r}) was called; call it first"
        )
    return _registered[name.called]


class _Items:
    """The items of one split, each asked for by one thread at a time: nothing tells whether they may be by several."""

    def __init__(self, said: str, items: MapDataset) -> None:
        self._said = said
        self._items = items
        self._lock = threading.Lock()
        self.labels: list[int] = []
        self.digest = hashlib.sha256()
        self.pixels: NDArray[np.uint8] | None = None
        """All images, where they have one size and memory holds them."""
        self._sizes: dict[tuple[int, int], int] = {}
        """The first item of every size."""

    def look(self) -> None:
        """Ask for all items; raises DataError for one that is none, or that is another the next time."""
        try:
            count = len(self._items)
        except TypeError:
            raise DataError(f"{self._said} has no length: expected a torch.utils.data.Dataset with one") from None
        if not count:
            raise DataError(f"{self._said} is empty: expected at least one item")
        for index in range(count):
            image, label = self._item(index)
            if index < _ASKED_TWICE and not _equal((image, label), self._item(index)):
                raise DataError(
                    f"{self._said} item {index} is another one every time: expected always the same; leave out random "
                    "transforms"
                )
            self.labels.append(label)
            self._keep(index, count, image)
            self.digest.update(f"{image.shape} {label}\n".encode())
            self.digest.update(image.data)

    def _keep(self, index: int, count: int, image: NDArray[np.uint8]) -> None:
        height, width, _ = image.shape
        self._sizes.setdefault((height, width), index)
        pad = padding(height, width)
        shape = (count, height + 2 * pad, width + 2 * pad, 3)
        if index == 0 and np.prod(shape) <= MEMORY_SHARE * available_memory(torch.device("cpu")):
            self.pixels = np.zeros(shape, np.uint8)
        if len(self._sizes) > 1:
            self.pixels = None
        if self.pixels is not None:
            self.pixels[index, pad : pad + height, pad : pad + width] = image

    def asked_again(self, several: str) -> ImageFiles:
        """The images as they are asked for whenever they are needed; ``several``: of two that differ in size."""
        self.pixels = None
        size = None
        if not several:
            ((height, width),) = self._sizes
            pad = padding(height, width)
            size = (height + 2 * pad, width + 2 * pad)
        return ImageFiles.of(range(len(self.labels)), partial(self._picture, size), several, size)

    def _picture(self, size: tuple[int, int] | None, index: int) -> Image.Image:
        """One image in three channels, padded to a size."""
        picture = Image.fromarray(self._item(index)[0])
        if size is None:
            return picture
        padded = ImageOps.expand(picture, padding(picture.height, picture.width))
        if (padded.height, padded.width) != size:
            raise DataError(f"{self._said} item {index} has another size than before: expected always the same image")
        return padded

    def said_of_sizes(self, other: "_Items") -> str:
        """A line on two images that differ in size; empty where all have one."""
        first = [
            (size, f"{items._said} item {index}") for items in (self, other) for size, index in items._sizes.items()
        ]
        different = [pair for pair in first if pair[0] != first[0][0]]
        if not different:
            return ""
        ((height, width), item), ((other_height, other_width), another) = different[0], first[0]
        return f"{item} is {width}x{height} but {another} is {other_width}x{other_height}"

    def _item(self, index: int) -> tuple[NDArray[np.uint8], int]:
        said = f"{self._said} item {index}"
        try:
            with self._lock:
                item = self._items[index]
        # whatever the code of a data set raises
        except Exception as error:
            raise DataError(f"{said} cannot be had: {type(error).__name__}: {plain(str(error))}") from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"{said} is {plain(type(item).__name__)}: expected a pair, (image, label)")
        try:
            label = operator.index(item[1])
        except TypeError:
            label = -1
        if not 0 <= label <= MAX_LABEL:
            raise DataError(f"{said} has label {plain(repr(item[1]))}: expected a whole number from 0 to {MAX_LABEL}")
        return _pixels(item[0], said), label


def _equal(first: tuple[NDArray[np.uint8], int], second: tuple[NDArray[np.uint8], int]) -> bool:
    return first[1] == second[1] and np.array_equal(first[0], second[0])


def _pixels(image: Any, said: str) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) of what stands for an image; raises DataError."""
    if isinstance(image, Image.Image):
        with decoding(said):
            require_known_pixels(image, said)
            return np.asarray(as_rgb(image, BLACK))
    values, what = image, type(image).__name__
    if isinstance(image, Tensor):
        what = f"a tensor {tuple(image.shape)} of {image.dtype}"
        values = image.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
        values = values.transpose(1, 2, 0) if values.ndim == 3 else values[..., None, None]
    elif isinstance(image, np.ndarray):
        what = f"an array {image.shape} of {image.dtype}"
        values = image[..., None] if image.ndim == 2 else image
    good = isinstance(values, np.ndarray) and values.ndim == 3 and values.shape[2] in (1, 3) and values.size > 0
    if good and values.dtype.kind == "f":
        good = bool(((values >= 0) & (values <= 1)).all())
        what += "" if good else f" from {values.min():g} to {values.max():g}"
        values = np.rint(values.astype(np.float32) * 255).astype(np.uint8) if good else values
    if not good or values.dtype != np.uint8:
        raise DataError(f"{said} is {plain(what)}: expected {_EXPECTED_IMAGE}")
    return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3)))


def _class_names(given: Sequence[str] | None, train: object, least: int) -> tuple[str, ...] | None:
    """As they are given, or as data sets of torchvision have them."""
    names = getattr(train, "classes", None) if given is None else given
    usable = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) and len(names) >= least
    if given is not None and not usable:
        raise ConfigError(f"{argument('class_names', given)}: expected at least {least} texts, one for every label")
    return tuple(names) if names is not None and usable else None
