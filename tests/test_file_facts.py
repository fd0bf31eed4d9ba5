"""What is remembered of the files of a folder: as long as they are the same, and only where it is whole."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastsitch.data import file_facts
from fastsitch.data.dataset_name import DatasetName
from fastsitch.data.image_folder import ImageFolder

HOUR = 3600


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve images of several sizes, an hour old; so few are remembered here."""
    monkeypatch.setattr(file_facts, "_WORTH", 10)
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("boot", "coat"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for k in range(3):
                pixels = generator.integers(0, 256, (20 + k, 30, 3 + k % 2), np.uint8)
                path = tmp_path / "images" / split / name / f"{k}.png"
                Image.fromarray(pixels).save(path)
                age(path)
    return tmp_path / "images"


def age(path: Path, seconds: float = HOUR) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def scan(folder: Path) -> ImageFolder:
    return ImageFolder.scan(DatasetName.parse(f"imagefolder:{folder}"), folder.parent / "data")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are looked at."""
    seen: list[Path] = []
    look = file_facts.FolderFacts._get

    def counting(self: file_facts.FolderFacts, file: Path, given: object) -> file_facts.FileFacts:
        def counted(path: Path) -> file_facts.FileFacts:
            seen.append(path)
            return given(path)  # type: ignore[operator,no-any-return]

        return look(self, file, counted)

    monkeypatch.setattr(file_facts.FolderFacts, "_get", counting)
    return seen


def test_files_are_opened_once(folder: Path, opened: list[Path]) -> None:
    first = scan(folder)
    digest = first.hash()
    assert len(opened) == 12
    again = scan(folder)
    assert again == first
    assert again.hash() == digest
    assert len(opened) == 12


def test_what_changed_is_opened_again(folder: Path, opened: list[Path]) -> None:
    before = scan(folder).hash()
    changed = folder / "train" / "coat" / "1.png"
    Image.new("RGB", (30, 21), "red").save(changed)
    age(changed, HOUR / 2)
    opened.clear()
    assert scan(folder).hash() != before
    assert opened == [changed]
    (folder / "train" / "coat" / "2.png").unlink()
    assert len(scan(folder).train.files) == 5


def test_what_changed_just_now_is_not_relied_on(folder: Path, opened: list[Path]) -> None:
    """Another change in the same moment would not be seen."""
    age(folder / "test" / "boot" / "0.png", 0)
    scan(folder)
    opened.clear()
    scan(folder)
    assert opened == [folder / "test" / "boot" / "0.png"]


@pytest.mark.parametrize("damage", ["cut", "flip", "other", "folder"])
def test_damaged_facts_are_found_anew(folder: Path, opened: list[Path], damage: str) -> None:
    expected = scan(folder).hash()
    (path,) = (folder.parent / "data" / "scans").iterdir()
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        # inside of the sizes, where a shape would still be right
        at = content.index(np.array([20, 30], np.int64).tobytes())
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif damage == "other":
        np.savez(path, x=np.zeros(3))
    else:
        path.unlink()
        path.mkdir()
    opened.clear()
    assert scan(folder).hash() == expected
    assert len(opened) == 12


def test_facts_need_no_place_to_be_kept(folder: Path) -> None:
    (folder.parent / "data").write_text("no folder")
    assert scan(folder).hash() == scan(folder).hash()
