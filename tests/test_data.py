import gzip
import pickle
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsitch.data import Dataset, Views, dataset_folder, load_dataset
from fastsitch.data.file_formats import read_idx_array
from fastsitch.data.read_dataset import DEBIAN_FASHION_MNIST
from fastsitch.errors import DataError


def test_the_embedded_images_are_balanced_and_real(fashion: Dataset) -> None:
    assert fashion.train.images.shape == (10_000, 32, 32, 3)
    assert fashion.test.images.shape == (2_000, 32, 32, 3)
    assert fashion.train.labels.bincount().tolist() == [1000] * 10
    assert fashion.test.labels.bincount().tolist() == [200] * 10
    assert fashion.train.images.dtype == torch.uint8
    # the border is the padding of 28x28 images, and no two images of a sample are equal
    assert fashion.train.images[:, :2].max() == 0
    assert len(fashion.train.images[:500, :, :, 0].flatten(1).unique(dim=0)) == 500


def test_the_embedded_images_are_those_of_the_full_data_set(fashion: Dataset) -> None:
    if not DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    full = load_dataset("fashion-mnist", Path("unused"))
    assert (len(full.train), len(full.test)) == (60_000, 10_000)
    rows = {row.tobytes() for row in full.train.images[..., 0].numpy()}
    assert all(image.tobytes() in rows for image in fashion.train.images[::50, ..., 0].numpy())


def test_normalised_images_have_mean_0_and_deviation_1(fashion: Dataset) -> None:
    x = fashion.normalisation.apply(fashion.train.images, torch.float64)
    assert x.shape == (10_000, 3, 32, 32)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-4)


def test_augmentation_flips_moves_and_cuts(fashion: Dataset) -> None:
    x = fashion.normalisation.apply(fashion.train.images[:200])

    def augment(seed: int) -> torch.Tensor:
        return Views.draw(200, 32, 32, torch.Generator().manual_seed(seed)).apply(x)

    views = augment(0)
    assert views.shape == x.shape
    assert torch.equal(views, augment(0))
    assert not torch.equal(views, augment(1))
    # every view is, outside of one 4x4 patch and what moved in, one of the 50 flips and shifts of its image
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    flips, shifts = set(), set()
    for view, image in zip(views, padded, strict=True):
        found = [
            (flip, dy, dx)
            for flip in (False, True)
            for dy in range(5)
            for dx in range(5)
            if _differing(view, (image.flip(-1) if flip else image)[:, dy : dy + 32, dx : dx + 32]) <= 16
        ]
        assert found
        if len(found) == 1:
            flips.add(found[0][0])
            shifts.add(found[0][1:])
    assert flips == {False, True}
    assert len(shifts) > 20


def _differing(view: torch.Tensor, image: torch.Tensor) -> int:
    return int((view != image).any(0).sum())


def write_idx(folder: Path, compressed: bool) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 6), ("t10k", 3)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 3
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            path = folder / (name + ".gz" * compressed)
            path.write_bytes(gzip.compress(content) if compressed else content)
    return images, labels


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_from_a_folder(compressed: bool, tmp_path: Path) -> None:
    images, labels = write_idx(tmp_path / "fashion-mnist", compressed)
    data = load_dataset("fashion-mnist", tmp_path)
    assert data.test.images.shape == (3, 32, 32, 3)
    assert np.array_equal(data.test.images[:, 2:30, 2:30, 1].numpy(), images)
    assert data.test.labels.tolist() == labels.tolist()
    assert data.classes == 3


def test_files_that_would_grow_without_end_are_refused(tmp_path: Path) -> None:
    """Neither more is decompressed than a header promises, nor memory taken for what a file cannot hold."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with gzip.open(tmp_path / "long.gz", "wb") as file:
        file.write(bytes((0, 0, 8, 1)) + struct.pack(">I", 10))
        for _ in range(400):
            file.write(bytes(1 << 20))
    with pytest.raises(DataError, match=r"long\.gz is longer than its header says: expected 10 bytes"):
        read_idx_array(tmp_path, "long", 1)
    (tmp_path / "vast").write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">III", 2**31, 2**31, 28))
    with pytest.raises(DataError, match=r"vast says that it holds \d+ bytes of data, \d+ bytes of memory are free"):
        read_idx_array(tmp_path, "vast", 3)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for steps in (b"\x80\x02K\x01r\xff\xff\xff\x7f.", b"\x80\x02K\x01p99999999999\n."):
        (folder / "data_batch_1").write_bytes(steps)
        with pytest.raises(DataError, match=r"data_batch_1 is no plain CIFAR batch \(place \d+ in a file"):
            load_dataset("cifar10", tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "fashion-mnist"
    write_idx(folder, False)
    path = folder / "t10k-images-idx3-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte is cut off: expected 2352 bytes of data, found 2347"):
        load_dataset("fashion-mnist", tmp_path)
    path.write_bytes(b"hello" * 20)
    with pytest.raises(DataError, match="is no IDX file of 3 dimension"):
        load_dataset("fashion-mnist", tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="has no file t10k-images-idx3-ubyte"):
        load_dataset("fashion-mnist", tmp_path)


def write_cifar(folder: Path, files: list[str], label_key: bytes) -> np.ndarray:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for name in files:
        data = rng.integers(0, 256, (4, 3072), np.uint8)
        with (folder / name).open("wb") as file:
            pickle.dump({b"data": data, label_key: [0, 1, 2, 1], b"batch_label": b"x"}, file, protocol=2)
    return data


def test_cifar10_batches(tmp_path: Path) -> None:
    files = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    last = write_cifar(tmp_path / "cifar-10-batches-py", files, b"labels")
    data = load_dataset("cifar10", tmp_path)
    assert (len(data.train), len(data.test), data.classes) == (20, 4, 3)
    assert np.array_equal(data.test.images[2].numpy(), last[2].reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar100_batches(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-100-python", ["train", "test"], b"fine_labels")
    data = load_dataset("cifar100", tmp_path)
    assert data.test.labels.tolist() == [0, 1, 2, 1]


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch exploded",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(pickle.dumps({b"data": Bomb()}))
    with pytest.raises(DataError, match=r"is no plain CIFAR batch \(it asks for posix.system\)"):
        load_dataset("cifar100", tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_what_cannot_be_downloaded_names_folder_and_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a proxy that refuses connections stands for a machine without a network
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with pytest.raises(DataError) as caught:
        load_dataset("cifar10", tmp_path / "files")
    assert str(tmp_path / "files" / "cifar-10-batches-py") in str(caught.value)
    assert str(caught.value).endswith("with data_dir")
    assert caught.value.as_typed().endswith("with --data-dir")


def test_image_folders(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    pictures = {}
    for split in ("train", "test"):
        for label, name in enumerate(("cats", "dogs")):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(3):
                pixels = rng.integers(0, 256, (16, 24, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{k}.png")
                pictures[split, label, k] = pixels
    data = load_dataset(f"imagefolder:{tmp_path}", Path("unused"))
    assert data.input_shape == (3, 16, 24)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(data.test.images[4].numpy(), pictures["test", 1, 1])
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "dogs" / "x.png")
    with pytest.raises(DataError, match=r"x\.png is 8x8 but .*0\.png is 24x16"):
        _ = load_dataset(f"imagefolder:{tmp_path}", Path("unused")).train.pixels
    (tmp_path / "train" / "dogs" / "x.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"cannot read .*x\.png as an image"):
        load_dataset(f"imagefolder:{tmp_path}", Path("unused"))
    (tmp_path / "test" / "birds").mkdir()
    with pytest.raises(DataError, match="classes that train/ lacks: birds"):
        load_dataset(f"imagefolder:{tmp_path}", Path("unused"))


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    base = {
        "x_train": np.zeros((6, 8, 8), np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": np.zeros((3, 8, 8), np.uint8),
        "y_test": np.array([0, 1, 2]),
    }
    return {**base, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((6, 8, 8), np.complex64)}, "expected images as uint8 .* found complex64"),
        ({"x_test": np.zeros((3, 8, 8, 4), np.uint8)}, r"found uint8 \(3, 8, 8, 4\)"),
        ({"y_train": np.zeros(5, np.int64)}, r"expected 6 integer labels, found int64 \(5,\)"),
        ({"y_test": np.full(3, 0.5)}, "expected 3 integer labels, found float64"),
        ({"y_test": np.array([0, 1, 3])}, "the test split has label 3, but the largest training label is 2"),
        ({"y_train": np.array([0, 1, 2, 0, 1, -1])}, "expected labels from 0 to at most 99999, found -1"),
        ({"y_train": np.array([0, 1, 2, 0, 1, 2**63], np.uint64)}, "to at most 99999, found 9223372036854775808"),
        ({"x_test": np.zeros((3, 9, 9), np.uint8)}, r"training images are \(8, 8, 3\), test images \(9, 9, 3\)"),
        (
            {"x_train": np.zeros((6, 32, 32), np.uint8), "x_test": np.zeros((3, 28, 28), np.uint8)},
            r"training images are \(32, 32\), test images \(28, 28\)",
        ),
        ({"x_test": np.zeros((0, 8, 8), np.uint8), "y_test": np.zeros(0, np.int64)}, "at least one image"),
    ],
)
def test_npz_files_that_do_not_fit(changes: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays(**changes))
    with pytest.raises(DataError, match=message):
        load_dataset(f"npz:{tmp_path / 'data.npz'}", Path("unused"))


def test_npz_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    with pytest.raises(DataError, match="does not exist: expected an npz file with x_train"):
        load_dataset(f"npz:{path}", Path("unused"))
    np.savez(path, x_train=np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(DataError, match=r"lacks an array .*y_train"):
        load_dataset(f"npz:{path}", Path("unused"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot read .*data.npz as npz without pickles"):
        load_dataset(f"npz:{path}", Path("unused"))
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(DataError, match="is a single array: expected an npz file"):
        load_dataset(f"npz:{tmp_path / 'single.npy'}", Path("unused"))
    np.savez(path, **arrays(y_train=np.array([Bomb()] * 6, dtype=object)))
    with pytest.raises(DataError, match="cannot read .*data.npz as npz without pickles"):
        load_dataset(f"npz:{path}", Path("unused"))


def test_the_hash_sees_every_pixel_and_label(fashion: Dataset) -> None:
    first = Dataset("a", fashion.test, fashion.test, 10)
    pixel, label = fashion.test.images.clone(), fashion.test.labels.clone()
    pixel[7, 3, 3, 1] ^= 1
    label[5] = (label[5] + 1) % 10
    hashes = {
        first.hash,
        Dataset("a", type(fashion.test)(pixel, fashion.test.labels), fashion.test, 10).hash,
        Dataset("a", fashion.test, type(fashion.test)(fashion.test.images, label), 10).hash,
    }
    assert len(hashes) == 3
    assert first.hash == Dataset("b", fashion.test, fashion.test, 10).hash


def test_folders_of_data_sets() -> None:
    assert dataset_folder("cifar10") == "cifar10"
    assert dataset_folder("npz:some/where/my data.npz").startswith("npz-my-data-")
    assert dataset_folder("npz:a/x.npz") != dataset_folder("npz:b/x.npz")
    for name in ("mnist", "npz:", "imagefolder", "../x"):
        with pytest.raises(DataError, match="unknown data set"):
            dataset_folder(name)


def test_the_first_images_are_a_data_set_of_their_own(tmp_path: Path, fashion: Dataset) -> None:
    few = load_dataset("fashion-mini:50", tmp_path)
    assert torch.equal(few.train.images, fashion.train.images[:50])
    assert torch.equal(few.train.labels, fashion.train.labels[:50])
    assert torch.equal(few.test.images, fashion.test.images)
    assert (few.name, dataset_folder(few.name)) == ("fashion-mini:50", "fashion-mini-first50")
    assert few.normalisation != fashion.normalisation
    for name in ("fashion-mini:0", "fashion-mini:10001", "fashion-mini:x", "fashion-mini:", "fashion-mini:050"):
        with pytest.raises(DataError, match="expected fashion-mini:N, the first N of its 10000 training images"):
            load_dataset(name, tmp_path)


def test_classes_without_training_images_are_named(
    fashion: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, test = (
        {
            f"x_{name}": split.images[:20].numpy(),
            f"y_{name}": 3 * (split.labels[:20].numpy() % 2),
        }
        for name, split in (("train", fashion.train), ("test", fashion.test))
    )
    np.savez(tmp_path / "gaps.npz", **train, **test)
    assert load_dataset(f"npz:{tmp_path / 'gaps.npz'}", tmp_path).classes == 4
    assert "gaps.npz: 2 of 4 classes have no training images (1, 2)" in caplog.text
