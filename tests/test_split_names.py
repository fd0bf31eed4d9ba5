"""What split folders may be called, and what is taken for no class."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from fastsitch.data import load_dataset
from fastsitch.data.dataset import Dataset
from fastsitch.errors import DataError
from tests.conftest import Command


def pictures(*folders: Path, count: int = 8) -> None:
    for folder in folders:
        folder.mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (16, 16), (k, len(folder.name), 7)).save(folder / f"{k}.png")


def split(folder: Path, *names: str) -> Path:
    pictures(*(folder / name / kind for name in names for kind in ("cat", "dog")))
    return folder


def load(folder: Path, options: str = "") -> Dataset:
    return load_dataset(f"imagefolder:{folder}{options}", folder.parent)


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("TRAIN", "VAL"), ("training", "testing"), ("Training", "Testing"), ("train", "Valid")]
)
def test_split_folders_have_their_names_in_any_case(
    names: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, run_cli: Command
) -> None:
    folder = split(tmp_path / "pics", *names)
    with caplog.at_level(logging.INFO):
        data = load(folder)
    assert (data.class_names, len(data.train), len(data.test)) == (("cat", "dog"), 16, 16)
    assert f"{names[0]}/ is taken for training, {names[1]}/ for the test" in caplog.text
    with pytest.raises(DataError, match=rf"has the folder {names[0]}/, by which its images are split: leave out"):
        load(folder, "@holdout=0.2")
    ended = run_cli("train", "R1111", "--dataset", f"imagefolder:{folder}", "--holdout", "0.2", "--root", tmp_path)
    assert ended.returncode == 2
    assert "leave out --holdout 0.2" in ended.stderr


def test_two_that_differ_in_case_are_refused(tmp_path: Path) -> None:
    folder = split(tmp_path / "pics", "train", "test", "Test")
    if len([*folder.iterdir()]) < 3:
        pytest.skip("names do not differ in case here")
    for options in ("", "@holdout=0.2"):
        with pytest.raises(DataError, match=r"pics has the folders Test/ and test/: expected one test/; rename one$"):
            load(folder, options)


@pytest.mark.parametrize("names", [("seg_train", "seg_test"), ("Train Images", "test-set"), ("train2017", "val2017")])
def test_names_that_are_nearly_those_of_splits_are_named(names: tuple[str, str], tmp_path: Path) -> None:
    folder = split(tmp_path / "pics", *names)
    one, other = sorted(names)
    with pytest.raises(DataError, match=rf"; {one}/ and {other}/ look like splits: rename what is meant to train/"):
        load(folder)
    with pytest.raises(DataError, match=rf"{one} looks like a split, not a class: it has folders, such as cat/, and"):
        load(folder, "@holdout=0.2")
    (folder / names[0]).rename(folder / "Train")
    with pytest.raises(DataError, match=rf"no folder test/: .*; {names[1]}/ looks like a split: rename"):
        load(folder)
    assert load(folder / "Train", "@holdout=0.2").class_names == ("cat", "dog")


def test_a_test_split_alone_is_no_class_folder(tmp_path: Path) -> None:
    folder = split(tmp_path / "pics", "Test")
    with pytest.raises(DataError, match=r"no folder train/: .* name .*pics/Test with holdout=0.2$"):
        load(folder)
    assert len(load(folder / "Test", "@holdout=0.2").train)


def test_classes_may_be_called_as_splits_are(tmp_path: Path) -> None:
    """Where nothing else is possible: images in them, as in the folders beside them."""
    folder = tmp_path / "vehicles"
    pictures(folder / "Train", folder / "bus", folder / "test tube", count=40)
    assert load(folder, "@holdout=0.3").class_names == ("Train", "bus", "test tube")
    pictures(folder / "Test", count=40)
    with pytest.raises(DataError, match=r"has the folder Train/, by which its images are split"):
        load(folder, "@holdout=0.3")


def test_folders_below_classes_stay_a_part_of_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    pictures(*(one / name / "images" for name in ("cat", "dog")), count=40)
    assert load(one, "@holdout=0.3").class_names == ("cat", "dog")
    assert "taken for classes" not in caplog.text
    split(several, "first", "second")
    load(several, "@holdout=0.3")
    assert (
        "first/ and second/ are taken for classes, but have the same folders in them, such as cat/ and" in caplog.text
    )
