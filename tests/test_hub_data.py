"""Data sets of the Hugging Face hub: folders of parquet files, and what a download leaves in the caches, offline."""

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import fastsitch
from fastsitch.data import (
    Dataset,
    ImageFiles,
    Preprocessing,
    canonical_dataset,
    dataset_folder,
    dataset_size,
    load_dataset,
)
from fastsitch.errors import DataError
from tests.conftest import Command
from tests.test_any_data import CLASSES, pictures
from tests.test_folder_data import said

pytestmark = pytest.mark.usefixtures("hub_caches")

REVISION = "0123456789abcdef0123456789abcdef01234567"

Rows = Sequence[tuple[bytes, int]]
"""Encoded images and labels."""


def rows_of(folder: Path) -> Rows:
    """The files of class folders, in the order in which they are read."""
    return [(file.read_bytes(), k) for k, name in enumerate(CLASSES) for file in sorted((folder / name).iterdir())]


def table(rows: Rows, **columns: Any) -> datasets.Dataset:
    """A table as it is pushed to the hub; ``columns`` are further ones, pairs of values and their feature."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    content: dict[str, Any] = {
        "image": [{"bytes": content, "path": None} for content, _ in rows],
        "label": [label for _, label in rows],
    }
    for name, (values, feature) in columns.items():
        content[name], features[name] = values, feature
    return datasets.Dataset.from_dict(content, features=features)


def write(path: Path, written: datasets.Dataset) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(written.data.table, path, row_group_size=5)


def parquets(folder: Path, source: Path, test: str = "test") -> Path:
    """The images of an image folder as a folder of parquet files, training in two of them."""
    rows = rows_of(source / "train")
    for k, part in enumerate((rows[:7], rows[7:])):
        write(folder / "data" / f"train-0000{k}-of-00002.parquet", table(part))
    write(folder / "data" / f"{test}-00000-of-00001.parquet", table(rows_of(source / "test")))
    return folder


def load(name: str | Path, parts: str = "") -> Dataset:
    where = f"hf:{name}{parts}"
    return load_dataset(where, Path("scratch"))


def mixed(folder: Path, fashion: Dataset) -> Path:
    """JPEGs and PNGs of several sizes."""
    pictures(folder, fashion)
    for k, file in enumerate(sorted(folder.rglob("*.png"))):
        picture = Image.open(file).resize((24 + k, 33 - k % 3))
        if k % 2:
            picture.save(file.with_suffix(".jpg"), quality=90)
            file.unlink()
        else:
            picture.save(file)
    return folder


def test_a_folder_of_parquet_files_is_the_image_folder_with_the_same_images(
    fashion: Dataset, tmp_path: Path, run_cli: Command
) -> None:
    folder = pictures(tmp_path / "pics", fashion, (28, 28), each=60)
    plain = load_dataset(f"imagefolder:{folder}", tmp_path)
    data = load(parquets(tmp_path / "hub data", folder))
    assert torch.equal(data.train.pixels, plain.train.pixels)
    assert torch.equal(data.test.labels, plain.test.labels)
    assert data.class_names == CLASSES
    assert data.hash == plain.hash
    made = []
    for name in (f"imagefolder:{folder}", f"hf:{tmp_path / 'hub data'}"):
        (record,) = fastsitch.train("R1111", dataset=name, width=2, epochs=1, root=tmp_path / "root")
        run = fastsitch.sweep(
            "R1111", "R1111", dataset=name, epochs=1, batch_size=16, recipe="small", root=tmp_path / "root"
        )
        made.append((record.weights_hash, run.matrix("R1111", "R1111", "loss", setting="T2T")))
    assert made[0][0] == made[1][0]
    assert np.array_equal(made[0][1], made[1][1])
    # and from the command line, by a path as it is typed
    (tmp_path / "work").joinpath("link").symlink_to(tmp_path / "hub data")
    ended = run_cli(
        "train", "R1112", "--width", "2", "--epochs", "1", "--dataset", "hf:./link", "--root", tmp_path / "root"
    )
    assert (ended.returncode, ended.stderr.count("Traceback")) == (0, 0), ended.stderr
    listed = run_cli("list", "--root", tmp_path / "root").stdout
    assert f"hf:{tmp_path / 'hub data'}" in "".join(listed.split("\n"))


def test_images_of_several_sizes_stay_in_the_table(fashion: Dataset, tmp_path: Path) -> None:
    folder = mixed(tmp_path / "pics", fashion)
    made = parquets(tmp_path / "made", folder)
    plain, data = load_dataset(f"imagefolder:{folder}", tmp_path), load(made)
    wanted = Preprocessing(crop=(20, 24), resize=(24, 24), interpolation="bicubic")
    for split, other in ((data.train, plain.train), (data.test, plain.test)):
        assert isinstance(split.images, ImageFiles)
        assert isinstance(other.images, ImageFiles)
        assert torch.equal(split.images.read(wanted), other.images.read(wanted))
        assert torch.equal(
            split.images[torch.tensor([5, 2])].read(wanted), other.images[torch.tensor([5, 2])].read(wanted)
        )
    with pytest.raises(
        DataError, match=r"train row \d+ \(image\) is 37x32 but .*row 0 \(image\) is 36x33.*hf:NAME@SIDE"
    ):
        _ = data.train.pixels
    assert load(made, "@16").hash == load_dataset(f"imagefolder:{folder}@16", tmp_path).hash
    # the hash is that of the content, wherever it lies and however it is packed
    again = tmp_path / "elsewhere"
    write(again / "train.parquet", table(rows_of(folder / "train")))
    write(again / "test.parquet", table(rows_of(folder / "test")))
    assert load(again).hash == data.hash
    rows = [(rows_of(folder / "test")[0][0] + b"\0", 0), *rows_of(folder / "test")[1:]]
    write(again / "test.parquet", table(rows))
    changed = load(again)
    assert changed.hash != data.hash
    size = dataset_size(f"hf:{again}", tmp_path)
    assert size is not None
    assert (size.train, size.test, size.classes, size.height) == (12, 12, 3, 0)


def test_pixels_of_every_kind_become_what_folders_make_of_them(fashion: Dataset, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pics", fashion)
    picture = Image.open(folder / "train" / "boot" / "0.png").convert("RGB")
    clear = picture.convert("RGBA")
    clear.putalpha(picture.convert("L"))
    clear.save(folder / "train" / "boot" / "0.png")
    picture.convert("CMYK").save(folder / "train" / "boot" / "1.jpg")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(folder / "test" / "boot" / "1.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "test" / "coat" / "0.jpg", exif=turned)
    made = parquets(tmp_path / "made", folder)
    for parts in ("", "@white", "@#aabbcc"):
        assert load(made, parts).hash == load_dataset(f"imagefolder:{folder}{parts}", tmp_path).hash
    assert load(made, "@white").hash != load(made).hash


@pytest.mark.parametrize("test", ["validation", "test"])
def test_splits_are_those_of_folders(
    test: str, fashion: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pictures(tmp_path / "pics", fashion)
    made = parquets(tmp_path / "made", folder, test)
    write(made / "data" / "extra-00000-of-00001.parquet", table(rows_of(folder / "test")[:2]))
    with caplog.at_level(logging.INFO):
        assert len(load(made).test) == 12
    expected = f"hf:{made}: train is taken for training, {test} for the test, and extra left alone"
    assert said(caplog, "is taken for") == [expected]


def test_hidden_labels_are_no_test(fashion: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = pictures(tmp_path / "pics", fashion)
    made = parquets(tmp_path / "made", folder, "validation")
    hidden = table([(content, -1) for content, _ in rows_of(folder / "test")])
    write(made / "data" / "test-00000-of-00001.parquet", hidden)
    with caplog.at_level(logging.INFO):
        data = load(made)
    assert data.test.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert said(caplog, "is taken for") == [
        f"hf:{made}: train is taken for training, validation for the test, and test left alone"
    ]
    (made / "data" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"test split, column label: 12 of 12 labels are hidden \(-1, or missing\)"):
        load(made)
    some = [(content, -1 if k == 3 else label) for k, (content, label) in enumerate(rows_of(folder / "test"))]
    write(made / "data" / "test-00000-of-00001.parquet", table(some))
    with pytest.raises(DataError, match="1 of 12 labels are hidden"):
        load(made)


def test_a_share_of_the_only_split_is_held_out_by_index(fashion: Dataset, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pics", fashion, each=30)
    write(tmp_path / "one" / "0000.parquet", table(rows_of(folder / "train")))
    with pytest.raises(DataError, match=r"has the split train: expected .*; to split its images, add holdout=0.2"):
        load(tmp_path / "one")
    data = load(tmp_path / "one", "@holdout=0.3")
    tested = [k for k in range(90) if int(hashlib.sha256(f"0:{k}".encode()).hexdigest()[:16], 16) < 0.3 * 2**64]
    assert data.test.labels.tolist() == [k // 30 for k in tested]
    assert len(data.train) + len(data.test) == 90
    with pytest.raises(DataError, match=r"train split, class boot has 30 images, of which .* makes none a test image"):
        load(tmp_path / "one", "@holdout=0.0001")
    both = parquets(tmp_path / "both", folder)
    with pytest.raises(DataError, match=r"has the splits train, test, .* leave out holdout=0.3"):
        load(both, "@holdout=0.3")


def test_subsets_are_balanced_and_a_part_of_the_name(fashion: Dataset, tmp_path: Path, run_cli: Command) -> None:
    made = parquets(tmp_path / "made", pictures(tmp_path / "pics", fashion, (16, 16), each=60))
    data = load(made, "@train=90@test=30")
    assert np.bincount(data.train.labels).tolist() == [30, 30, 30]
    name = f"hf:{made}@16@white@image=image@label=label@train=90@test=30"
    for typed in (
        "@test=30@label=label@train=090@WHITE@image=image@16",
        "@16@train=90@test=30@image=image@label=label@#ffffff",
    ):
        assert canonical_dataset(f"hf:{made}{typed}") == name
    assert canonical_dataset(name) == name
    assert canonical_dataset("hf:uoft-cs/cifar10:plain_text@16@train=9") == "hf:uoft-cs/cifar10:plain_text@16@train=9"
    assert re.fullmatch(
        r"hf-cifar10-plain_text-16-train-9-[0-9a-f]{8}", dataset_folder("hf:uoft-cs/cifar10:plain_text@16@train=9")
    )
    where = ["--dataset", f"hf:{made}", "--root", tmp_path / "root"]
    assert run_cli("train", "R1111", "--width", "2", "--epochs", "1", *where).returncode == 0
    taken = ["--train-images", "90", "--test-images", "30", "--batch-size", "30", "--settings", "T2T", "--dry-run"]
    ended = run_cli("sweep", "--senders", "R1111", "--receivers", "R1111", *where, *taken)
    assert ended.returncode == 0, ended.stderr
    assert f"on hf:{made}@train=90@test=30" in ended.stdout


def test_one_of_several_configs_has_to_be_chosen(
    fashion: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pictures(tmp_path / "pics", fashion)
    made = with_configs(tmp_path / "made", folder)
    with pytest.raises(DataError, match=f"hf:{made} has the configs large, small: choose one, such as hf:{made}:large"):
        load(made)
    assert load(made, ":large").size == (16, 24)
    assert load(made, ":small@8").size == (8, 8)
    assert canonical_dataset(f"hf:{made}:small@8") == f"hf:{made}:small@8"
    with pytest.raises(DataError, match=f"hf:{made}:tiny is unknown: expected one of the configs large, small"):
        load(made, ":tiny")


def with_configs(made: Path, folder: Path) -> Path:
    """Two configs, as the card of a data set on the hub names them; ``small`` has half of the rows."""
    for config, step in (("large", 1), ("small", 2)):
        for split in ("train", "test"):
            write(made / config / f"{split}-00000-of-00001.parquet", table(rows_of(folder / split)[::step]))
    files = [
        f"- config_name: {c}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {c}/{s}-*\n" for s in ("train", "test"))
        for c in ("large", "small")
    ]
    (made / "README.md").write_text(f"---\nconfigs:\n{''.join(files)}---\n")
    return made


def test_columns_are_found_by_their_type(fashion: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = pictures(tmp_path / "pics", fashion)
    rows = {split: rows_of(folder / split) for split in ("train", "test")}
    plain = load_dataset(f"imagefolder:{folder}", tmp_path)

    def made(name: str, change: Callable[[datasets.Dataset], datasets.Dataset], **columns: Any) -> Path:
        for split, content in rows.items():
            write(tmp_path / name / f"{split}.parquet", change(table(content, **columns)))
        return tmp_path / name

    coarse = ([k % 2 for k in range(12)], datasets.ClassLabel(names=["top", "shoe"]))
    like_cifar100 = made(
        "cifar", lambda t: t.rename_columns({"image": "img", "label": "fine_label"}), coarse_label=coarse
    )
    with caplog.at_level(logging.INFO):
        assert load(like_cifar100).hash == plain.hash
    assert said(caplog, "alone") == [
        f"hf:{like_cifar100}: images are img, labels are fine_label; coarse_label left alone"
    ]
    assert load(like_cifar100, "@label=coarse_label").class_names == ("top", "shoe")

    mask = ([{"bytes": rows["test"][0][0], "path": None}] * 12, datasets.Image())
    doubtful = made(
        "doubtful", lambda t: t.rename_columns({"image": "left", "label": "kind"}), right=mask, colour=coarse
    )
    for parts, message in (
        ("", r"has the columns left and right of images: choose one with @image=left behind the data set's name"),
        ("@image=left", r"has the columns kind and colour of labels: choose one with @label=kind"),
        ("@image=kind", r"column kind holds ClassLabel.*: expected encoded images"),
        ("@image=left@label=right", r"column right holds Image.*: expected whole numbers, texts or ClassLabel"),
        ("@image=nose", r"has no column nose: found left, kind, right, colour"),
        ("@image=", r"expected @image=COLUMN"),
    ):
        with pytest.raises(DataError, match=message):
            load(doubtful, parts)
    assert load(doubtful, "@image=left@label=kind").hash == plain.hash
    without = made("without", lambda t: t.rename_column("label", "kind").cast_column("kind", datasets.Value("int64")))
    with pytest.raises(
        DataError, match="has no column of labels: expected a ClassLabel, or one called label or labels"
    ):
        load(without)
    assert load(without, "@label=kind").class_names == ("0", "1", "2")


@pytest.mark.parametrize("packed", ["struct", "binary"])
@pytest.mark.parametrize("kind", ["numbers", "texts"])
def test_tables_that_other_tools_wrote(packed: str, kind: str, fashion: Dataset, tmp_path: Path) -> None:
    """Without the library's description of the columns."""
    folder = pictures(tmp_path / "pics", fashion)
    plain = load_dataset(f"imagefolder:{folder}", tmp_path)
    (tmp_path / "made").mkdir()
    for split in ("train", "test"):
        rows = rows_of(folder / split)
        images = [{"bytes": content, "path": "x.png"} if packed == "struct" else content for content, _ in rows]
        labels = [label if kind == "numbers" else CLASSES[label] for _, label in rows]
        pq.write_table(
            pa.table({"id": range(len(rows)), "image": images, "label": labels}), tmp_path / "made" / f"{split}.parquet"
        )
    data = load(tmp_path / "made")
    assert data.hash == plain.hash
    assert data.class_names == (("0", "1", "2") if kind == "numbers" else CLASSES)


def test_what_was_downloaded_is_found_offline(
    fashion: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, run_cli: Command
) -> None:
    folder = pictures(tmp_path / "pics", fashion)
    plain = load_dataset(f"imagefolder:{folder}", tmp_path)
    ended = run_cli("train", "R1111", "--dataset", "hf:fashion-org/clothes:large", "--root", tmp_path / "root")
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert f"hf:fashion-org/clothes:large is neither in {tmp_path / 'prepared'} nor in {tmp_path / 'hub'}" in line
    assert "(HF_HUB_OFFLINE is set): set HF_HOME to a cache that has it" in line
    assert dataset_size("hf:fashion-org/clothes:large", tmp_path) is None
    ended = run_cli(
        "sweep", "--senders", "R1111", "--receivers", "R1111", "--dataset", "hf:fashion-org/clothes:large", "--dry-run"
    )
    assert ended.returncode == 0, ended.stderr
    # as the hub's library leaves it: links to files that are named by their content
    snapshot = with_configs(tmp_path / "hub" / "datasets--fashion-org--clothes" / "snapshots" / REVISION, folder)
    for file in [path for path in snapshot.rglob("*") if path.is_file()]:
        blob = snapshot.parents[1] / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        file.symlink_to(blob)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(REVISION)
    with caplog.at_level(logging.INFO):
        data = load("fashion-org/clothes:large")
    assert data.hash == plain.hash
    assert said(caplog, "is taken from") == [
        f"hf:fashion-org/clothes:large is taken from {snapshot} (HF_HUB_OFFLINE is set)"
    ]
    size = dataset_size("hf:fashion-org/clothes:small", tmp_path)
    assert size is not None
    assert (size.train, size.test, size.classes, size.height, size.width) == (6, 6, 3, 16, 24)
    with pytest.raises(DataError, match="hf:fashion-org/clothes has the configs large, small: choose one"):
        load("fashion-org/clothes")


def test_what_the_library_prepared_is_found_offline(fashion: Dataset, tmp_path: Path) -> None:
    """What ``datasets.load_dataset`` left of a data set of the hub, whose files may be gone."""
    folder = pictures(tmp_path / "pics", fashion)
    plain = load_dataset(f"imagefolder:{folder}", tmp_path)
    load(parquets(tmp_path / "clothes", folder))
    (prepared,) = (tmp_path / "prepared" / "clothes" / "default" / "0.0.0").glob("*/")
    there = tmp_path / "prepared" / "fashion-org___clothes" / "default" / "0.0.0" / REVISION
    shutil.copytree(prepared, there)
    assert load("fashion-org/clothes").hash == plain.hash
    # neither a folder of that name nor another config is taken for it
    with pytest.raises(DataError, match="hf:fashion-org/clothes:other"):
        load("fashion-org/clothes:other")
