"""Which files of a folder of images are for training and which for the test, and of which class each is."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import features

from fastsitch.data.subset import Subset, balanced
from fastsitch.data.table_rows import ImageFile
from fastsitch.errors import DataError, argument

log = logging.getLogger(__name__)

TRAINING = ("train", "training")
TESTING = ("test", "testing", "val", "valid", "validation")
"""Names of splits; the first that there is counts. Folders may have them in any case."""

_NEARLY = re.compile(rf"(?:.*[^a-z])?(?:{'|'.join((*TRAINING, *TESTING))})(?:set|data|images)?(?:[^a-z].*)?")
"""Such as ``seg_train``, ``Test Images`` and ``val2017``, in lower case."""

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
    named = _split_folders(path)
    if holdout is None:
        return _from_folders(path, named)
    if not path.is_dir():
        raise DataError(f"{path} is no folder: expected one folder per class in it")
    classes = _class_names(path)
    if named and not _is_class(path, named, classes):
        raise DataError(
            f"{path} has the folder {next(iter(named.values()))}/, by which its images are split: leave out "
            f"{argument('holdout', float(holdout))}, or name the folder in it that has the class folders"
        )
    for name in classes:
        nested = [*_split_folders(path / name).values()]
        if nested:
            raise DataError(
                f"{path / name} has a folder {nested[0]}/, which is no class: expected class folders in {path}, or "
                f"split folders with class folders in them; name {path / name} if it is the data set"
            )
    for name in _near_splits(path):
        raise DataError(
            f"{path / name} looks like a split, not a class: it has folders, such as "
            f"{_class_names(path / name)[0]}/, and no images of its own; call such folders train/ and test/ and leave "
            f"out {argument('holdout', float(holdout))}, or name {path / name}"
        )
    _require_only_classes(path)
    _say_common_folders(path, classes)
    train, test = _files(path, classes).held_out(holdout, classes)
    return train, test, classes


def _split_folders(path: Path) -> dict[str, str]:
    """The folders in it that have the name of a split in any case, by that name, in the order in which they count."""
    if not path.is_dir():
        return {}
    found: dict[str, str] = {}
    for name in _class_names(path):
        split = name.lower()
        if split in found and split in (*TRAINING, *TESTING):
            raise DataError(f"{path} has the folders {found[split]}/ and {name}/: expected one {split}/; rename one")
        found[split] = name
    return {split: found[split] for split in (*TRAINING, *TESTING) if split in found}


def _is_class(path: Path, named: dict[str, str], classes: tuple[str, ...]) -> bool:
    """Whether the only folder with the name of a split is a class beside others, such as trains beside buses."""
    return len(named) == 1 < len(classes) and all(
        _has_images(path / name) and not _class_names(path / name) for name in classes
    )


def _near_splits(path: Path) -> list[str]:
    """The folders in it that have nearly the name of a split, and folders but no images in them."""
    return [
        name
        for name in _class_names(path)
        if name.lower() not in (*TRAINING, *TESTING)
        and _NEARLY.fullmatch(name.lower())
        and _class_names(path / name)
        and not _has_images(path / name)
    ]


def _say_common_folders(path: Path, classes: tuple[str, ...]) -> None:
    """Warn where the folders taken for classes may be splits, since all of them have the same folders alone."""
    first = _class_names(path / classes[0]) if len(classes) > 1 else ()
    if len(first) > 1 and all(_class_names(path / name) == first and not _has_images(path / name) for name in classes):
        log.warning(
            "%s: %s/ and %s/ are taken for classes, but have the same folders in them, such as %s/ and %s/: if these "
            "are the classes, call the former train/ and test/",
            path,
            *classes[:2],
            *first[:2],
        )


def _has_images(folder: Path) -> bool:
    return any(
        path.suffix.lower() in SUFFIXES + _OTHER_SUFFIXES and not path.name.startswith(".") and path.is_file()
        for path in folder.iterdir()
    )


def _from_folders(path: Path, named: dict[str, str]) -> tuple[FolderSplit, FolderSplit, tuple[str, ...]]:
    train = next((named[split] for split in TRAINING if split in named), None)
    tests = [named[split] for split in TESTING if split in named]
    # one without class folders, whose images have no labels, only where there is no other
    test = next((name for name in tests if _class_names(path / name)), (*tests, None)[0])
    if train is None or test is None:
        raise DataError(_without(path, train, test))
    unused = [f"{name}/" for name in named.values() if name not in (train, test)]
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
    expected = f"expected train/ (or training/) and test/ (or {'/, '.join(TESTING[1:])}/), one folder per class in each"
    if not path.is_dir():
        return f"{path} {'is no folder' if path.exists() else 'does not exist'}: {expected}"
    near = _near_splits(path)
    inside = [name for name in _class_names(path) if not {*TRAINING}.isdisjoint(_split_folders(path / name))]
    if train is None and test is None and len(inside) == 1:
        return f"{start}: {expected}; {path / inside[0]} has one: name that folder"
    if near:
        them = " and ".join(f"{name}/" for name in near[:2])
        look = "looks like a split" if len(near) == 1 else "look like splits"
        hint = f"{them} {look}: rename what is meant to train/ and test/"
    elif train is not None:
        hint = f"to split its images, name {path / train} with {argument('holdout', 0.2)}"
    elif test is not None:
        hint = f"if {test}/ has all images, name {path / test} with {argument('holdout', 0.2)}"
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
