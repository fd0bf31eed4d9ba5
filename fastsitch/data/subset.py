"""Class-balanced subsets of a data set: the same number of images is always the same images."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastsitch.data.dataset import Dataset, Split, Whole
from fastsitch.data.known_sizes import DatasetSize
from fastsitch.errors import DataError

_SEED = 0


@dataclass(frozen=True)
class Subset:
    """How many training and test images of a data set are taken; None: all of them.

    ``str`` is what a data set's name ends with: ``@train=5000@test=1000``.
    """

    train: int | None = None
    test: int | None = None

    def __bool__(self) -> bool:
        return self.train is not None or self.test is not None

    def __str__(self) -> str:
        parts = (("train", self.train), ("test", self.test))
        return "".join(f"@{split}={count}" for split, count in parts if count is not None)

    def of(self, size: DatasetSize, name: str) -> DatasetSize:
        """The size of the subset of a data set of this size; raises DataError where it has too few images."""
        for split, available in (("train", size.train), ("test", size.test)):
            self.require(split, available, size.classes, name)
        return self.applied(size)

    def applied(self, size: DatasetSize) -> DatasetSize:
        """The size with the numbers that are asked for, whatever there is."""
        return replace(
            size,
            train=size.train if self.train is None else self.train,
            test=size.test if self.test is None else self.test,
        )

    def require(self, split: str, available: int, classes: int, name: str) -> None:
        """Raise DataError unless a split of so many images has the subset, and every class one for training."""
        count = self.train if split == "train" else self.test
        kind = "training" if split == "train" else "test"
        if count is None:
            return
        if not 1 <= count <= available:
            raise DataError(f"data set {name}: {count} {kind} images were asked for, expected 1 to {available}")
        if split == "train" and count < classes:
            raise DataError(
                f"data set {name}: {count} training images were asked for, expected at least one of each of "
                f"{classes} classes"
            )


def balanced(labels: ArrayLike, names: Sequence[str], count: int) -> NDArray[np.int64]:
    """Indices, in ascending order, of ``count`` images with as many of every class as there can be.

    A class that has too few gives all; what cannot be shared out equally goes to classes drawn by their label. In a
    class the images whose names have the smallest sha256 are taken: larger subsets contain smaller ones, and an image
    that is added to the class takes the place of at most one.
    """
    of_class = np.asarray(labels, np.int64)
    members = [np.flatnonzero(of_class == label) for label in np.unique(of_class)]
    shares = _shares([len(group) for group in members], count)
    chosen = []
    for group, share in zip(members, shares, strict=True):
        if share == len(group):
            chosen.append(group)
        elif share:
            ranked = sorted(group.tolist(), key=lambda index: _rank("image", names[index]))
            chosen.append(np.asarray(ranked[:share], np.int64))
    return np.sort(np.concatenate(chosen))


def _shares(available: Sequence[int], count: int) -> list[int]:
    """How many images each class gives, ``count`` in all: the same of each as far as it has them."""
    assert count <= sum(available)
    level = 0
    while level < max(available) and sum(min(size, level + 1) for size in available) <= count:
        # the step to the next level at which a class runs out, or the images do
        open_classes = [size for size in available if size > level]
        left = count - sum(min(size, level) for size in available)
        level += min(min(open_classes) - level, left // len(open_classes))
    shares = [min(size, level) for size in available]
    drawn = sorted((k for k, size in enumerate(available) if size > level), key=lambda k: _rank("class", str(k)))
    for k in drawn[: count - sum(shares)]:
        shares[k] += 1
    return shares


def _rank(kind: str, name: str) -> bytes:
    return hashlib.sha256(os.fsencode(f"{kind}:{_SEED}:{name}")).digest()


def take_subset(whole: Dataset, subset: Subset, name: str) -> Dataset:
    """A subset of a data set whose images are named by their index; the whole itself where all is asked for.

    Raises DataError where it has too few images.
    """
    if not subset:
        return whole
    subset.require("train", len(whole.train), whole.classes, name)
    subset.require("test", len(whole.test), whole.classes, name)
    return replace(
        whole,
        name=name,
        train=_some(whole.train, subset.train),
        test=_some(whole.test, subset.test),
        whole=Whole(whole.name, whole.hash, all_tested=subset.test is None),
        files_hash=None if whole.files_hash is None else hashlib.sha256(f"{whole.hash}{subset}".encode()).hexdigest(),
        content=None,
    )


def _some(split: Split, count: int | None) -> Split:
    if count is None:
        return split
    labels = split.labels.cpu().numpy()
    index = torch.from_numpy(balanced(labels, [str(k) for k in range(len(labels))], count))
    return Split(split.images[index], split.labels[index])
