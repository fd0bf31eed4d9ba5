"""Data sets in npz files as people write them: which arrays are taken, and what their numbers mean."""

import logging
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsitch.checked_files import NPZ_ERRORS
from fastsitch.data.file_formats import Arrays, checked, padding
from fastsitch.errors import DataError, plain
from fastsitch.machine import available_memory

log = logging.getLogger(__name__)

_EXPECTED = "x_train, y_train, x_test and y_test (or train_images, train_labels, test_images and test_labels)"

_CONTENTS = {"images": ("x", "images", "image", "imgs"), "labels": ("y", "labels", "label", "targets")}
_SPLITS = ("train", "test", "val", "valid", "validation")

_BLOCK = 1024
"""Images that are converted at a time."""


@dataclass(frozen=True)
class NpzData:
    """What an npz file holds; ``class_names`` where its labels are texts."""

    train: Arrays
    test: Arrays
    classes: int
    class_names: tuple[str, ...] | None = None


def read_npz(path: Path) -> NpzData:
    """Training and test split of an npz file; raises DataError.

    Arrays are called ``x_train``, ``train_x``, ``train_images``, ``images_train`` and so on, labels with ``y`` or
    ``labels``; the test split is ``test``, else ``val``, ``valid`` or ``validation``. What they may hold is told in the
    guide to data.
    """
    if not path.is_file():
        problem = "is no regular file" if path.exists() else "does not exist"
        raise DataError(f"{path} {problem}: expected an npz file with {_EXPECTED}")
    try:
        with path.open("rb") as stream:
            _require_room(stream, path)
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is a single array: expected an npz file with {_EXPECTED}")
            keys = _chosen_keys(path, file.files)
            arrays = {what: file[key] for what, key in keys.items()}
    except DataError:
        raise
    except NPZ_ERRORS as error:
        raise DataError(f"cannot read {path} as npz without pickles ({error})") from None
    said = {split: f"{path}, {keys[split, 'images']}" for split in ("train", "test")}
    images = {split: _channels_last(arrays[split, "images"], said[split]) for split in ("train", "test")}
    pixels = _pixels(images, said)
    labels = _Labels.read({split: (arrays[split, "labels"], f"{path}, {keys[split, 'labels']}") for split in said})
    train, test = (checked(pixels[split], labels.numbers[split], f"{path}, {split} split") for split in said)
    first, second = (images[split].shape[1:3] for split in ("train", "test"))
    if padding(*first) != padding(*second):
        raise DataError(f"{path}: training images are {first}, test images {second}: expected one size")
    return NpzData(train, test, max(labels.classes, int(train[1].max()) + 1), labels.names)


def _chosen_keys(path: Path, keys: list[str]) -> dict[tuple[str, str], str]:
    """The keys of images and labels of the training and the test split; raises DataError."""
    found: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        for meaning in _meanings(key):
            found.setdefault(meaning, []).append(key)
    splits = [split for split in _SPLITS if any((split, what) in found for what in _CONTENTS)]
    # a split without labels only where there is no other
    tests = [split for split in splits if split != "train"]
    test = next((split for split in tests if all((split, what) in found for what in _CONTENTS)), (*tests, "test")[0])
    chosen = {}
    for name, split in (("train", "train"), ("test", test)):
        for what in _CONTENTS:
            given, usual = found.get((split, what), []), f"{_CONTENTS[what][0]}_{split}"
            if usual in given:
                # whatever else there is
                given = [usual]
            if not given:
                raise DataError(
                    f"{path} lacks an array of {split} {what}, such as {usual}: expected "
                    f"{_EXPECTED}, found {plain(', '.join(keys)) or 'none'}"
                )
            if len(given) > 1:
                raise DataError(f"{path} has {' and '.join(given)}: expected one array of {split} {what}")
            chosen[name, what] = given[0]
    left = [key for key in keys if key not in chosen.values() and any(_meanings(key))]
    if left:
        log.info("%s: test images are %s; %s left alone", path, chosen["test", "images"], ", ".join(left))
    elif test != "test":
        log.info("%s: test images are %s", path, chosen["test", "images"])
    return chosen


def _meanings(key: str) -> Iterator[tuple[str, str]]:
    """Split and content that a key names, if it names any."""
    words = key.lower().split("_")
    for what, names in _CONTENTS.items():
        for split, other in (words, words[::-1]) if len(words) == 2 else ():
            if split in _SPLITS and other in names:
                yield split, what


def _require_room(stream: IO[bytes], path: Path) -> None:
    """Raise DataError where the arrays of an archive would not fit into memory, whatever their headers say."""
    if not zipfile.is_zipfile(stream):
        stream.seek(0)
        return
    with zipfile.ZipFile(stream) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > (room := available_memory(torch.device("cpu"))):
        raise DataError(f"{path} holds {size / 1e9:.1f} GB of arrays, {room / 1e9:.1f} GB of memory are free")
    stream.seek(0)


def _channels_last(images: NDArray[Any], what: str) -> NDArray[Any]:
    """(N, H, W) or (N, H, W, C) as it is, (N, C, H, W) with its channels behind; raises DataError."""
    if images.ndim == 4:
        first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
        if first and last:
            raise DataError(
                f"{what}: images of shape {images.shape} have channels first or last: expected (N, H, W, C) where the "
                "first and the last side could both be channels; save (N, H, W) if they are grey"
            )
        if first:
            return images.transpose(0, 2, 3, 1)
    return images


def _pixels(images: dict[str, NDArray[Any]], said: dict[str, str]) -> dict[str, NDArray[Any]]:
    """uint8 as it is; numbers from 0 to 255, and floats from 0 to 1 of all splits, as uint8; raises DataError."""
    odd = any(array.ndim not in (3, 4) or array.dtype.kind not in "iuf" for array in images.values())
    # what can be no images is refused together with its shape
    if odd or (all(array.dtype == np.uint8 for array in images.values()) and not _are_masks(images)):
        return images
    kinds = {array.dtype.kind == "f" for array in images.values()}
    if len(kinds) > 1:
        raise DataError(
            f"{said['train']} holds {images['train'].dtype}, {said['test']} {images['test'].dtype}: expected pixels of "
            "one type"
        )
    lowest, highest, whole = 0.0, 0.0, True
    for split, array in images.items():
        for block in _blocks(array):
            if not np.isfinite(block).all():
                raise DataError(f"{said[split]} holds NaN or infinity: expected pixels from 0 to 1, or from 0 to 255")
            lowest, highest = min(lowest, float(block.min())), max(highest, float(block.max()))
            whole = whole and bool((block == np.rint(block)).all())
            if lowest < 0 or highest > 255 or (highest > 1 and not whole):
                found = "fractions above 1" if lowest >= 0 and highest <= 255 else f"{lowest:g} to {highest:g}"
                raise DataError(
                    f"{said[split]} holds {array.dtype} numbers, {found}: expected uint8, fractions from 0 to 1, or "
                    "whole numbers from 0 to 255; normalise images when they are used, not in the file"
                )
    if highest <= 1 and not kinds.pop():
        raise DataError(
            f"{said['train']} holds {images['train'].dtype} numbers that are all 0 or 1: expected 0 to 255; multiply "
            "by 255, or save fractions as float32"
        )
    scale = 255 if highest <= 1 else 1
    return {split: _as_uint8(array, scale) for split, array in images.items()}


def _are_masks(images: Mapping[str, NDArray[Any]]) -> bool:
    """Whether pixels are 0 and 1; those that are all 0 are no masks."""
    highest = [block.max() for array in images.values() if array.size for block in _blocks(array)]
    return max(highest, default=0) == 1


def _as_uint8(array: NDArray[Any], scale: int) -> NDArray[np.uint8]:
    pixels = np.empty(array.shape, np.uint8)
    for start in range(0, len(array), _BLOCK):
        block = array[start : start + _BLOCK]
        # halves have too few bits for a product with 255
        exact = block.astype(np.float32) if block.dtype == np.float16 else block
        pixels[start : start + _BLOCK] = np.rint(exact * scale) if array.dtype.kind == "f" else block
    return pixels


def _blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (block for start in range(0, len(array), _BLOCK) if (block := array[start : start + _BLOCK]).size)


@dataclass(frozen=True)
class _Labels:
    """Labels of both splits as whole numbers; how many classes they name at least, and what these are called."""

    numbers: dict[str, NDArray[Any]]
    classes: int = 0
    names: tuple[str, ...] | None = None

    @classmethod
    def read(cls, given: dict[str, tuple[NDArray[Any], str]]) -> "_Labels":
        """Whole numbers (N,) or (N, 1), one-hot rows (N, classes) or texts; raises DataError."""
        flat = {split: _flat(array) for split, (array, _) in given.items()}
        forms = {split: _form(array) for split, array in flat.items()}
        if forms["train"] != forms["test"]:
            raise DataError(
                f"{given['train'][1]} holds {forms['train']}, {given['test'][1]} {forms['test']}: expected labels of "
                "one kind"
            )
        if forms["train"] == "texts":
            return cls._of_texts(flat, given["test"][1])
        if forms["train"] == "one column per class":
            return cls._of_columns(flat, {split: said for split, (_, said) in given.items()})
        return cls({split: _whole(array) for split, array in flat.items()})

    @classmethod
    def _of_texts(cls, given: dict[str, NDArray[Any]], tested: str) -> "_Labels":
        texts = {split: _decoded(array) for split, array in given.items()}
        names = np.unique(texts["train"])
        unseen = sorted(set(np.unique(texts["test"]).tolist()) - set(names.tolist()))
        if unseen:
            raise DataError(
                f"{tested} has labels that no training image has: {plain(', '.join(map(repr, unseen)))}; expected the "
                "same classes in both"
            )
        numbers: dict[str, NDArray[Any]] = {split: np.searchsorted(names, array) for split, array in texts.items()}
        return cls(numbers, len(names), tuple(names.tolist()))

    @classmethod
    def _of_columns(cls, given: dict[str, NDArray[Any]], said: dict[str, str]) -> "_Labels":
        columns = {split: array.shape[1] for split, array in given.items()}
        if columns["train"] != columns["test"]:
            raise DataError(
                f"{said['train']} has {columns['train']} columns, {said['test']} {columns['test']}: expected one per "
                "class in both"
            )
        for split, array in given.items():
            wrong = np.flatnonzero(~(((array == 0) | (array == 1)).all(1) & ((array == 1).sum(1) == 1)))
            if len(wrong):
                row = array[wrong[0]]
                many = int((row == 1).sum())
                found = f"{many} ones" if ((row == 0) | (row == 1)).all() else plain(str(row.tolist()))
                raise DataError(
                    f"{said[split]}: row {wrong[0]} has {found}: expected one label per image, as a number or as a row "
                    "with a single 1 in the column of its class"
                )
        return cls({split: array.argmax(1) for split, array in given.items()}, columns["train"])


def _form(array: NDArray[Any]) -> str:
    """What labels are, in the words of a message."""
    if array.ndim == 1 and array.dtype.kind in "US":
        return "texts"
    if array.ndim == 2 and array.dtype.kind in "iufb":
        return "one column per class"
    return "numbers"


def _flat(array: NDArray[Any]) -> NDArray[Any]:
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def _decoded(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind == "U":
        return array
    return np.array([text.decode("utf-8", "replace") for text in array.tolist()], dtype=str)


def _whole(array: NDArray[Any]) -> NDArray[Any]:
    """Floats that are whole numbers as such; everything else as it is, for :func:`checked` to refuse."""
    if array.dtype.kind != "f" or not (np.isfinite(array) & (array == np.rint(array))).all():
        return array
    return array.astype(np.int64) if (np.abs(array) < 2**53).all() else array
