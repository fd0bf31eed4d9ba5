"""Loading a data set by its name."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from fastsitch.data.background import BLACK, canonical_colour, is_colour
from fastsitch.data.dataset import Dataset, Split
from fastsitch.data.file_formats import Arrays, read_cifar, read_idx, read_npz
from fastsitch.data.image_folder import ImageFolder
from fastsitch.errors import DataError, argument
from fastsitch.files import expanded
from fastsitch.identity import stable_hash

log = logging.getLogger(__name__)

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its IDX files."""


@dataclass(frozen=True)
class DatasetSize:
    """What planning needs to know of a data set: images per split, classes, image size; ``assumed`` if guessed.

    Height and width are 0 where images have several sizes.
    """

    train: int
    test: int
    classes: int
    height: int = 32
    width: int = 32
    assumed: bool = False


_LARGEST_SIDE = 4096

SIZES = {
    "fashion-mini": DatasetSize(10_000, 2_000, 10),
    "fashion-mnist": DatasetSize(60_000, 10_000, 10),
    "cifar10": DatasetSize(50_000, 10_000, 10),
    "cifar100": DatasetSize(50_000, 10_000, 100),
}


def known_size(name: str) -> DatasetSize | None:
    """The size of a named data set, or of its first images (``fashion-mini:5000``); None for files and folders.

    Raises DataError when it has fewer images than that.
    """
    base, _, count = name.partition(":")
    if base not in SIZES or base == name:
        return SIZES.get(name)
    size = SIZES[base]
    if not count.isdecimal() or not 0 < int(count) <= size.train or count != str(int(count)):
        raise DataError(f"data set {name}: expected {base}:N, the first N of its {size.train} training images")
    return replace(size, train=int(count))


def canonical_dataset(name: str) -> str:
    """The name under which a data set is recorded: with the absolute path of a file or folder; raises DataError."""
    if known_size(name) is not None:
        return name
    return str(_located(name))


@dataclass(frozen=True)
class _Location:
    """A file or folder given by the user; ``side`` and ``background`` are those of ``imagefolder:DIR@64@white``."""

    kind: str
    path: Path
    side: int | None = None
    background: str = BLACK

    def __str__(self) -> str:
        side = "" if self.side is None else f"@{self.side}"
        return f"{self.kind}:{self.path}{side}" + ("" if self.background == BLACK else f"@{self.background}")


def _located(name: str) -> _Location:
    kind, separator, location = name.partition(":")
    if not separator or kind not in ("imagefolder", "npz") or not location:
        raise DataError(
            f"unknown data set {name!r}: expected {', '.join(SIZES)}, one of them with :N for its first N training "
            "images, imagefolder:DIR, imagefolder:DIR@SIDE or npz:FILE"
        )
    location = str(expanded(location))
    if kind == "npz":
        return _Location(kind, Path(location).resolve())
    side = background = None
    # a folder that has that very name comes first
    while not Path(location).is_dir():
        folder, _, option = location.rpartition("@")
        if folder and side is None and option.isdecimal():
            side = int(option)
        elif folder and background is None and is_colour(option):
            background = canonical_colour(option)
        else:
            break
        location = folder
    if side is not None and not 8 <= side <= _LARGEST_SIDE:
        raise DataError(f"data set {name}: expected imagefolder:DIR@SIDE with a side of 8 to {_LARGEST_SIDE} pixels")
    return _Location(kind, Path(location).resolve(), side, background or BLACK)


def dataset_folder(name: str) -> str:
    """The folder name of a data set under ``models/``, ``activations/`` and ``runs/``; raises DataError.

    For files and image folders it is their name and a hash of their absolute path.
    """
    if known_size(name) is not None:
        return name.replace(":", "-first")
    location = _located(name)
    text = str(location).partition(":")[2]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", location.path.stem if location.kind == "npz" else Path(text).name)
    return f"{location.kind}-{stem}-{stable_hash(text)[:8]}"


def dataset_size(name: str, data_dir: Path) -> DatasetSize | None:
    """The size of any data set; None for a file or folder that is not there. Image folders are not decoded.

    Raises DataError when the data set is unknown or malformed.
    """
    known = known_size(name)
    if known is not None:
        return known
    location = _located(name)
    if not location.path.exists():
        return None
    if location.kind == "imagefolder":
        folder = ImageFolder.scan(location.path, location.side, location.background)
        height, width = folder.padded_size or (0, 0)
        return DatasetSize(len(folder.train.files), len(folder.test.files), len(folder.classes), height, width)
    dataset = load_dataset(name, data_dir)
    _, height, width = dataset.input_shape
    return DatasetSize(len(dataset.train), len(dataset.test), dataset.classes, height, width)


def load_dataset(name: str, data_dir: Path) -> Dataset:
    """Load a data set into memory (CPU).

    ``fashion-mini:5000`` is the first 5,000 training images and the whole test set of fashion-mini;
    ``imagefolder:DIR@64`` are images of any size, the shorter side resized to 64 and the centre cropped;
    ``imagefolder:DIR@white`` shows white where images are transparent, or grey, or #RRGGBB, instead of black.
    ``data_dir`` is where the files of fashion-mnist and of the CIFARs are looked for, and downloaded to; the pixels of
    an image folder that memory does not hold are kept in a scratch file there. Raises DataError when the name is
    unknown, or
    when files are missing or malformed, MemoryLimitError when neither memory nor disk hold the pixels.
    """
    name = canonical_dataset(name)
    kind, _, location = name.partition(":")
    names = None
    if kind == "npz":
        train, test = read_npz(Path(location))
    elif kind == "imagefolder":
        place = _located(name)
        folder = ImageFolder.scan(place.path, place.side, place.background)
        if folder.size is None:
            return _in_files(name, folder)
        train, test = folder.read(data_dir)
        names = folder.classes
    else:
        train, test = _BY_NAME[kind](data_dir)
        if location:
            train = (train[0][: int(location)], train[1][: int(location)])
    classes = int(train[1].max()) + 1
    if test[1].max() >= classes:
        raise DataError(
            f"data set {name}: the test split has label {test[1].max()}, "
            f"but the largest training label is {classes - 1}"
        )
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(
            f"data set {name}: training images are {train[0].shape[1:]}, test images {test[0].shape[1:]}: "
            "expected one size"
        )
    unseen = sorted(set(range(classes)) - set(np.unique(train[1]).tolist()))
    if unseen:
        some = ", ".join(map(str, unseen[:5])) + (", ..." if len(unseen) > 5 else "")
        log.warning("data set %s: %d of %d classes have no training images (%s)", name, len(unseen), classes, some)
    return Dataset(name, _split(train), _split(test), classes, names)


def _in_files(name: str, folder: ImageFolder) -> Dataset:
    """Images of several sizes, which every network brings to its own."""
    train, test = (
        Split(files, torch.tensor(split.labels))
        for files, split in zip(folder.files(), (folder.train, folder.test), strict=True)
    )
    return Dataset(name, train, test, len(folder.classes), folder.classes, folder.hash())


def _split(arrays: Arrays) -> Split:
    return Split(torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1]))


def _fashion_mini(data_dir: Path) -> tuple[Arrays, Arrays]:
    with resources.as_file(resources.files("fastsitch.data") / "fashion_mini.npz") as path:
        return read_npz(path)


def _fashion_mnist(data_dir: Path) -> tuple[Arrays, Arrays]:
    folder = data_dir / "fashion-mnist"
    if not folder.is_dir():
        folder = DEBIAN_FASHION_MNIST
    if not folder.is_dir():
        folder = data_dir / "FashionMNIST" / "raw"
    if not folder.is_dir():
        from torchvision.datasets import FashionMNIST

        _download(
            "fashion-mnist",
            data_dir / "fashion-mnist",
            data_dir,
            lambda: FashionMNIST(data_dir, download=True),
        )
    return read_idx(folder, "train"), read_idx(folder, "t10k")


def _cifar10(data_dir: Path) -> tuple[Arrays, Arrays]:
    folder = data_dir / "cifar-10-batches-py"
    if not folder.is_dir():
        from torchvision.datasets import CIFAR10

        _download("cifar10", folder, data_dir, lambda: CIFAR10(data_dir, download=True))
    train = read_cifar(folder, tuple(f"data_batch_{k}" for k in range(1, 6)), b"labels")
    return train, read_cifar(folder, ("test_batch",), b"labels")


def _cifar100(data_dir: Path) -> tuple[Arrays, Arrays]:
    folder = data_dir / "cifar-100-python"
    if not folder.is_dir():
        from torchvision.datasets import CIFAR100

        _download("cifar100", folder, data_dir, lambda: CIFAR100(data_dir, download=True))
    return read_cifar(folder, ("train",), b"fine_labels"), read_cifar(folder, ("test",), b"fine_labels")


_BY_NAME: dict[str, Callable[[Path], tuple[Arrays, Arrays]]] = {
    "fashion-mini": _fashion_mini,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
}


def _download(name: str, folder: Path, data_dir: Path, fetch: Callable[[], object]) -> None:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        fetch()
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"data set {name} is not in {folder} and cannot be downloaded ({reason}): "
            f"put its files there, or name the folder that has them with {argument('data_dir')}"
        ) from None
