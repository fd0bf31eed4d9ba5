"""Folders of images, one folder per class: checked first, then decoded one by one into one array."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastsitch.data.background import BLACK, rgb
from fastsitch.data.file_formats import Arrays, padding
from fastsitch.data.image_files import ImageFiles, files_hash
from fastsitch.errors import DataError, MemoryLimitError, argument
from fastsitch.files import free_space, naming
from fastsitch.machine import available_memory

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm")
_OTHER_SUFFIXES = (".tif", ".tiff", ".gif", ".jfif", ".avif", ".heic", ".jp2")
"""Images too, but of formats that are not read: they are refused, not silently left out."""

_KINDS = "png, jpg, bmp, webp, ppm or pgm"

MEMORY_SHARE = 0.5
"""Share of the free memory that pixels may take; beyond it they are kept in a file on disk that only this process sees
and that is gone when it ends."""

_ORIENTATION = 0x0112
"""The EXIF tag."""

_GREY = ("1", "L", "LA")
_COLOUR = ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")


@dataclass(frozen=True)
class FolderSplit:
    """The files of one split and their labels, by class and path."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class ImageFolder:
    """What a folder of images holds, read from the headers of its files; no pixel is decoded yet.

    ``size`` (height, width) is that of all images: their own, or ``side`` x ``side`` after resizing the shorter side
    to it (bilinear with antialias) and cropping the centre. None: they have several sizes.
    """

    path: Path
    train: FolderSplit
    test: FolderSplit
    classes: tuple[str, ...]
    size: tuple[int, int] | None
    side: int | None
    background: str = BLACK
    sizes: str = ""
    """Of two images that differ in size."""

    @property
    def padded_size(self) -> tuple[int, int] | None:
        """Height and width of the images as a data set has them."""
        if self.size is None:
            return None
        pad = 2 * padding(*self.size)
        return self.size[0] + pad, self.size[1] + pad

    @property
    def bytes(self) -> int:
        """Size of all pixels, decoded, in three channels, where they have one size."""
        assert self.padded_size is not None
        height, width = self.padded_size
        return 3 * height * width * (len(self.train.files) + len(self.test.files))

    @classmethod
    def scan(cls, path: Path, side: int | None = None, background: str = BLACK) -> "ImageFolder":
        """Check ``path/train`` and ``path/test``, one folder per class in each.

        Raises DataError, naming the file where there is one, for classes that are empty or not in both, and for images
        that cannot be opened, are not all grey or all in colour, have more than 8 bits per channel, or, without
        ``side``, more than one size.
        """
        for split in ("train", "test"):
            if not (path / split).is_dir():
                raise DataError(
                    f"{path} has no folder {split}/: expected train/ and test/, one folder per class in each"
                )
        classes, tested = (_class_names(path / split) for split in ("train", "test"))
        for split, names, other, others in (("test", tested, "train", classes), ("train", classes, "test", tested)):
            extra = [name for name in names if name not in others]
            if extra:
                raise DataError(
                    f"{path / split} has classes that {other}/ lacks: {', '.join(extra)}; expected the same class "
                    "folders in both"
                )
        for split in ("train", "test"):
            _require_only_classes(path / split)
        train, test = (_files(path / split, classes) for split in ("train", "test"))
        size, sizes = _common_size([*train.files, *test.files], side, background)
        return cls(path, train, test, classes, size, side, background, sizes)

    def files(self) -> tuple[ImageFiles, ImageFiles]:
        """The images as they lie in their files, training and test; none is decoded yet."""
        train, test = (ImageFiles.of(split.files, self._picture, self.sizes) for split in (self.train, self.test))
        return train, test

    def hash(self) -> str:
        """sha256 over the names, labels and bytes of all files."""
        files = [*self.train.files, *self.test.files]
        names = [file.relative_to(self.path).as_posix() for file in files]
        return files_hash(files, names, [*self.train.labels, *self.test.labels])

    def read(self, scratch: Path) -> tuple[Arrays, Arrays]:
        """Decode all images as (N, H, W, 3), training and test; 28x28 ones are padded to 32x32.

        Where they take more than half of the free memory, they are kept in a file in ``scratch``. Raises
        MemoryLimitError before anything is decoded where the disk is too small as well, DataError naming the file for
        an image that cannot be decoded.
        """
        limit = MEMORY_SHARE * available_memory(torch.device("cpu"))
        on_disk = self.bytes > limit
        where = f"a scratch file in {scratch}" if on_disk else "memory"
        if on_disk and self.bytes > free_space(scratch):
            raise MemoryLimitError(
                f"{self.path}: {self._described}, but {limit / 1e9:.1f} GB of memory may be used and "
                f"{free_space(scratch) / 1e9:.1f} GB of disk are free in {scratch}: use smaller images "
                f"(imagefolder:DIR@SIDE), fewer of them, or another {argument('data_dir')}"
            )
        log.info("%s: %s, decoded into %s", self.path, self._described, where)
        train, test = (self._read(split, scratch if on_disk else None) for split in (self.train, self.test))
        return train, test

    @property
    def _described(self) -> str:
        assert self.size is not None
        count, (height, width) = len(self.train.files) + len(self.test.files), self.size
        size = f"{self.bytes / 1e9:.1f} GB" if self.bytes >= 1e8 else f"{self.bytes / 1e6:.1f} MB"
        return f"{count} images of {width}x{height} in {len(self.classes)} classes take {size} as pixels"

    def _read(self, split: FolderSplit, scratch: Path | None) -> Arrays:
        assert self.size is not None
        height, width = self.size
        pad = padding(height, width)
        shape = (len(split.files), height + 2 * pad, width + 2 * pad, 3)
        images = np.zeros(shape, np.uint8) if scratch is None else _array_on_disk(shape, scratch)
        for image, file in zip(images, split.files, strict=True):
            pixels = np.asarray(self._shown(self._picture(file)))
            if pixels.shape != (height, width, 3):
                found = f"{pixels.shape[1]}x{pixels.shape[0]}"
                raise DataError(f"{file} changed while it was read: expected {width}x{height}, found {found}")
            image[pad : pad + height, pad : pad + width] = pixels
        return images, np.asarray(split.labels, np.int64)

    def _picture(self, file: Path) -> Image.Image:
        """Upright and in three channels."""
        with _opened(file) as picture:
            return _opaque(ImageOps.exif_transpose(picture), self.background)

    def _shown(self, picture: Image.Image) -> Image.Image:
        if self.side is None:
            return picture
        from torchvision.transforms.v2 import functional

        shown: Image.Image = functional.center_crop(functional.resize(picture, [self.side]), [self.side])
        return shown


def _class_names(folder: Path) -> tuple[str, ...]:
    """The folders in it, except hidden ones."""
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _require_only_classes(folder: Path) -> None:
    """Raise DataError for an image outside of all class folders, whose absence nobody would notice."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES + _OTHER_SUFFIXES and path.is_file() and not path.name.startswith("."):
            raise DataError(f"{path} is in no class folder: expected one folder per class in {folder}")


def _visible_files(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """All files in a folder and those in it, but none whose name, or whose folder's, begins with a dot.

    Linked folders are followed; raises DataError for one that leads back to a folder ``above`` it.
    """
    real = folder.resolve()
    if real in above:
        raise DataError(f"{folder} is a link to a folder that it is in: remove it")
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _visible_files(path, (*above, real))
        elif path.is_file():
            yield path
        elif path.suffix.lower() in SUFFIXES + _OTHER_SUFFIXES:
            raise DataError(f"{path} is no regular file, nor a link to one: expected an image; remove it")


def _files(folder: Path, classes: tuple[str, ...]) -> FolderSplit:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_visible_files(folder / name, ()))
        images = [path for path in found if path.suffix.lower() in SUFFIXES]
        for path in found:
            if path.suffix.lower() in _OTHER_SUFFIXES:
                raise DataError(f"{path}: expected {_KINDS} files; convert it first, or remove it")
        if not images:
            raise DataError(f"{folder / name} has no images: expected {_KINDS} files in every class")
        files += images
        labels += [label] * len(images)
    if not files:
        raise DataError(f"{folder} has no images: expected one folder per class with {_KINDS} files")
    return FolderSplit(tuple(files), tuple(labels))


def _common_size(files: list[Path], side: int | None, background: str) -> tuple[tuple[int, int] | None, str]:
    """Height and width of all images, or None and a line on two that differ; raises DataError for other pixels."""
    sizes = ""
    first: tuple[Path, tuple[int, int], bool] | None = None
    transparent: list[Path] = []
    for file in files:
        with _opened(file) as picture:
            size, mode = _upright_size(picture), picture.mode
            # Pillow would drop the lower half of the bits of coloured images
            deep = any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ()))
            if _has_alpha(picture):
                transparent.append(file)
        if mode not in _GREY + _COLOUR or deep:
            kind = f"{mode} with 16 bits" if mode in _COLOUR else mode
            raise DataError(f"{file} has pixels of type {kind}: expected 8 bits per channel; convert it first")
        grey = mode in _GREY
        if first is None:
            first = (file, size, grey)
        if grey != first[2]:
            kinds = {True: "grey", False: "in colour"}
            raise DataError(
                f"{file} is {kinds[grey]} but {first[0]} is {kinds[first[2]]}: expected images that are all grey or "
                "all in colour; convert them first"
            )
        if side is None and size != first[1] and not sizes:
            sizes = f"{file} is {size[0]}x{size[1]} but {first[0]} is {first[1][0]}x{first[1][1]}"
    if transparent:
        log.info(
            "%d images may be transparent, such as %s: they are shown over %s (--background)",
            len(transparent),
            transparent[0],
            background,
        )
    assert first is not None
    if side is not None:
        return (side, side), ""
    return (None, sizes) if sizes else ((first[1][1], first[1][0]), "")


def _upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height as the image is to be seen: cameras note how they were held."""
    width, height = picture.size
    # of a PNG whose header has no tags Pillow would decode the pixels to look for some behind them
    tags = picture.getexif() if picture.format != "PNG" or "exif" in picture.info else {}
    turned = tags.get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _has_alpha(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info


def _opaque(picture: Image.Image, background: str) -> Image.Image:
    """In three channels; what is transparent shows the background."""
    if not _has_alpha(picture):
        return picture.convert("RGB")
    behind = Image.new("RGBA", picture.size, (*rgb(background), 255))
    return Image.alpha_composite(behind, picture.convert("RGBA")).convert("RGB")


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """An image file; whatever is wrong with it, also while it is decoded later, is a DataError that names it."""
    try:
        with Image.open(file) as picture:
            yield picture
    # what Pillow's decoders raise for broken files
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read {file} as an image ({error})") from None


def _array_on_disk(shape: tuple[int, ...], folder: Path) -> NDArray[np.uint8]:
    """An array of zeros in a file without a name, which the system removes when the array or the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder), tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            # a disk that fills up later would end the process
            os.posix_fallocate(file.fileno(), 0, int(np.prod(shape, dtype=np.int64)))
        return np.memmap(file, np.uint8, "r+", shape=shape)
