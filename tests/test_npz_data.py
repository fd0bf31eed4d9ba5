"""npz files as people write them: names of arrays, channels first, fractions, labels of every form."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsitch.data import Dataset, load_dataset
from fastsitch.errors import DataError
from tests.conftest import Command


@pytest.fixture
def arrays(fashion: Dataset) -> dict[str, np.ndarray]:
    """Forty and twenty real images in colour, 12 x 10 pixels, all values in them, and their labels."""
    chosen = {}
    for split, data, count in (("train", fashion.train, 40), ("test", fashion.test, 20)):
        images = data.images[:count, 8:20, 8:18].numpy().copy()
        images[..., 1] //= 2
        images[0].reshape(-1)[:256] = np.arange(256)
        chosen[f"x_{split}"], chosen[f"y_{split}"] = images, np.arange(count) % 4
    return chosen


def load(path: Path, arrays: dict[str, Any]) -> Dataset:
    np.savez(path / "data.npz", **arrays)
    return load_dataset(f"npz:{path / 'data.npz'}", path)


@pytest.mark.parametrize(
    "names",
    [
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("X_train", "Y_train", "X_val", "Y_val"),
        ("train_x", "train_y", "test_x", "test_y"),
        ("images_train", "labels_train", "images_validation", "labels_validation"),
    ],
)
def test_names_of_arrays(names: tuple[str, ...], arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    plain = load(tmp_path, arrays)
    renamed = dict(zip(names, arrays.values(), strict=True))
    assert list(arrays) == ["x_train", "y_train", "x_test", "y_test"]
    assert load(tmp_path, {**renamed, "note": np.zeros(3)}).hash == plain.hash


def test_of_several_names_the_usual_one_counts(
    arrays: dict[str, np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = load(tmp_path, arrays)
    other = np.zeros_like(arrays["x_train"])
    with caplog.at_level(logging.INFO):
        assert load(tmp_path, {**arrays, "train_images": other}).hash == plain.hash
    assert "train_images left alone" in caplog.text
    del arrays["x_train"]
    with pytest.raises(DataError, match="has train_images and images_train: expected one array of train images"):
        load(tmp_path, {**arrays, "train_images": other, "images_train": other})


def test_files_of_medmnist(fashion: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three splits, labels (N, 1): the test images are the test images, and what is left alone is said."""
    images = fashion.train.images[:60, 2:30, 2:30, 0].numpy()
    labels = fashion.train.labels[:60].numpy().astype(np.uint8)[:, None]
    parts = {"train": slice(0, 40), "val": slice(40, 50), "test": slice(50, 60)}
    content = {f"{split}_images": images[part] for split, part in parts.items()}
    content |= {f"{split}_labels": labels[part] for split, part in parts.items()}
    with caplog.at_level(logging.INFO):
        data = load(tmp_path, content)
    assert np.array_equal(data.test.images[:, 2:30, 2:30, 2].numpy(), images[50:])
    assert data.test.labels.tolist() == labels[50:, 0].tolist()
    (line,) = [record.getMessage() for record in caplog.records if "left alone" in record.getMessage()]
    assert line.endswith("data.npz: test images are test_images; val_images, val_labels left alone")
    # without test labels the validation split is one
    del content["test_labels"]
    assert load(tmp_path, content).test.labels.tolist() == labels[40:50, 0].tolist()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_fractions_are_what_they_were_made_from(dtype: Any, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    plain = load(tmp_path, arrays)
    fractions = {name: (array / 255).astype(dtype) if "x" in name else array for name, array in arrays.items()}
    assert load(tmp_path, fractions).hash == plain.hash
    first = {name: array.transpose(0, 3, 1, 2) if "x" in name else array for name, array in fractions.items()}
    assert load(tmp_path, first).hash == plain.hash


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16])
def test_whole_numbers_from_0_to_255(dtype: Any, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    plain = load(tmp_path, arrays)
    wide = {name: array.astype(dtype) if "x" in name else array for name, array in arrays.items()}
    assert load(tmp_path, wide).hash == plain.hash


def test_channels_first(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    plain = load(tmp_path, arrays)
    first = {name: array.transpose(0, 3, 1, 2) if "x" in name else array for name, array in arrays.items()}
    assert load(tmp_path, first).hash == plain.hash
    grey = {name: array[..., 0] if "x" in name else array for name, array in arrays.items()}
    one = {name: array[:, None] if "x" in name else array for name, array in grey.items()}
    assert load(tmp_path, one).hash == load(tmp_path, grey).hash


@pytest.mark.parametrize("form", ["column", "floats", "float column", "one-hot", "truth values", "one-hot fractions"])
def test_forms_of_labels(form: str, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    plain = load(tmp_path, arrays)
    changed = {}
    for name in ("y_train", "y_test"):
        labels = arrays[name]
        changed[name] = {
            "column": labels[:, None].astype(np.uint8),
            "floats": labels.astype(np.float64),
            "float column": labels[:, None].astype(np.float32),
            "one-hot": np.eye(4, dtype=np.int64)[labels],
            "truth values": np.eye(4, dtype=bool)[labels],
            "one-hot fractions": np.eye(4, dtype=np.float32)[labels],
        }[form]
    assert load(tmp_path, {**arrays, **changed}).hash == plain.hash


def test_columns_of_classes_without_images_count(
    arrays: dict[str, np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = {name: np.eye(6)[array] if "y" in name else array for name, array in arrays.items()}
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, wide).classes == 6
    assert "2 of 6 classes have no training images (4, 5)" in caplog.text


@pytest.mark.parametrize("kind", ["U", "S", "column"])
def test_labels_that_are_texts(kind: str, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    words = np.array(["tr\u00f8ye", "boot", "coat", "\u00e5ndedrag"])
    texts = {name: words[arrays[name]] for name in ("y_train", "y_test")}
    if kind == "S":
        texts = {name: np.char.encode(array, "utf-8") for name, array in texts.items()}
    if kind == "column":
        texts = {name: array[:, None] for name, array in texts.items()}
    data = load(tmp_path, {**arrays, **texts})
    assert data.class_names == ("boot", "coat", "tr\u00f8ye", "\u00e5ndedrag")
    assert [data.class_names[label] for label in data.test.labels[:4]] == words.tolist()
    assert data.classes == 4


TWO_ONES = np.eye(4)[np.arange(40) % 4]
TWO_ONES[7, 0] = 1
NO_ONE = np.eye(4)[np.arange(40) % 4]
NO_ONE[9] = 0
SOFT = np.full((40, 4), 0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x_train": np.full((40, 3, 8, 3), 9, np.uint8)},
            "channels first or last: expected .*; save .N, H, W. if they",
        ),
        ({"x_train": np.zeros((40, 8, 8, 8), np.uint8)}, r"found uint8 \(40, 8, 8, 8\)"),
        ({"x_train": np.full((40, 12, 10, 3), 0.5)}, "x_train holds float64, .*x_test uint8: expected pixels of one"),
        ({"x_train": np.full((40, 12, 10, 3), True)}, "expected images as uint8 .*found bool"),
        ({"x_train": np.full((40, 12, 10, 3), 256, np.int32)}, "holds int32 numbers, 0 to 256: expected uint8"),
        ({"x_train": np.full((40, 12, 10, 3), -1, np.int8)}, "holds int8 numbers, -1 to 0: expected uint8"),
        ({"y_train": np.arange(40) / 2}, r"expected 40 integer labels, found float64 \(40,\)"),
        ({"y_train": np.full((40, 1), np.nan)}, r"expected 40 integer labels, found float64 \(40,\)"),
        ({"y_train": np.array(["a", "b"] * 20)}, "y_train holds texts, .*y_test numbers: expected labels of one kind"),
        ({"y_train": np.full(40, 1 + 2j)}, "expected 40 integer labels, found complex128"),
        ({"y_train": np.zeros((40, 2, 2), int)}, r"expected 40 integer labels, found int64 \(40, 2, 2\)"),
    ],
)
def test_arrays_that_mean_nothing_certain_are_refused(
    changes: dict[str, np.ndarray], message: str, arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, {**arrays, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "x_test holds NaN or infinity: expected pixels from 0 to 1, or from 0 to 255"),
        (np.inf, "x_test holds NaN or infinity"),
        (-0.1, "x_test holds float64 numbers, -0.1 to 1: expected uint8, fractions from 0 to 1, or whole numbers"),
        (1.0000001, "x_test holds float64 numbers, fractions above 1: expected uint8, fractions from 0 to 1"),
        (300.0, "x_test holds float64 numbers, 0 to 300: expected uint8"),
    ],
)
def test_fractions_that_are_none(value: float, message: str, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    fractions = {name: array / 255 if "x" in name else array for name, array in arrays.items()}
    fractions["x_test"][3, 2, 1, 0] = value
    with pytest.raises(DataError, match=message):
        load(tmp_path, fractions)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (TWO_ONES, np.eye(4)[np.arange(20) % 4], "y_train: row 7 has 2 ones: expected one label per image"),
        (NO_ONE, np.eye(4)[np.arange(20) % 4], "y_train: row 9 has 0 ones: expected one label per image"),
        (SOFT, np.eye(4)[np.arange(20) % 4], r"y_train: row 0 has \[0.25, 0.25, 0.25, 0.25\]: expected one label"),
        (np.eye(4)[np.arange(40) % 4], np.eye(5)[np.arange(20) % 4], "y_train has 4 columns, .*y_test 5: expected"),
        (np.eye(4)[np.arange(40) % 4], np.arange(20) % 4, "y_train holds one column per class, .*y_test numbers"),
        (np.array(["a", "b"] * 20), np.array(["a", "c"] * 10), "y_test has labels that no training image has: 'c';"),
    ],
)
def test_labels_that_name_no_class(
    train: np.ndarray, test: np.ndarray, message: str, arrays: dict[str, np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, {**arrays, "y_train": train, "y_test": test})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_masks_saved_as_whole_numbers_are_refused(kind: type, arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    masks = {name: (array > 99).astype(kind) if "x" in name else array for name, array in arrays.items()}
    expected = f"holds {np.dtype(kind)} numbers that are all 0 or 1: expected 0 to 255; multiply by 255"
    with pytest.raises(DataError, match=expected):
        load(tmp_path, masks)


def test_a_command_refuses_them_in_one_line(arrays: dict[str, np.ndarray], tmp_path: Path, run_cli: Command) -> None:
    np.savez(
        tmp_path / "odd.npz", **{**arrays, "x_train": arrays["x_train"] / 127.5 - 1, "x_test": arrays["x_test"] / 255}
    )
    ended = run_cli("train", "R1111", "--width", "2", "--dataset", f"npz:{tmp_path / 'odd.npz'}")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "x_train holds float64 numbers, -1 to 1: expected uint8, fractions from 0 to 1" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []
