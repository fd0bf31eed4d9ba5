"""Of the tables of a data set: which rows are for training and which for the test, and which columns are what."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsitch.data.dataset_name import DatasetName
from fastsitch.data.file_formats import MAX_LABEL
from fastsitch.data.folder_splits import TESTING, TRAINING, FolderSplit
from fastsitch.data.hub_dataset import read_tables
from fastsitch.data.table_rows import ImageColumn, Row
from fastsitch.errors import DataError, argument, plain

log = logging.getLogger(__name__)

_USUAL = {
    "image": ("image", "img"),
    "label": ("label", "labels", "fine_label", "class", "target", "cls"),
}
"""Names of columns that decide where several could be it."""

_EXPECTED = {"image": "encoded images", "label": "whole numbers, texts or ClassLabel"}


class TableSplit(FolderSplit):
    """The rows of one split and their labels."""

    @property
    def names(self) -> list[str]:
        """Every row's index in its table."""
        return [str(file.index) for file in self.files if isinstance(file, Row)]

    def said(self, name: str) -> str:
        return f"{self.root}, class {name}"


def find_rows(name: DatasetName) -> tuple[FolderSplit, FolderSplit, tuple[str, ...]]:
    """Training and test images of a data set of the hub, and its classes; raises DataError."""
    tables = {split: table for split, table in read_tables(name).items() if len(table)}
    if not tables:
        raise DataError(f"{name.source} has no rows: expected images and labels")
    features = next(iter(tables.values())).features
    image, label = _columns(name, features)
    values = {split: _values(table, label) for split, table in tables.items()}
    train, test = _chosen_splits(name, values)
    for split in (train, test):
        _require_known(values[split], f"{name.source}, {split} split, column {label}")
    classes, labels = _classes(name, features[label], values, train, test)
    found = {}
    for split, numbers in labels.items():
        column = _image_column(name, tables[split], split, image)
        rows = tuple(Row(column, index) for index in range(len(numbers)))
        found[split] = TableSplit(rows, tuple(numbers.tolist()), Path(f"{name.source}, {split} split"))
    if name.holdout is not None:
        return *found[train].held_out(name.holdout, classes), classes
    return found[train], found[test], classes


def _columns(name: DatasetName, features: Mapping[str, Any]) -> tuple[str, str]:
    """The columns of images and of labels."""
    import datasets

    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    pictures = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    likely = {
        "image": pictures or [column for column, feature in features.items() if _may_be_image(feature)],
        "label": classes or [column for column in features if column in _USUAL["label"]],
    }
    asked = {"image": name.image, "label": name.label}
    possible: dict[str, Callable[[Any], bool]] = {"image": _may_be_image, "label": _may_be_label}
    chosen = {}
    for what, candidates in likely.items():
        column = asked[what] or _likely(
            name, what, [each for each in candidates if possible[what](features[each])], features
        )
        if column not in features:
            raise DataError(f"{name.source} has no column {plain(column)}: found {plain(', '.join(features))}")
        if not possible[what](features[column]):
            raise DataError(
                f"{name.source}, column {column} holds {plain(str(features[column]))}: expected {_EXPECTED[what]}"
            )
        chosen[what] = column
    left = [column for candidates in likely.values() for column in candidates if column not in chosen.values()]
    if left:
        log.info(
            "%s: images are %s, labels are %s; %s left alone",
            name.source,
            chosen["image"],
            chosen["label"],
            " and ".join(left),
        )
    return chosen["image"], chosen["label"]


def _likely(name: DatasetName, what: str, candidates: Sequence[str], features: Mapping[str, Any]) -> str:
    """The one column, or the one that has a usual name; raises DataError where it is not certain."""
    usual = [column for column in candidates if column in _USUAL[what]]
    for certain in (candidates, usual):
        if len(certain) == 1:
            return certain[0]
    if not candidates:
        kind = "an Image" if what == "image" else f"a ClassLabel, or one called {' or '.join(_USUAL['label'][:3])}"
        raise DataError(
            f"{name.source} has no column of {what}s: expected {kind}, found {plain(', '.join(features))}; say which "
            f"it is with @{what}=COLUMN behind the data set's name"
        )
    raise DataError(
        f"{name.source} has the columns {plain(' and '.join(candidates))} of {what}s: choose one with "
        f"@{what}={candidates[0]} behind the data set's name"
    )


def _may_be_image(feature: Any) -> bool:
    import datasets

    if isinstance(feature, datasets.Value):
        return str(feature.dtype) in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def _may_be_label(feature: Any) -> bool:
    import datasets

    if isinstance(feature, datasets.Value):
        return str(feature.dtype).startswith(("int", "uint", "bool")) or _is_text(feature)
    return isinstance(feature, datasets.ClassLabel)


def _is_text(feature: Any) -> bool:
    return str(feature.dtype) in ("string", "large_string")


def _values(table: Any, label: str) -> NDArray[Any]:
    """Labels as they are: int64, or texts as objects; -1 and None where they are hidden."""
    column = table.data.column(label)
    if _is_text(table.features[label]):
        return np.array(column.to_pylist(), object)
    values: NDArray[Any] = column.cast("int64").fill_null(-1).to_numpy()
    return values


def _hidden(values: NDArray[Any]) -> int:
    hidden: int = values.tolist().count(None if values.dtype == object else -1)
    return hidden


def _chosen_splits(name: DatasetName, values: Mapping[str, NDArray[Any]]) -> tuple[str, str]:
    """The names of the training and the test split; with a share to hold out the only one, twice."""
    there = ", ".join(values)
    if name.holdout is not None:
        if len(values) > 1:
            raise DataError(
                f"{name.source} has the splits {there}, which say what is for the test: leave out "
                f"{argument('holdout', float(name.holdout))}"
            )
        (only,) = values
        return only, only
    train = next((split for split in TRAINING if split in values), None)
    tests = [split for split in TESTING if split in values]
    # one without labels only where there is no other
    test = next((split for split in tests if _hidden(values[split]) < len(values[split])), (*tests, None)[0])
    if train is None or test is None:
        hint = f"; to split its images, add {argument('holdout', 0.2)}" if len(values) == 1 else ""
        raise DataError(
            f"{name.source} has the split{'s' if len(values) > 1 else ''} {there}: expected train (or training) and "
            f"test (or {', '.join(TESTING[1:])}){hint}"
        )
    unused = [split for split in values if split not in (train, test)]
    if unused or (train, test) != ("train", "test"):
        others = f", and {' and '.join(unused)} left alone" if unused else ""
        log.info("%s: %s is taken for training, %s for the test%s", name.source, train, test, others)
    return train, test


def _require_known(values: NDArray[Any], said: str) -> None:
    if hidden := _hidden(values):
        raise DataError(
            f"{said}: {hidden} of {len(values)} labels are hidden (-1, or missing): expected a label for every image"
        )


def _classes(
    name: DatasetName, feature: Any, values: Mapping[str, NDArray[Any]], train: str, test: str
) -> tuple[tuple[str, ...], dict[str, NDArray[np.int64]]]:
    """The names of the classes, and the labels of both splits as numbers."""
    if values[train].dtype == object:
        names = sorted(set(values[train].tolist()))
        unknown = sorted(set(values[test].tolist()) - set(names))
        if unknown:
            raise DataError(
                f"{name.source}, {test} split has labels that no training image has: {plain(', '.join(unknown))}; "
                "expected the same classes in both"
            )
        places = {text: place for place, text in enumerate(names)}
        numbers = {split: np.array([places[text] for text in values[split]], np.int64) for split in (train, test)}
        return tuple(names), numbers
    stated = getattr(feature, "names", None)
    classes = tuple(stated) if stated else tuple(map(str, range(min(int(values[train].max()), MAX_LABEL) + 1)))
    for split in (train, test):
        low, high = int(values[split].min()), int(values[split].max())
        if low < 0 or high >= len(classes):
            raise DataError(
                f"{name.source}, {split} split has label {low if low < 0 else high}: expected 0 to {len(classes) - 1}"
            )
    return classes, {split: values[split] for split in (train, test)}


def _image_column(name: DatasetName, table: Any, split: str, column: str) -> ImageColumn:
    modified = max((Path(file["filename"]).stat().st_mtime_ns for file in table.cache_files), default=0)
    return ImageColumn(name.source, split, column, table.data.column(column), modified)
