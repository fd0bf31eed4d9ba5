"""Class-balanced subsets: which images are taken, what they are called, and the networks of the whole on them."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastsitch
from fastsitch.data import Dataset, canonical_dataset, dataset_folder, dataset_of_folder, dataset_size, load_dataset
from fastsitch.data import image_folder as image_folder_module
from fastsitch.data.subset import balanced
from fastsitch.errors import ConfigError, DataError, NetworkError
from fastsitch.network_names import NetworkName
from tests.conftest import Command, save_npz
from tests.test_any_data import pictures


def taken(labels: list[int], count: int) -> list[int]:
    return balanced(labels, [str(k) for k in range(len(labels))], count).tolist()


def test_shares_are_as_equal_as_they_can_be() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        labels = rng.integers(0, rng.integers(1, 8), rng.integers(8, 80))
        available = np.bincount(labels)
        smaller: set[int] = set()
        for count in range(1, len(labels) + 1):
            chosen = taken(labels.tolist(), count)
            assert chosen == sorted(set(chosen))
            assert len(chosen) == count
            # nothing is lost by asking for more
            assert smaller <= set(chosen)
            smaller = set(chosen)
            given = np.bincount(labels[chosen], minlength=len(available))
            # no class has fewer than another by more than one, unless it has no more
            behind = given < given.max() - 1
            assert np.array_equal(given[behind], available[behind])


def test_a_subset_keeps_the_order_and_is_always_the_same(fashion: Dataset) -> None:
    data = load_dataset("fashion-mini@train=503@test=20", Path("unused"))
    assert (len(data.train), len(data.test), data.classes) == (503, 20, 10)
    assert sorted(data.train.labels.bincount().tolist()) == [50] * 7 + [51] * 3
    assert data.test.labels.bincount().tolist() == [2] * 10
    index = torch.from_numpy(balanced(fashion.train.labels.numpy(), [str(k) for k in range(10_000)], 503))
    assert torch.equal(data.train.images, fashion.train.images[index])
    assert torch.equal(data.train.labels, fashion.train.labels[index])
    # recorded names are kept by heart: another choice would make stores and runs of these names stale
    assert index[:8].tolist() == FIRST_OF_503
    first = load_dataset("fashion-mini:5000@train=100", Path("unused"))
    assert {image.numpy().tobytes() for image in first.train.images} <= {
        image.numpy().tobytes() for image in fashion.train.images[:5000]
    }


FIRST_OF_503 = [24, 28, 85, 94, 115, 137, 148, 156]


def test_names_have_one_spelling_and_one_folder(tmp_path: Path, small_npz: Path) -> None:
    for typed in ("cifar10@test=1000@train=5000", "cifar10@train=05000@test=1000"):
        assert canonical_dataset(typed) == "cifar10@train=5000@test=1000"
    for name, folder in (
        ("cifar10@train=5000@test=1000", "cifar10-train5000-test1000"),
        ("fashion-mini:5000@train=100", "fashion-mini-first5000-train100"),
        ("fashion-mini@test=100", "fashion-mini-test100"),
        ("fashion-mini:5000", "fashion-mini-first5000"),
        ("cifar100", "cifar100"),
    ):
        assert dataset_folder(name) == folder
        assert dataset_of_folder(folder) == name
    assert dataset_of_folder("imagefolder-pics-train-5-01234567") is None
    name = f"npz:{small_npz}@train=50"
    assert canonical_dataset(name) == name
    assert dataset_folder(name).startswith("npz-small-train-50-")
    # a file of that very name comes first
    small_npz.rename(f"{small_npz}@train=50")
    assert canonical_dataset(f"{name}@train=40") == f"{name}@train=40"
    assert len(load_dataset(name, tmp_path).train) == 160
    size = dataset_size(f"{name}@train=40", tmp_path)
    assert size is not None
    assert (size.train, size.test) == (40, 80)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("@train=10001", "10001 training images were asked for, expected 1 to 10000$"),
        ("@test=2001", "2001 test images were asked for, expected 1 to 2000$"),
        ("@train=9", "9 training images were asked for, expected at least one of each of 10 classes$"),
        (":50@train=51", "51 training images were asked for, expected 1 to 50$"),
        ("@train=0", "expected @train=N with a whole number from 1$"),
        ("@test=1.5", "expected @test=N with a whole number from 1$"),
        ("@train=" + 50 * "9", "expected @train=N with a whole number from 1$"),
        ("@train=\u0665", "expected @train=N with a whole number from 1$"),
        ("@train=20@train=20", "it says @train= twice; leave one out$"),
        ("@64", "expected @train=N or @test=N behind fashion-mini, found @64$"),
        ("@holdout=0.2", "expected @train=N or @test=N behind fashion-mini, found @holdout=0.2$"),
        ("@", "expected @train=N or @test=N behind fashion-mini, found @$"),
    ],
)
def test_subsets_that_cannot_be(parts: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(f"fashion-mini{parts}", Path("unused"))
    with pytest.raises(DataError, match=message):
        dataset_size(f"fashion-mini{parts}", Path("unused"))


def test_fewer_test_images_than_classes_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data = load_dataset("fashion-mini@test=4", Path("unused"))
    assert data.test.labels.bincount().max() == 1
    assert [record.getMessage() for record in caplog.records] == [
        "data set fashion-mini@test=4: its test images are of 4 of 10 classes"
    ]


def test_of_a_folder_only_the_images_taken_are_opened(
    fashion: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures(tmp_path / "pics", fashion, size=(16, 16), each=20)
    name = f"imagefolder:{folder}@train=9@test=6"
    seen: list[Path] = []
    opened = image_folder_module.opened
    monkeypatch.setattr(image_folder_module, "opened", lambda file: (seen.append(file), opened(file))[1])
    data = load_dataset(name, tmp_path)
    assert data.name == name
    assert data.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(set(seen)) == 15
    wanted = [np.asarray(Image.open(path)) for path in sorted(seen) if path.parts[-3] == "train"][::2]
    assert np.array_equal(data.train.images.numpy(), np.stack(wanted))
    # what is not taken may be anything, also another size
    others = sorted(set(folder.glob("*/*/*.png")) - set(seen))
    for path in others:
        path.write_bytes(b"no image")
    assert load_dataset(name, tmp_path).hash == data.hash
    # a new image takes the place of one at most
    Image.new("RGB", (16, 16)).save(folder / "train" / "boot" / "zz.png")
    more = load_dataset(name, tmp_path).train.images
    assert sum(torch.equal(a, b) for a, b in zip(more, data.train.images, strict=True)) >= 6
    with pytest.raises(DataError, match="62 training images were asked for, expected 1 to 61"):
        load_dataset(f"imagefolder:{folder}@train=62", tmp_path)
    with pytest.raises(DataError, match="2 training images were asked for, expected at least one of each of 3 classes"):
        load_dataset(f"imagefolder:{folder}@train=2", tmp_path)


SHORT = ["--batch-size", "16", "--epochs", "0.5"]
PART = ["sweep", "--senders", "R1111", "--receivers", "R1111", "--settings", "T2T,R2T", *SHORT, "--run", "part"]


def test_networks_of_the_whole_are_stitched_on_a_subset(
    few: str, tmp_path: Path, run_cli: Command, caplog: pytest.LogCaptureFixture
) -> None:
    """Their own accuracy is that on the test images of the subset; stores and runs are the subset's."""
    root = tmp_path / "root"
    for line in (
        ["train", "R1111", "--width", "2", "--epochs", "1", "--dataset", few],
        [*PART, "--train-images", "80", "--test-images", "20"],
    ):
        ended = run_cli(*line, "--root", root)
        assert ended.returncode == 0, ended.stderr
    name = f"{few}@train=80@test=20"
    assert f"run part on {name}\n" in ended.stdout
    run = fastsitch.open_run("part", root=root)
    assert (run.config.dataset, run.path.parent.name) == (name, dataset_folder(name))
    assert not (root / "models" / dataset_folder(name)).exists()
    # measured by hand
    data = fastsitch.load_dataset(name)
    from fastsitch.networks.checkpoint import load_network

    network = load_network(root / "models" / dataset_folder(few), NetworkName("R1111"))
    logits = network.chain(network.record.transform.apply(data.test.images))
    accuracy = (logits.argmax(-1) == data.test.labels).double().mean().item()
    assert run.networks[NetworkName("R1111")].accuracy == pytest.approx(accuracy)
    assert accuracy != network.record.accuracy
    # the same again continues the run; so does the data set by name, in another order
    ended = run_cli(*PART, "--dataset", f"{few}@test=20@train=80", "--root", root)
    assert ended.returncode == 0, ended.stderr
    ended = run_cli(*PART, "--dataset", few, "--test-images", "20", "--train-images", "80", "--dry-run", "--root", root)
    assert ended.returncode == 0, ended.stderr
    ended = run_cli("precompute", "R1111", "--train-images", "80", "--test-images", "20", "--root", root)
    assert dataset_folder(name) in ended.stdout
    ended = run_cli("list", "--root", root)
    assert f"npz:{tmp_path / 'few.npz'}@train=80@test=20" in ended.stdout
    # where all test images are taken the accuracy is the recorded one
    store = fastsitch.sweep("R1111", "R1111", dataset="@train=90", batch_size=16, epochs=0.5, run="all", root=root)
    assert store.networks[NetworkName("R1111")].accuracy == network.record.accuracy
    assert store.config.dataset == f"{few}@train=90"


def test_a_subset_has_networks_of_its_own(few: str, tmp_path: Path, run_cli: Command) -> None:
    root = ["--root", tmp_path / "root"]
    train = ["train", "R1111", "--width", "2", "--epochs", "1", "--dataset", few, *root]
    ended = run_cli(*train, "--train-images", "130")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith(f"on {few}@train=130\n")
    sweep = ["sweep", "--senders", "R1111", "--receivers", "R1111", *SHORT, *root]
    ended = run_cli(*sweep, "--train-images", "128")
    assert ended.returncode == 2
    assert f"not trained yet on {few}@train=128, nor on {few}: R1111; train first with\n" in ended.stderr
    # the one of the subset comes before that of the whole
    assert run_cli(*train).returncode == 0
    assert run_cli(*sweep, "--train-images", "130", "--run", "own").returncode == 0
    assert run_cli(*sweep, "--train-images", "128", "--run", "whole").returncode == 0
    hashes = [
        fastsitch.open_run(name, root=tmp_path / "root").networks[NetworkName("R1111")].weights_hash
        for name in ("own", "whole")
    ]
    assert hashes[0] != hashes[1]
    ended = run_cli(*sweep)
    assert ended.returncode == 2
    assert "several data sets have R1111" in ended.stderr
    ended = run_cli(*sweep, "--dataset", f"{few}@train=130", "--train-images", "128")
    assert f"--train-images 128: {few}@train=130 says 130; leave one of them out" in ended.stderr
    for wrong in ("0", "-5", "9" * 40):
        ended = run_cli(*sweep, "--train-images", wrong)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert f"--train-images {wrong}: expected a whole number from 1" in ended.stderr


def test_added_networks_of_the_whole_are_trained_and_found_on_a_subset(
    few: str, tmp_path: Path, run_cli: Command, factory: Path
) -> None:
    root = ["--root", tmp_path / "root"]
    assert run_cli("add", "mine", "--from", f"{factory}:small", "--dataset", few, *root).returncode == 0
    dry = ["sweep", "--senders", "mine", "--receivers", "mine", *SHORT, "--dry-run", "--dataset", few, *root]
    ended = run_cli(*dry, "--train-images", "140")
    assert ended.returncode == 0, ended.stderr
    ended = run_cli("train", "mine", "--epochs", "1", "--dataset", few, "--train-images", "140", *root)
    assert ended.returncode == 0, ended.stderr
    ended = run_cli("precompute", "mine", "--dataset", few, "--train-images", "140", *root)
    assert ended.returncode == 0, ended.stderr
    with pytest.raises(NetworkError, match="unknown network 'other'"):
        fastsitch.precompute("other", dataset=f"{few}@train=140", root=tmp_path / "root")


def test_a_whole_file_that_changed_is_noticed_on_a_subset(fashion: Dataset, few: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    fastsitch.train("R1111", dataset=few, width=2, epochs=1, root=root)
    fastsitch.precompute("R1111", dataset=f"{few}@train=80", root=root)
    save_npz(tmp_path / "few.npz", fashion.train, fashion.test, 161, 64)
    with pytest.raises(NetworkError, match=r"few\.npz has changed since R1111 was trained on it"):
        fastsitch.precompute("R1111", dataset=f"{few}@train=80", root=root)


def test_networks_of_a_whole_folder_serve_a_subset_of_it(fashion: Dataset, tmp_path: Path) -> None:
    """Without its other images being read; its accuracy is measured anew, for nobody knows what the whole is now."""
    folder, root = pictures(tmp_path / "pics", fashion, size=(16, 16), each=50), tmp_path / "root"
    name = f"imagefolder:{folder}"
    fastsitch.train("R1111", dataset=name, width=2, epochs=1, root=root)
    taken = load_dataset(f"{name}@train=60", tmp_path)
    assert taken.whole is not None
    assert (taken.whole.name, taken.whole.hash, taken.whole.all_tested) == (name, None, True)
    for path in sorted((folder / "train" / "boot").iterdir()):
        content = path.read_bytes()
        path.write_bytes(b"")
        try:
            load_dataset(f"{name}@train=60", tmp_path)
        except DataError:
            path.write_bytes(content)
    run = fastsitch.sweep("R1111", "R1111", dataset="@train=60", batch_size=16, epochs=0.5, root=root)
    assert run.data_hash == taken.hash
    assert run.done(run.units[0])


def test_names_in_python_and_options_that_contradict_them(tmp_path: Path) -> None:
    from fastsitch.data.dataset_name import with_options

    assert with_options(None) is None
    assert with_options("a b") == "a b"
    assert with_options(None, train_images=5) == "@train=5"
    assert with_options("cifar10@test=50", train_images=500) == "cifar10@train=500@test=50"
    assert with_options("cifar10@test=50", test_images=50) == "cifar10@test=50"
    with pytest.raises(ConfigError, match="^test_images=60: cifar10@test=50 says 50; leave one of them out$"):
        with_options("cifar10@test=50", test_images=60)
    with pytest.raises(ConfigError, match="background='white': .* says grey; leave one of them out"):
        with_options(f"imagefolder:{tmp_path}@grey", background="white")
    assert with_options(f"imagefolder:{tmp_path}", holdout=0.2) == f"imagefolder:{tmp_path}@holdout=0.2"
    assert with_options(f"imagefolder:{tmp_path}", holdout=1e-5) == f"imagefolder:{tmp_path}@holdout=0.00001"
