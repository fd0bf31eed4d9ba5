"""Data sets of PyTorch from Python: registered under a name that everything else takes, within the process."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset
from torchvision import datasets, transforms

import fastsitch
from fastsitch.data import Dataset, ImageFiles, Preprocessing, load_dataset, python_dataset
from fastsitch.errors import ConfigError, DataError
from tests.conftest import Command
from tests.test_any_data import CLASSES, pictures

Split = list[tuple[Any, Any]]


@pytest.fixture(autouse=True)
def none_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_dataset, "_registered", {})


def test_an_image_folder_of_torchvision_is_ours(fashion: Dataset, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pics", fashion, (28, 28), each=60)
    plain = load_dataset(f"imagefolder:{folder}", tmp_path)
    made = [datasets.ImageFolder(folder / split) for split in ("train", "test")]
    data = fastsitch.dataset_from(*made, name="clothes")
    assert data.name == "python:clothes"
    assert data.hash == plain.hash
    assert data.class_names == CLASSES
    assert data.normalisation == plain.normalisation
    root = tmp_path / "root"
    (record,) = fastsitch.train("R1111", dataset=data.name, width=2, epochs=1, root=root)
    (other,) = fastsitch.train("R1111", dataset=plain.name, width=2, epochs=1, root=root)
    assert record.weights_hash == other.weights_hash
    assert record.dataset == "python:clothes"
    options: dict[str, Any] = {"epochs": 1, "batch_size": 16, "recipe": "small", "root": root}
    runs = [fastsitch.sweep("R1111", "R1111", dataset=of.name, **options) for of in (data, plain)]
    assert [run.config.dataset for run in runs] == [data.name, plain.name]
    matrices = [run.matrix("R1111", "R1111", "loss", setting="T2T") for run in runs]
    assert np.array_equal(*matrices)
    some = fastsitch.sweep("R1111", "R1111", dataset="python:clothes@train=90@test=30", **options)
    assert some.config.dataset == "python:clothes@train=90@test=30"
    assert fastsitch.estimate("R1111", "R1111", dataset=data.name, **options).data.train == 180
    fastsitch.add("own", "torchvision:resnet18", dataset=data.name, root=root)


@pytest.mark.parametrize(
    "form",
    [
        lambda image: image,
        lambda image: np.asarray(image),
        lambda image: np.asarray(image) / 255,
        lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
        lambda image: transforms.functional.to_tensor(image),
        lambda image: transforms.functional.to_tensor(image).half(),
        lambda image: image.convert("RGBA"),
    ],
)
@pytest.mark.parametrize("label", [int, np.int64, torch.tensor])
def test_images_come_in_many_forms(form: Callable[[Any], Any], label: Callable[[int], Any], fashion: Dataset) -> None:
    def split(of: Any) -> Split:
        images, labels = of.images[:12].roll(3, 1).numpy(), of.labels[:12].tolist()
        return [(form(Image.fromarray(image)), label(k)) for image, k in zip(images, labels, strict=True)]

    data = fastsitch.dataset_from(split(fashion.train), split(fashion.test), name="few")
    assert torch.equal(data.train.pixels, fashion.train.pixels[:12].roll(3, 1))
    assert torch.equal(data.test.labels, fashion.test.labels[:12])


def test_grey_ones_get_three_channels_and_those_of_mnist_a_border(fashion: Dataset) -> None:
    small = fashion.train.pixels[:20, 2:30, 2:30, 0]
    for images in (small[:, None], small.float()[:, None] / 255):
        split = TensorDataset(images, fashion.train.labels[:20])
        data = fastsitch.dataset_from(split, Subset(split, [3, 1]), name="grey")
        assert torch.equal(data.train.pixels, fashion.train.pixels[:20])
        assert torch.equal(data.test.pixels, fashion.train.pixels[[3, 1]])
    arrays = [(image.numpy(), 1) for image in small]
    assert torch.equal(fastsitch.dataset_from(arrays, arrays, name="grey").train.pixels, fashion.train.pixels[:20])


def test_images_that_memory_does_not_hold_are_asked_for_again(
    fashion: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(tmp_path / "pics", fashion, (28, 28), each=60)
    made = [datasets.ImageFolder(folder / split) for split in ("train", "test")]
    held = fastsitch.dataset_from(*made, name="held")
    monkeypatch.setattr(python_dataset, "MEMORY_SHARE", 0)
    data = fastsitch.dataset_from(*made, name="large")
    assert isinstance(data.train.images, ImageFiles)
    assert data.input_shape == held.input_shape == (3, 32, 32)
    assert torch.equal(data.train.pixels, held.train.pixels)
    assert (data.hash, data.normalisation) == (held.hash, held.normalisation)
    some = [load_dataset(f"python:{name}@train=30", tmp_path) for name in ("held", "large")]
    assert some[0].hash == some[1].hash
    (record,) = fastsitch.train("R1111", dataset=data.name, width=2, epochs=1, root=tmp_path / "root")
    (other,) = fastsitch.train("R1111", dataset=held.name, width=2, epochs=1, root=tmp_path / "root")
    assert record.weights_hash == other.weights_hash
    items = [*made[0]]
    large = fastsitch.dataset_from(items, items, name="large")
    items[7] = (IMAGE, 0)
    with pytest.raises(DataError, match="python:large, train item 7 has another size than before"):
        _ = large.train.pixels


def test_images_of_several_sizes_are_asked_for_again(fashion: Dataset, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pics", fashion, each=20)
    Image.open(folder / "train" / "boot" / "3.png").resize((30, 40)).save(folder / "train" / "boot" / "3.png")
    made = [datasets.ImageFolder(folder / split) for split in ("train", "test")]
    data = fastsitch.dataset_from(*made, name="large")
    wanted = Preprocessing(crop=(16, 16), resize=(20, 20))
    for split, items in zip((data.train, data.test), made, strict=True):
        assert isinstance(split.images, ImageFiles)
        shown = torch.stack([torch.from_numpy(np.array(wanted.shown(image))) for image, _ in items])
        assert torch.equal(split.images.read(wanted), shown)
    with pytest.raises(DataError, match="train item 13 is 30x40 but .*train item 0 is 24x16"):
        _ = data.train.pixels
    # the hash is that of the content, of a subset too
    assert fastsitch.dataset_from(*made, name="same").hash == data.hash
    some = load_dataset("python:large@train=30", tmp_path)
    assert len(some.train) == 30
    assert some.hash != data.hash
    assert some.hash == load_dataset("python:same@train=30", tmp_path).hash
    picture = Image.open(folder / "test" / "boot" / "3.png")
    picture.putpixel((0, 0), (1, 2, 3))
    picture.save(folder / "test" / "boot" / "3.png")
    assert fastsitch.dataset_from(*made, name="same").hash != data.hash


class Broken:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise KeyError(index)


class Drawn:
    """A random view every time."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return torch.rand(3, 8, 8), 0


IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (iter([(IMAGE, 0)]), "python:bad, train has no length: expected a torch.utils.data.Dataset with one"),
        ([], "python:bad, train is empty"),
        (Broken(), "python:bad, train item 0 cannot be had: KeyError: 0"),
        (Drawn(), "train item 0 is another one every time: .* leave out random transforms"),
        ([IMAGE], r"train item 0 is ndarray: expected a pair, \(image, label\)"),
        ([{"image": IMAGE, "label": 0}], r"train item 0 is dict: expected a pair"),
        ([(IMAGE, 0), (IMAGE, -1)], "train item 1 has label -1: expected a whole number from 0 to 99999"),
        ([(IMAGE, 1.0)], r"train item 0 has label 1\.0: expected a whole number"),
        ([(IMAGE, torch.tensor([0, 1]))], r"train item 0 has label tensor\(\[0, 1\]\): expected a whole number"),
        ([("a.png", 0)], "train item 0 is str: expected a PIL image, a tensor"),
        ([(IMAGE[None], 0)], r"train item 0 is an array \(1, 8, 8, 3\) of uint8: expected"),
        ([(IMAGE.astype(np.int64), 0)], "of int64: expected a PIL image"),
        ([(torch.zeros(8, 8, 3), 0)], r"a tensor \(8, 8, 3\) of torch.float32: expected .*a tensor \(C, H, W\)"),
        ([(torch.zeros(8, 8), 0)], r"a tensor \(8, 8\) of torch.float32: expected"),
        (
            [(torch.zeros(3, 8, 8) - 0.5, 0)],
            r"of torch.float32 from -0\.5 to -0\.5: expected .* leave out a normalisation",
        ),
        ([(torch.full((3, 8, 8), float("nan")), 0)], "of torch.float32 from nan to nan"),
        ([(Image.new("F", (8, 8)), 0)], "train item 0 has pixels of type F: expected 8 bits per channel"),
        ([(IMAGE, 1), (IMAGE, 0)], "python:bad: a test image has label 2, expected 0 to 1"),
    ],
)
def test_what_is_no_data_set_is_refused_in_a_line(train: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        fastsitch.dataset_from(train, [(IMAGE, 2)], name="bad")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="python:bad is unknown in this process"):
        load_dataset("python:bad", Path("scratch"))


def test_a_picture_that_is_cut_off_is_named(fashion: Dataset, tmp_path: Path) -> None:
    file = pictures(tmp_path / "pics", fashion) / "train" / "boot" / "0.png"
    file.write_bytes(file.read_bytes()[:120])
    message = "cannot read python:cut, train item 0 as an image"
    with Image.open(file) as picture, pytest.raises(DataError, match=message):
        fastsitch.dataset_from([(picture, 0)], [(IMAGE, 0)], name="cut")


def test_names_and_class_names() -> None:
    split = [(IMAGE, 0), (IMAGE, 1)]
    for name in ("", "a b", "a@1", "a/b", 3):
        with pytest.raises(ConfigError, match=f"name={re.escape(repr(name))}: expected letters, digits, _ and -"):
            fastsitch.dataset_from(split, split, name=name)  # type: ignore[arg-type]
    for names in (["a"], "ab", [1, 2]):
        with pytest.raises(ConfigError, match="expected at least 2 texts, one for every label"):
            fastsitch.dataset_from(split, split, name="two", class_names=names)  # type: ignore[arg-type]
    data = fastsitch.dataset_from(split, split, name="two", class_names=["a", "b", "c"])
    assert (data.classes, data.class_names) == (3, ("a", "b", "c"))
    assert fastsitch.load_dataset("python:two") is data
    # what a name stands for can be replaced
    assert fastsitch.dataset_from(split, split, name="two").class_names is None
    assert fastsitch.load_dataset("python:two").classes == 2


def test_other_processes_say_what_to_call(tmp_path: Path, run_cli: Command) -> None:
    ended = run_cli("train", "R1111", "--dataset", "python:mine", "--root", tmp_path / "root")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert "python:mine is unknown in this process" in ended.stderr
    assert "fastsitch.dataset_from(train, test, name='mine')" in ended.stderr
    for wrong in ("python:a b", "python:mine@64", "python:mine@train=0"):
        ended = run_cli("train", "R1111", "--dataset", wrong, "--root", tmp_path / "root")
        assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
