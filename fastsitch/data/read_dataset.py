"""Loading a data set by its name."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from fastsitch.data.dataset import Dataset, Split
from fastsitch.data.dataset_name import DatasetName
from fastsitch.data.file_formats import Arrays, read_cifar, read_idx
from fastsitch.data.folder_dataset import folder_dataset
from fastsitch.data.hub_dataset import is_here, offline
from fastsitch.data.image_folder import ImageFolder
from fastsitch.data.known_sizes import SIZES, DatasetSize
from fastsitch.data.npz_file import NpzData, read_npz
from fastsitch.data.python_dataset import registered
from fastsitch.data.subset import take_subset
from fastsitch.errors import DataError, argument

log = logging.getLogger(__name__)

_FOLDERS = ("imagefolder", "hf")
"""Kinds of data sets whose images are encoded, each for itself."""

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its IDX files."""


def dataset_size(name: str, data_dir: Path) -> DatasetSize | None:
    """The size of any data set; None for one that is not here, which is not downloaded. Image folders are not decoded.

    Raises DataError when the data set is unknown or malformed.
    """
    parsed = DatasetName.parse(name)
    if parsed.kind in SIZES:
        return parsed.known_size
    if not (is_here(parsed) if parsed.kind == "hf" else parsed.path is None or parsed.path.exists()):
        return None
    if parsed.kind in _FOLDERS:
        # without the library, where it is not needed
        with offline() if parsed.kind == "hf" else nullcontext():
            folder = ImageFolder.scan(parsed, data_dir)
        height, width = folder.padded_size or (0, 0)
        return DatasetSize(len(folder.train.files), len(folder.test.files), len(folder.classes), height, width)
    dataset = load_dataset(name, data_dir)
    height, width = dataset.size or (0, 0)
    return DatasetSize(len(dataset.train), len(dataset.test), dataset.classes, height, width)


def load_dataset(name: str, data_dir: Path) -> Dataset:
    """Load a data set into memory (CPU); large folders, and images of several sizes, stay in their files.

    ``fashion-mini:5000`` is the first 5,000 training images and the whole test set of fashion-mini;
    ``imagefolder:DIR@64`` are images of any size, the shorter side resized to 64 and the centre cropped;
    ``imagefolder:DIR@white`` shows white where images are transparent, or grey, or #RRGGBB, instead of black;
    ``imagefolder:DIR@holdout=0.2`` takes a fifth of the images of a folder without split folders for the test;
    ``hf:ORG/NAME:CONFIG`` is a data set of the Hugging Face hub, ``hf:/DIR`` a folder of parquet files, with the same
    parts behind them and ``@image=COLUMN@label=COLUMN`` where columns have to be chosen;
    ``python:NAME`` is what was registered in this process;
    ``@train=5000@test=1000`` behind any data set takes class-balanced subsets, always the same ones.
    ``data_dir`` is where the files of fashion-mnist and of the CIFARs are looked for, and downloaded to, and where what
    was seen of image folders is remembered. Raises DataError when the name is unknown, or when files are missing or
    malformed.
    """
    parsed = DatasetName.parse(name)
    # raises where a named data set has too few images
    _ = parsed.known_size
    if parsed.kind in _FOLDERS:
        dataset = folder_dataset(parsed, data_dir)
    elif parsed.kind == "python":
        dataset = take_subset(registered(parsed), parsed.subset, str(parsed))
    else:
        dataset = _arrays(parsed, data_dir)
    _warn_of_unseen(dataset)
    return dataset


def _arrays(name: DatasetName, data_dir: Path) -> Dataset:
    """A data set whose file is read as a whole, of which a subset is then taken."""
    if name.kind == "npz":
        assert name.path is not None
        data = read_npz(name.path)
    else:
        train, test = _BY_NAME[name.kind](data_dir)
        data = NpzData((train[0][: name.first], train[1][: name.first]), test, int(train[1][: name.first].max()) + 1)
    (train_images, _), (test_images, test_labels) = data.train, data.test
    if test_labels.max() >= data.classes:
        raise DataError(
            f"data set {name}: the test split has label {test_labels.max()}, "
            f"but the largest training label is {data.classes - 1}"
        )
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"data set {name}: training images are {train_images.shape[1:]}, test images {test_images.shape[1:]}: "
            "expected one size"
        )
    whole = Dataset(str(name.whole), _split(data.train), _split(data.test), data.classes, data.class_names)
    return take_subset(whole, name.subset, str(name))


def _warn_of_unseen(dataset: Dataset) -> None:
    """Name classes without training images, and say where a subset leaves classes out of the test."""
    name, count = dataset.name, dataset.classes
    unseen = sorted(set(range(count)) - set(np.unique(dataset.train.labels.numpy()).tolist()))
    if unseen:
        some = ", ".join(map(str, unseen[:5])) + (", ..." if len(unseen) > 5 else "")
        log.warning("data set %s: %d of %d classes have no training images (%s)", name, len(unseen), count, some)
    if dataset.whole is not None and len(dataset.test) < count:
        tested = len(np.unique(dataset.test.labels.numpy()))
        log.warning("data set %s: its test images are of %d of %d classes", name, tested, count)


def _split(arrays: Arrays) -> Split:
    return Split(torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1]))


def _fashion_mini(data_dir: Path) -> tuple[Arrays, Arrays]:
    with resources.as_file(resources.files("fastsitch.data") / "fashion_mini.npz") as path:
        data = read_npz(path)
    return data.train, data.test


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
