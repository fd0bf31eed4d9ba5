"""Folders of images, one folder per class, and tables of them: checked before any is decoded."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps

from fastsitch.data.dataset_name import DatasetName
from fastsitch.data.file_facts import FileFacts, FolderFacts
from fastsitch.data.file_formats import padding
from fastsitch.data.folder_splits import FolderSplit, find_splits
from fastsitch.data.image_files import ImageFiles, files_hash
from fastsitch.data.picture_modes import as_rgb, has_alpha, opened, require_known_pixels, upright_size
from fastsitch.data.table_rows import ImageFile, Row
from fastsitch.data.table_splits import find_rows
from fastsitch.identity import stable_hash

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFolder:
    """What a folder of images holds, read from the headers of its files; no pixel is decoded yet.

    ``size`` (height, width) is that of all images: their own, or ``side`` x ``side`` after resizing the shorter side
    to it (bilinear with antialias) and cropping the centre. None: they have several sizes.
    """

    name: DatasetName
    train: FolderSplit
    test: FolderSplit
    classes: tuple[str, ...]
    size: tuple[int, int] | None
    sizes: str = ""
    """Of two images that differ in size."""
    facts: FolderFacts | None = field(default=None, compare=False, repr=False)

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

    @property
    def described(self) -> str:
        """How many images of which size, and the memory that their pixels take."""
        assert self.size is not None
        count, (height, width) = len(self.train.files) + len(self.test.files), self.size
        size = f"{self.bytes / 1e9:.1f} GB" if self.bytes >= 1e8 else f"{self.bytes / 1e6:.1f} MB"
        return f"{count} images of {width}x{height} in {len(self.classes)} classes take {size} as pixels"

    @classmethod
    def scan(cls, name: DatasetName, data_dir: Path) -> "ImageFolder":
        """Find the images of a folder with their classes, and look at the heads of those that are taken.

        What was seen is remembered in ``data_dir``, see :class:`FolderFacts`.

        Raises DataError, naming the file where there is one, for splits and classes that do not fit (see
        :func:`find_splits`), too few images for the subset, and images that cannot be opened, have pixels of another
        kind than 8 or 16 bits or, without a side, more than one size.
        """
        train, test, classes = _splits(name)
        train, test = (
            split.some(which, name.subset, len(classes), str(name))
            for which, split in (("train", train), ("test", test))
        )
        facts = FolderFacts(Path(name.source), data_dir)
        size, sizes = _common_size([*train.files, *test.files], name, facts)
        facts.save()
        return cls(name, train, test, classes, size, sizes, facts)

    def files(self) -> tuple[ImageFiles, ImageFiles]:
        """The images as they lie in their files, training and test, 28x28 ones to be padded; none is decoded yet."""
        size = self.padded_size
        picture = self._picture if size is None else self._in_one_size
        train, test = (ImageFiles.of(split.files, picture, self.sizes, size) for split in (self.train, self.test))
        return train, test

    def signature(self) -> str | None:
        """Of everything that the pixels depend on: names, labels, sizes and times of files; None: they still change."""
        assert self.facts is not None
        state = self.facts.state([*self.train.files, *self.test.files])
        return None if state is None else stable_hash([str(self.name), state, self.train.labels, self.test.labels])

    def hash(self) -> str:
        """sha256 over the names, labels and bytes of all files; they are read where they have changed since."""
        assert self.facts is not None
        files = [*self.train.files, *self.test.files]
        digests = self.facts.digests(files, look_at)
        self.facts.save()
        folder = self.name.source
        names = [file.name if isinstance(file, Row) else file.relative_to(folder).as_posix() for file in files]
        return files_hash(names, [*self.train.labels, *self.test.labels], digests)

    def _picture(self, file: ImageFile) -> Image.Image:
        """Upright and in three channels."""
        with opened(file) as picture:
            return as_rgb(picture, self.name.background)

    def _in_one_size(self, file: ImageFile) -> Image.Image:
        picture = self._picture(file)
        side = self.name.side
        if side is not None:
            from torchvision.transforms.v2 import functional

            picture = functional.center_crop(functional.resize(picture, [side]), [side])
        pad = padding(picture.height, picture.width)
        return ImageOps.expand(picture, pad) if pad else picture


def _splits(name: DatasetName) -> tuple[FolderSplit, FolderSplit, tuple[str, ...]]:
    if name.kind == "hf":
        return find_rows(name)
    assert name.path is not None
    return find_splits(name.path, name.holdout)


def look_at(file: ImageFile) -> FileFacts:
    """The facts of an image file from its head; raises DataError, naming it, where it is none that can be read."""
    with opened(file) as picture:
        width, height = upright_size(picture)
        require_known_pixels(picture, file)
        transparent = has_alpha(picture)
        # after the rest: to tell, Pillow looks for the second frame
        return FileFacts(height, width, transparent, bool(getattr(picture, "is_animated", False)))


def _common_size(
    files: Sequence[ImageFile], name: DatasetName, facts: FolderFacts
) -> tuple[tuple[int, int] | None, str]:
    """Height and width of all images, or None and a line on two that differ."""
    sizes = ""
    first: tuple[ImageFile, FileFacts] | None = None
    transparent: list[ImageFile] = []
    moving: list[ImageFile] = []
    for file in files:
        seen = facts.of(file, look_at)
        if seen.transparent:
            transparent.append(file)
        if seen.moving:
            moving.append(file)
        if first is None:
            first = (file, seen)
        other = first[1]
        if name.side is None and not sizes and (seen.height, seen.width) != (other.height, other.width):
            sizes = f"{file} is {seen.width}x{seen.height} but {first[0]} is {other.width}x{other.height}"
    if transparent:
        log.info(
            "%d images may be transparent, such as %s: they are shown over %s (--background)",
            len(transparent),
            transparent[0],
            name.background,
        )
    if moving:
        log.info("%d images have more than one frame, such as %s: the first is taken", len(moving), moving[0])
    assert first is not None
    if name.side is not None:
        return (name.side, name.side), ""
    return (None, sizes) if sizes else ((first[1].height, first[1].width), "")
