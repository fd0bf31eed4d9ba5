"""Pixels of image folders: decoded once and kept, or read from their files; results are the same either way."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsitch.data import Dataset, ImageFiles, folder_dataset, image_folder, load_dataset
from tests.conftest import Command

HOUR = 3600


@pytest.fixture
def folder(tmp_path: Path, fashion: Dataset, monkeypatch: pytest.MonkeyPatch) -> Path:
    """JPEGs of two classes, an hour old; so few are kept here."""
    monkeypatch.setattr(folder_dataset, "WORTH_KEEPING", 10)
    for split, count in (("train", 160), ("test", 12)):
        for k in range(count):
            path = tmp_path / "images" / split / ("boot" if k % 2 else "coat") / f"{k:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(fashion.train.pixels[k].numpy()).resize((40, 44)).save(path)
            age(path)
    return tmp_path / "images"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose pixels are decoded."""
    seen: list[Path] = []
    as_rgb = image_folder.as_rgb

    def counted(picture: Image.Image, background: str) -> Image.Image:
        seen.append(Path(picture.filename))  # type: ignore[attr-defined]
        return as_rgb(picture, background)

    monkeypatch.setattr(image_folder, "as_rgb", counted)
    return seen


def age(path: Path, seconds: float = HOUR) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def load(folder: Path, parts: str = "@32") -> Dataset:
    return load_dataset(f"imagefolder:{folder}{parts}", folder.parent / "data")


def kept(folder: Path, suffix: str) -> Path:
    (path,) = (folder.parent / "data" / "scans").glob(f"*.{suffix}")
    return path


def test_pixels_are_decoded_once(folder: Path, decoded: list[Path]) -> None:
    first = load(folder)
    assert len(decoded) == 172
    again = load(folder)
    assert len(decoded) == 172
    assert again.hash == first.hash
    assert torch.equal(again.train.pixels, first.train.pixels)
    assert torch.equal(again.test.pixels, first.test.pixels)
    assert torch.equal(again.train.labels, first.train.labels)
    plain = Dataset(first.name, first.train, first.test, 2)
    assert (plain.hash, plain.normalisation) == (again.hash, again.normalisation)
    assert plain.normalisation_for(1) == again.normalisation_for(1)
    # another size is another data set
    assert load(folder, "@16").input_shape == (3, 16, 16)
    assert len(decoded) == 344


@pytest.mark.parametrize("change", ["pixels", "time", "name", "label"])
def test_what_has_changed_is_decoded_again(folder: Path, decoded: list[Path], change: str) -> None:
    before = load(folder).hash
    path = folder / "train" / "boot" / "001.jpg"
    if change == "pixels":
        Image.new("RGB", (40, 44), "red").save(path)
        age(path)
    elif change == "time":
        age(path, 2 * HOUR)
    elif change == "name":
        path.rename(path.with_name("900.jpg"))
    else:
        path.rename(folder / "train" / "coat" / "001.jpg")
    del decoded[:]
    after = load(folder).hash
    assert len(decoded) == 172
    # the order of the images is that of their names
    assert (after == before) == (change == "time")
    del decoded[:]
    assert load(folder).hash == after
    assert decoded == []


def test_files_that_still_change_are_not_kept(folder: Path, decoded: list[Path]) -> None:
    age(folder / "train" / "boot" / "001.jpg", 0.0)
    load(folder)
    assert not list((folder.parent / "data").rglob("*.pixels"))
    load(folder)
    assert len(decoded) == 344


@pytest.mark.parametrize("damage", ["flipped bit", "cut", "other facts", "no json", "link"])
def test_damaged_pixels_are_decoded_again(folder: Path, decoded: list[Path], damage: str) -> None:
    before = load(folder)
    pixels, facts = kept(folder, "pixels"), kept(folder, "json")
    content = pixels.read_bytes()
    if damage == "flipped bit":
        pixels.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif damage == "cut":
        pixels.write_bytes(content[:-1])
    elif damage == "other facts":
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "hash": "0" * 64}))
    elif damage == "no json":
        facts.write_bytes(b"\x00" * 100)
    else:
        pixels.unlink()
        pixels.symlink_to("/dev/zero")
    del decoded[:]
    again = load(folder)
    assert len(decoded) == 172
    assert again.hash == before.hash
    assert torch.equal(again.train.pixels, before.train.pixels)
    # and kept anew, unless that would replace what is no file
    del decoded[:]
    assert load(folder).hash == before.hash
    assert (decoded == []) == (damage != "link")
    assert pixels.is_symlink() == (damage == "link")


def test_a_folder_that_cannot_be_written_to_is_no_hindrance(folder: Path) -> None:
    (folder.parent / "data").write_text("no folder")
    assert len(load(folder).train) == 160


def test_images_that_stay_in_files_are_looked_at_once(
    folder: Path, decoded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = load(folder)
    monkeypatch.setattr(folder_dataset, "MOST_IN_MEMORY", 0)
    in_files = load(folder)
    assert isinstance(in_files.train.images, ImageFiles)
    del decoded[:]
    again = load(folder)
    assert (again.hash, again.normalisation) == (held.hash, held.normalisation)
    assert decoded == []
    index = torch.tensor([3, 1, 17])
    assert torch.equal(again.train[index].pixels, held.train.pixels[index])
    assert len(decoded) >= 3
    Image.new("RGB", (8, 8)).save(folder / "test" / "boot" / "001.jpg")
    age(folder / "test" / "boot" / "001.jpg")
    assert load(folder).hash != held.hash


def test_results_do_not_depend_on_where_pixels_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, run_cli: Command, tmp_path: Path
) -> None:
    """A network trained with random views, its store, and a sweep, from memory and from files: bit for bit."""
    matrices = []
    for most in (folder_dataset.MOST_IN_MEMORY, 0):
        monkeypatch.setattr(folder_dataset, "MOST_IN_MEMORY", most)
        root = tmp_path / f"root{most}"
        data = ("--dataset", f"imagefolder:{folder}@32", "--root", str(root))
        train = ("train", "R1111", "R1112", "--width", "4", "--epochs", "2", "--recipe", "fast")
        for command in (
            (*train, *data),
            ("precompute", "R1111", *data),
            (
                *("sweep", "--senders", "R1111", "--receivers", "R1112", "--recipe", "small", "--batch-size", "20"),
                *("--run", "r", "--epochs", "2", *data),
            ),
        ):
            ended = run_cli(*command)
            assert ended.returncode == 0, ended.stderr
        units = sorted((root / "runs").rglob("*.npz"))
        matrices.append({path.name: np.load(path)["accuracy"] for path in units})
    assert len(matrices[0]) == 1
    assert matrices[0].keys() == matrices[1].keys()
    for name, matrix in matrices[0].items():
        assert np.array_equal(matrix, matrices[1][name]), name
