"""Image folders and npz files as people have them: read exactly, or refused in one line before anything is written."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from fastsitch.data import (
    Dataset,
    ImageFiles,
    canonical_dataset,
    dataset_folder,
    dataset_size,
    folder_dataset,
    load_dataset,
)
from fastsitch.errors import DataError
from tests.conftest import Command

CLASSES = ("boot", "coat", "shirt")


def pictures(folder: Path, fashion: Dataset, size: tuple[int, int] = (24, 16), each: int = 4) -> Path:
    """Real images of three classes, width x height as given, as png files."""
    for split, images in (("train", fashion.train), ("test", fashion.test)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for k, image in enumerate(images.images[images.labels == label][:each]):
                Image.fromarray(image.numpy()).resize(size).save(folder / split / name / f"{k}.png")
    return folder


def test_folders_of_mixed_sizes_are_cropped_and_resized_as_torchvision_does(fashion: Dataset, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "mixed", fashion)
    tall = Image.fromarray(fashion.train.images[0].numpy()).resize((20, 51))
    tall.save(folder / "train" / "coat" / "z.png")
    with pytest.raises(DataError, match=r"z\.png is 20x51 but .*0\.png is 24x16: .* imagefolder:DIR@SIDE"):
        _ = load_dataset(f"imagefolder:{folder}", tmp_path).train.pixels
    data = load_dataset(f"imagefolder:{folder}@16", tmp_path)
    assert data.input_shape == (3, 16, 16)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 5 + [2] * 4
    wanted = functional.center_crop(functional.resize(tall, [16]), [16])
    assert np.array_equal(data.train.images[8].numpy(), np.asarray(wanted))
    size = dataset_size(f"imagefolder:{folder}@16", tmp_path)
    assert size is not None
    assert (size.train, size.test, size.classes, size.height, size.width) == (13, 12, 3, 16, 16)
    # each size is another data set, which is found again by the name that is recorded
    names = [f"imagefolder:{folder}", f"imagefolder:{folder}@16", f"imagefolder:{folder}@24"]
    assert len({dataset_folder(name) for name in names}) == 3
    for name in names:
        assert canonical_dataset(canonical_dataset(name)) == name
    with pytest.raises(DataError, match="expected imagefolder:DIR@SIDE with a side of 8 to 4096 pixels"):
        load_dataset(f"imagefolder:{folder}@5", tmp_path)
    (tmp_path / "mixed@16").mkdir()
    with pytest.raises(DataError, match=r"mixed@16 has no folder train/"):
        load_dataset(f"imagefolder:{folder}@16", tmp_path)


def test_pixels_that_memory_does_not_hold_are_kept_on_disk(
    fashion: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(tmp_path / "folder", fashion, (28, 28))
    held = load_dataset(f"imagefolder:{folder}", tmp_path)
    assert held.input_shape == (3, 32, 32)
    monkeypatch.setattr(folder_dataset, "MEMORY_SHARE", 0)
    in_files = load_dataset(f"imagefolder:{folder}", tmp_path)
    assert isinstance(in_files.train.images, ImageFiles)
    assert in_files.input_shape == (3, 32, 32)
    assert in_files.hash == held.hash
    assert in_files.normalisation == held.normalisation
    assert in_files.normalisation_for(1) == held.normalisation_for(1)
    assert torch.equal(in_files.train.pixels, held.train.images)


def empty_class(folder: Path) -> str:
    for path in (folder / "train" / "shirt").iterdir():
        path.unlink()
    return r"train/shirt has no images: expected png, jpg, webp, bmp, gif, tif, ppm or pgm files in every class"


def class_of_training_alone(folder: Path) -> str:
    (folder / "train" / "sandal").mkdir()
    return r"train has classes that test/ lacks: sandal; expected the same class folders in both"


def class_of_the_test_alone(folder: Path) -> str:
    (folder / "train" / "boot").rename(folder / "train" / "boots")
    return r"test has classes that train/ lacks: boot; expected the same class folders in both"


def of_another_kind(folder: Path) -> str:
    (folder / "train" / "coat" / "5.heic").write_bytes((folder / "train" / "coat" / "1.png").read_bytes())
    return r"coat/5\.heic: expected png, jpg, webp, bmp, gif, tif, ppm or pgm files; convert it first, or remove it"


def in_no_class(folder: Path) -> str:
    (folder / "train" / "coat" / "1.png").rename(folder / "train" / "1.png")
    return r"train/1\.png is in no class folder: expected one folder per class in .*train"


def not_an_image(folder: Path) -> str:
    (folder / "test" / "shirt" / "3.png").write_bytes(b"not an image")
    return r"cannot read .*test/shirt/3\.png as an image \(cannot identify"


def cut_off(folder: Path) -> str:
    """A file whose head is whole: found only when it is decoded."""
    path = folder / "train" / "coat" / "3.png"
    path.write_bytes(path.read_bytes()[:-60])
    return r"cannot read .*train/coat/3\.png as an image \("


def other_size(folder: Path) -> str:
    Image.new("RGB", (8, 8)).save(folder / "train" / "coat" / "x.png")
    return r"coat/x\.png is 8x8 but .*boot/0\.png is 24x16: expected images of one size"


@pytest.mark.parametrize(
    "spoil",
    [
        empty_class,
        of_another_kind,
        in_no_class,
        class_of_training_alone,
        class_of_the_test_alone,
        not_an_image,
        cut_off,
        other_size,
    ],
)
def test_folders_that_cannot_be_used_are_refused(
    spoil: Callable[[Path], str], fashion: Dataset, tmp_path: Path
) -> None:
    folder = pictures(tmp_path / "folder", fashion)
    assert len(load_dataset(f"imagefolder:{folder}", tmp_path).train) == 12
    message = spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        _ = load_dataset(f"imagefolder:{folder}", tmp_path / "scratch").train.pixels
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("spoil", [not_an_image, cut_off])
def test_commands_refuse_bad_data_with_one_line_and_write_nothing(
    spoil: Callable[[Path], str], fashion: Dataset, tmp_path: Path, run_cli: Command
) -> None:
    folder = pictures(tmp_path / "folder", fashion)
    message = spoil(folder)
    ended = run_cli("train", "R1111", "--width", "4", "--dataset", f"imagefolder:{folder}")
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if " images of " not in line]
    assert re.search(message, line)
    assert list((tmp_path / "work").iterdir()) == []


def test_many_classes_and_sizes_that_are_no_squares(fashion: Dataset, tmp_path: Path) -> None:
    """Any number of classes, any size: from the file to the network."""
    images, labels = fashion.train.images[:300, :24].numpy(), np.arange(300)
    np.savez(tmp_path / "many.npz", x_train=images, y_train=labels, x_test=images[:50], y_test=labels[:50])
    data = load_dataset(f"npz:{tmp_path / 'many.npz'}", tmp_path)
    assert (data.classes, data.input_shape) == (300, (3, 24, 32))
