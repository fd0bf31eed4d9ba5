"""Paths and folders as people write and have them."""

import ctypes
import logging
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

from fastsitch.data import Dataset, canonical_dataset, load_dataset
from fastsitch.errors import DataError
from fastsitch.files import expanded
from fastsitch.root import Root
from tests.conftest import Command, save_npz
from tests.test_any_data import pictures


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("PLACE", str(folder))
    return folder


@pytest.mark.parametrize("start", ["~", "$PLACE", "${PLACE}"])
def test_home_and_variables_are_expanded_in_every_path(
    start: str, home: Path, fashion: Dataset, run_cli: Command, factory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_npz(home / "few.npz", fashion.train, fashion.test, 160, 64)
    (home / "nets.py").write_bytes(factory.read_bytes())
    assert expanded(f"{start}/x") == home / "x"
    assert canonical_dataset(f"npz:{start}/few.npz") == f"npz:{home}/few.npz"
    assert canonical_dataset(f"imagefolder:{start}/p@16") == f"imagefolder:{home}/p@16"
    root = Root.at(f"{start}/r", f"{start}/d", f"{start}/a")
    assert (root.path, root.data_dir, str(root.stores)) == (home / "r", home / "d", str(home / "a"))
    for name, found in (("ROOT", "path"), ("DATA_DIR", "data_dir")):
        with monkeypatch.context() as patch:
            patch.setenv(f"FASTSITCH_{name}", f"{start}/there")
            assert getattr(Root.at(), found) == home / "there"
    where = ["--root", f"{start}/r", "--dataset", f"npz:{start}/few.npz"]
    short = ["--batch-size", "32", "--epochs", "0.2"]
    for line in (
        ["train", "R1111", "--width", "2", "--epochs", "1", *where],
        ["add", "mine", "--from", f"{start}/nets.py:small", *where],
        ["sweep", "--senders", "R1111", "--receivers", "R1111", *short, "--run", "a", *where],
        ["export", "a", "--out", f"{start}/out", "--root", f"{start}/r"],
        ["plot", "a", "--out", f"{start}/out", "--root", f"{start}/r"],
    ):
        ended = run_cli(*line)
        assert ended.returncode == 0, ended.stderr
    assert {path.suffix for path in (home / "out").iterdir()} == {".npz", ".json", ".png", ".pdf"}
    # nothing was made under the names as they were typed
    assert list(Path.cwd().iterdir()) == []


def test_an_empty_out_is_refused(fashion: Dataset, tmp_path: Path, run_cli: Command) -> None:
    """By all commands that write results, and never taken for the current folder."""
    save_npz(tmp_path / "few.npz", fashion.train, fashion.test, 160, 64)
    root, data = ["--root", tmp_path / "root"], ["--dataset", f"npz:{tmp_path / 'few.npz'}"]
    pair = ["--senders", "R1111", "--receivers", "R1111", "--batch-size", "32", "--epochs", "0.2", "--run", "a"]
    assert run_cli("train", "R1111", "--width", "2", "--epochs", "1", *data, *root).returncode == 0
    assert run_cli("sweep", *pair, *root).returncode == 0
    for line in (["export", "a"], ["plot", "a"], ["tables", "a"], ["images", "a"], ["demo"], ["paper"]):
        for blank in ("", " "):
            ended = run_cli(*line, "--out", blank, *root)
            assert (ended.returncode, ended.stdout) == (2, "")
            assert ended.stderr == "fastsitch: --out is empty: expected the name of a folder\n"
    ended = run_cli("bench", "--json", "", *root)
    assert (ended.returncode, ended.stderr) == (2, "fastsitch: --json is empty: expected the name of a file\n")
    ended = run_cli("add", "mine", "--from", "torchvision:resnet18", "--weights", "", *data, *root)
    assert (ended.returncode, ended.stderr) == (2, "fastsitch: --weights is empty: expected the name of a file\n")
    assert list(Path.cwd().iterdir()) == []


def test_hidden_files_and_folders_are_no_images(fashion: Dataset, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "seen", fashion)
    plain = load_dataset(f"imagefolder:{folder}", tmp_path).hash
    picture = next((folder / "train" / "boot").glob("*.png"))
    for hidden in ("boot/.ipynb_checkpoints/x.png", "boot/a/.b/c/x.png", "boot/.x.png", ".x.png"):
        path = folder / "train" / hidden
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.read_bytes())
    (folder / "train" / "boot" / "._x.png").write_bytes(b"what a Mac leaves")
    (folder / "train" / "boot" / ".x.tif").write_bytes(b"")
    assert load_dataset(f"imagefolder:{folder}", tmp_path).hash == plain


def test_linked_folders_and_files_are_followed_as_torchvision_does(fashion: Dataset, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "linked", fashion)
    elsewhere = pictures(tmp_path / "elsewhere", fashion, each=6)
    (folder / "train" / "boot" / "more").symlink_to(elsewhere / "train" / "boot", target_is_directory=True)
    (folder / "train" / "coat" / "z.png").symlink_to(elsewhere / "train" / "coat" / "5.png")
    (folder / "train" / "bag").symlink_to(elsewhere / "train" / "coat", target_is_directory=True)
    (folder / "test" / "bag").symlink_to(elsewhere / "test" / "coat", target_is_directory=True)
    data = load_dataset(f"imagefolder:{folder}", tmp_path)
    for split, found in (("train", data.train), ("test", data.test)):
        theirs = ImageFolder(str(folder / split))
        assert found.labels.bincount().tolist() == np.bincount(theirs.targets).tolist()
    assert data.train.labels.bincount().tolist() == [6, 10, 5, 4]
    (folder / "train" / "boot" / "loop").symlink_to(folder / "train", target_is_directory=True)
    with pytest.raises(DataError, match="loop/boot is a link to a folder that it is in|loop is a link to a folder"):
        load_dataset(f"imagefolder:{folder}", tmp_path)
    (folder / "train" / "boot" / "loop").unlink()
    (folder / "train" / "boot" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"gone\.png is no regular file, nor a link to one"):
        load_dataset(f"imagefolder:{folder}", tmp_path)


def test_pipes_and_devices_are_no_images(fashion: Dataset, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pipe", fashion)
    os.mkfifo(folder / "train" / "boot" / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png is no regular file"):
        load_dataset(f"imagefolder:{folder}", tmp_path)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_images_stand_upright(orientation: int, suffix: str, fashion: Dataset, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "turned", fashion, size=(16, 16))
    path = folder / "train" / "boot" / f"0.{suffix}"
    (folder / "train" / "boot" / "0.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(fashion.train.images[0].numpy()).resize((16, 16)).save(path, exif=exif)
    data = load_dataset(f"imagefolder:{folder}", tmp_path)
    with Image.open(path) as picture:
        upright = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        assert np.array_equal(np.asarray(picture.convert("RGB")), upright) == (orientation == 1)
    assert np.array_equal(data.train.images[0].numpy(), upright)
    # the size too is that of the upright image
    for file in folder.rglob("*.*"):
        with Image.open(file) as picture:
            size = (24, 16) if file != path or orientation < 5 else (16, 24)
            resized = picture.convert("RGB").resize(size)
        resized.save(file, **({"exif": exif} if file == path else {}))
    assert load_dataset(f"imagefolder:{folder}", tmp_path).input_shape == (3, 16, 24)


@pytest.mark.parametrize(
    ("option", "shown", "colour"),
    [
        ("", "black", [0, 0, 0]),
        ("@black", "black", [0, 0, 0]),
        ("@WHITE", "white", [255, 255, 255]),
        ("@gray", "grey", [128, 128, 128]),
        ("@#1E90ff", "#1e90ff", [30, 144, 255]),
    ],
)
def test_what_is_transparent_shows_the_background(
    option: str, shown: str, colour: list[int], fashion: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pictures(tmp_path / "clear", fashion, size=(16, 16))
    path = folder / "train" / "boot" / "0.png"
    pixels = np.full((16, 16, 4), 200, np.uint8)
    pixels[:8, :, 3] = 0
    pixels[8:, :, 3] = 255
    for mode in ("RGBA", "P"):
        caplog.clear()
        picture = Image.fromarray(pixels, "RGBA")
        (picture if mode == "RGBA" else picture.quantize()).save(path)
        with caplog.at_level(logging.INFO):
            data = load_dataset(f"imagefolder:{folder}{option}", tmp_path)
        assert data.train.images[0, 0, 0].tolist() == colour
        assert abs(int(data.train.images[0, 12, 0, 0]) - 200) <= 2
        (line,) = [record.getMessage() for record in caplog.records if "may be transparent" in record.getMessage()]
        assert line == f"1 images may be transparent, such as {path}: they are shown over {shown} (--background)"
        assert data.name == f"imagefolder:{folder}" + ("" if shown == "black" else f"@{shown}")


def test_a_background_is_part_of_the_name_of_the_data(
    fashion: Dataset, tmp_path: Path, run_cli: Command, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pictures(tmp_path / "clear", fashion, size=(16, 16), each=50)
    assert canonical_dataset(f"imagefolder:{folder}@16@white") == f"imagefolder:{folder}@16@white"
    # in either order, and a folder of that very name comes first
    assert canonical_dataset(f"imagefolder:{folder}@white@16") == f"imagefolder:{folder}@16@white"
    named = folder.rename(tmp_path / "clear@white")
    assert canonical_dataset(f"imagefolder:{named}") == f"imagefolder:{named}"
    where = ["--dataset", f"imagefolder:{named}", "--background", "#ffffff", "--root", tmp_path / "root"]
    ended = run_cli("train", "R1111", "--width", "2", "--epochs", "1", *where)
    assert ended.returncode == 0, ended.stderr
    assert f"on imagefolder:{named}@white" in ended.stdout
    ended = run_cli("add", "mine", "--from", "torchvision:resnet18", *where)
    assert f"train mine --dataset imagefolder:{named}@white" in ended.stdout
    assert "imagefolder-clear-white-white" in run_cli("precompute", "R1111", *where).stdout
    short = ["--batch-size", "8", "--epochs", "0.5", "--dry-run"]
    ended = run_cli("sweep", "--senders", "R1111", "--receivers", "R1111", *short, *where)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"on imagefolder:{named}@white" in ended.stdout
    for wrong, message in (
        (["--background", "purple"], "--background purple: expected black, white, grey or #RRGGBB"),
        (["--background", ""], "--background '': expected black, white, grey or #RRGGBB"),
        (["--background", "white", "--dataset", "cifar10"], "only images of a folder can be transparent"),
    ):
        ended = run_cli("train", "R1111", *where[:2], *wrong)
        assert ended.returncode == 2
        assert message in ended.stderr


def test_lists_name_data_sets_as_options_do(fashion: Dataset, tmp_path: Path, run_cli: Command, factory: Path) -> None:
    save_npz(tmp_path / "few.npz", fashion.train, fashion.test, 160, 64)
    root, few = tmp_path / "root", f"npz:{tmp_path / 'few.npz'}"
    where = ["--dataset", few, "--root", root]
    for line in (
        ["train", "R1111", "--width", "2", "--epochs", "1", *where],
        ["sweep", "--senders", "R1111", "--receivers", "R1111", "--batch-size", "32", "--epochs", "0.2", *where],
        ["add", "mine", "--from", f"{factory}:small", *where],
        ["add", "other", "--from", f"{factory}:small", "--dataset", "fashion-mini:500", "--root", root],
    ):
        ended = run_cli(*line)
        assert ended.returncode == 0, ended.stderr

    def listed() -> list[list[str]]:
        rows = [line.split() for line in run_cli("list", "--root", root).stdout.splitlines()]
        return [row for row in rows if row and row[0] in ("R1111", "mine", "other", "R1111-to-R1111")]

    assert {(row[0], row[1]) for row in listed()} >= {("R1111", few), ("mine", few), ("other", "fashion-mini:500")}
    for damaged in (*root.glob("models/*/R1111.json"), *root.glob("activations/*/R1111/manifest.json")):
        damaged.write_text("{")
    rows = [row for row in listed() if "unusable" in row]
    assert len(rows) == 2
    assert {row[1] for row in rows} == {few}


def test_results_do_not_silently_replace_others(fashion: Dataset, tmp_path: Path, run_cli: Command) -> None:
    save_npz(tmp_path / "few.npz", fashion.train, fashion.test, 160, 64)
    root, out = ["--root", tmp_path / "root"], ["--out", tmp_path / "out"]
    where = ["--dataset", f"npz:{tmp_path / 'few.npz'}", *root]
    pair = ["--senders", "R1111", "--receivers", "R1111", "--batch-size", "32", "--epochs", "0.2"]
    for line in (
        ["train", "R1111", "--width", "2", "--epochs", "1", *where],
        ["sweep", *pair, "--run", "a", *where],
        ["sweep", *pair, "--run", "b", "--lr", "0.5", *where],
        ["sweep", *pair, "--run", "c", "--loss", "match", *where],
    ):
        ended = run_cli(*line)
        assert ended.returncode == 0, ended.stderr

    def refused(*line: str | Path) -> None:
        before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        ended = run_cli(*line, *out, *root)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert "choose another --out, or remove it" in ended.stderr
        assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before

    for line in (["export", "a"], ["plot", "a"], ["tables", "a"], ["plot", "a", "--matched", "c"]):
        for _ in range(2):
            # the same result again may take its place
            ended = run_cli(*line, *out, *root)
            assert ended.returncode == 0, ended.stderr
    refused("export", "b")
    refused("plot", "b")
    refused("tables", "b")
    refused("tables", "a", "--split", "test")
    refused("plot", "b", "--matched", "c")
    # matrices and images would have one name
    refused("images", "a")
    assert run_cli("plot", "a", "--metric", "loss", *out, *root).returncode == 0
    assert run_cli("images", "a", "--out", tmp_path / "images", *root).returncode == 0
    assert run_cli("export", "a", "--out", tmp_path / "images", *root).returncode == 2


@contextmanager
def without_privileges() -> Iterator[None]:
    """Let permissions bind this thread, also where root runs the tests."""
    system, header, found = ctypes.CDLL(None), struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    assert system.capget(header, found) == 0
    _, *low, _, high, inherited = struct.unpack("6I", found.raw)
    assert system.capset(header, struct.pack("6I", 0, *low, 0, high, inherited)) == 0
    try:
        yield
    finally:
        assert system.capset(header, found) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_what_is_done_can_be_read_where_nothing_can_be_written(
    fashion: Dataset, tmp_path: Path, factory: Path, run_cli: Command
) -> None:
    save_npz(tmp_path / "few.npz", fashion.train, fashion.test, 160, 64)
    root = ["--root", tmp_path / "root"]
    data = ["--dataset", f"npz:{tmp_path / 'few.npz'}"]
    train = ["train", "R1111", "--width", "2", "--epochs", "1", *data, *root]
    sweep = ["sweep", "--senders", "R1111", "--receivers", "R1111", "--batch-size", "32", "--epochs", "0.2", *root]
    out = tmp_path / "out"
    lines: list[list[str | Path]] = [
        train,
        ["precompute", "R1111", *root],
        [*sweep, "--run", "a"],
        ["tables", "a", "--out", out / "tables", *root],
        ["images", "a", "--out", out / "images", *root],
        ["add", "mine", "--from", f"{factory}:small", *data, *root],
        ["list", *root],
        ["export", "a", "--out", out / "export", *root],
        ["plot", "a", "--out", out / "plot", *root],
        [*sweep, "--run", "b", "--dry-run"],
    ]
    for line in lines:
        ended = run_cli(*line)
        assert ended.returncode == 0, ended.stderr
    shutil.rmtree(out)
    for path in (tmp_path / "root", *(tmp_path / "root").rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    with without_privileges():
        for line in lines:
            ended = run_cli(*line)
            assert ended.returncode == 0, (line, ended.stderr)
        for line, place in (
            ([*train, "--force"], "models/"),
            (["precompute", "R1111", "--force", *root], "activations/"),
            ([*sweep, "--run", "b"], "runs/"),
            (["add", "other", "--from", "torchvision:resnet18", *data, *root], "root/networks"),
            (["export", "a", "--out", tmp_path / "root" / "export", *root], "root/export"),
        ):
            ended = run_cli(*line)
            assert ended.returncode == 2, ended.stderr
            assert place in ended.stderr
            assert "(Permission denied)" in ended.stderr.splitlines()[-1]
    for path in (tmp_path / "root").rglob("*"):
        path.chmod(path.stat().st_mode | 0o200)


def test_a_user_that_there_is_not_is_named(run_cli: Command) -> None:
    for option in ("--root", "--data-dir"):
        ended = run_cli("train", "R1111", option, "~nobody-here/x")
        assert ended.returncode == 2, ended
        assert "~nobody-here/x: there is no user of that name" in ended.stderr
