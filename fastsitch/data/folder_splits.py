"""Which files of a folder of images are for training and which for the test, and of which class each is."""

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import features

from fastsitch.data.subset import Subset, balanced
from fastsitch.data.table_rows import ImageFile
from fastsitch.errors import DataError, argument

log = logging.getLogger(__name__)

TRAINING = ("train", "training")
TESTING = ("test", "val", "valid", "validation")
"""Names of split folders; the first that there is counts."""

_SEED = 0


def _reads(codec: str) -> bool:
    """Whether this Pillow has a codec; older ones do not know all of their names."""
    return codec in {**features.modules, **features.codecs} and bool(features.check(codec))


SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
    *(suffix for suffix, codec in ((".avif", "avif"), (".jp2", "jpg_2000")) if _reads(codec)),
)
_OTHER_SUFFIXES = tuple(suffix for suffix in (".avif", ".heic", ".heif", ".jp2") if suffix not in SUFFIXES)
"""Images too, but of formats that are not read: they are refused, not silently left out."""

_KINDS = "png, jpg, webp, bmp, gif, tif, ppm or pgm"


@dataclass(frozen=True)
class FolderSplit:
    """The files of one split and their labels, by class and path."""

    files: tuple[ImageFile, ...]
    labels: tuple[int, ...]
    root: Path
    """The folder that the class folders are in."""

    @property
    def names(self) -> list[str]:
        """Every file's path in the folder of the classes: ``boot/1.png``."""
        start = len(os.path.join(self.root, ""))
        return [str(file)[start:] for file in self.files]

    def some(self, split: str, subset: Subset, classes: int, name: str) -> "FolderSplit":
        """The images of this split that are in a subset; raises DataError where there are too few."""
        count = subset.train if split == "train" else subset.test
        subset.require(split, len(self.files), classes, name)
        if count is None or count == len(self.files):
            return self
        return self._at(balanced(self.labels, self.names, count).tolist())

    def _at(self, indices: list[int]) -> "FolderSplit":
        files, labels = tuple(self.files[k] for k in indices), tuple(self.labels[k] for k in indices)
        return replace(self, files=files, labels=labels)

    def said(self, name: str) -> str:
        """A class of this split, for messages."""
        return str(self.root / name)

    def held_out(self, share: str, classes: tuple[str, ...]) -> "tuple[FolderSplit, FolderSplit]":
        """Training and test images: those are for the test whose name's sha256 is below the share of all values.

        An image stays where it is whatever other images there are. Raises DataError where a class has none of either.
        """
        indices: tuple[list[int], list[int]] = ([], [])
        for index, name in enumerate(self.names):
            digest = hashlib.sha256(os.fsencode(f"{_SEED}:{name}")).digest()
            indices[int.from_bytes(digest[:8]) < float(share) * 2**64].append(index)
        train, test = map(self._at, indices)
        known = set(self.labels)
        for kind, split in (("training", train), ("test", test)):
            present = set(split.labels)
            for label, name in enumerate(classes):
                if label not in present and label in known:
                    raise DataError(
                        f"{self.said(name)} has {self.labels.count(label)} images, of which "
                        f"{argument('holdout', float(share))} makes none a {kind} image: add images to the class, or "
                        "choose another share"
                    )
        return train, test


def find_splits(path: Path, holdout: str | None) -> tuple[FolderSplit, FolderSplit, tuple[str, ...]]:
    """Training and test images of a folder, and its classes, from names alone; raises DataError."""
    named = [name for name in (*TRAINING, *TESTING) if (path / name).is_dir()]
    if holdout is None:
        return _from_folders(path, named)
    if not path.is_dir():
        raise DataError(f"{path} is no folder: expected one folder per class in it")
    if named:
        raise DataError(
            f"{path} has the folder {named[0]}/, by which its images are split: leave out "
            f"{argument('holdout', float(holdout))}, or name the folder in it that has the class folders"
        )
    classes = _class_names(path)
    for name in classes:
        nested = [split for split in (*TRAINING, *TESTING) if (path / name / split).is_dir()]
        if nested:
            raise DataError(
                f"{path / name} has a folder {nested[0]}/, which is no class: expected class folders in {path}, or "
                f"split folders with class folders in them; name {path / name} if it is the data set"
            )
    _require_only_classes(path)
    train, test = _files(path, classes).held_out(holdout, classes)
    return train, test, classes


def _from_folders(path: Path, named: list[str]) -> tuple[FolderSplit, FolderSplit, tuple[str, ...]]:
    train = next((name for name in named if name in TRAINING), None)
    test = next((name for name in named if name in TESTING and _class_names(path / name)), None)
    # one without class folders, whose images have no labels, only where there is no other
    test = test or next((name for name in named if name in TESTING), None)
    if train is None or test is None:
        raise DataError(_without(path, train, test))
    unused = [f"{name}/" for name in named if name not in (train, test)]
    if unused or (train, test) != ("train", "test"):
        others_said = f", and {' and '.join(unused)} left alone" if unused else ""
        log.info("%s: %s/ is taken for training, %s/ for the test%s", path, train, test, others_said)
    classes, tested = (_class_names(path / split) for split in (train, test))
    for split, names, other, others in ((test, tested, train, classes), (train, classes, test, tested)):
        extra = [name for name in names if name not in others]
        if extra:
            raise DataError(
                f"{path / split} has classes that {other}/ lacks: {', '.join(extra)}; expected the same class "
                "folders in both"
            )
    for split in (train, test):
        _require_only_classes(path / split)
    return _files(path / train, classes), _files(path / test, classes), classes


def _without(path: Path, train: str | None, test: str | None) -> str:
    """What is wrong with a folder that lacks split folders, and what to do."""
    missing = "train" if train is None else "test"
    start = f"{path} has no folder {missing}/"
    expected = "expected train/ (or training/) and test/ (or val/, valid/, validation/), one folder per class in each"
    if not path.is_dir():
        return f"{path} {'is no folder' if path.exists() else 'does not exist'}: {expected}"
    inside = [name for name in _class_names(path) if any((path / name / split).is_dir() for split in TRAINING)]
    if train is None and test is None and len(inside) == 1:
        return f"{start}: {expected}; {path / inside[0]} has one: name that folder"
    if train is not None:
        hint = f"to split its images, name {path / train} with {argument('holdout', 0.2)}"
    else:
        hint = f"for class folders alone use {argument('holdout', 0.2)}"
    return f"{start}: {expected}; {hint}"


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
    return FolderSplit(tuple(files), tuple(labels), folder)
