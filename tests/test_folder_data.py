"""Folders of images as people have them: names of splits, a share held out, pictures of every kind in one folder."""

import hashlib
import logging
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from fastsitch.data import Dataset, canonical_dataset, dataset_folder, dataset_size, load_dataset
from fastsitch.data.folder_splits import SUFFIXES
from fastsitch.errors import DataError
from tests.conftest import Command
from tests.test_any_data import CLASSES, pictures


def said(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


def load(folder: Path, parts: str = "") -> Dataset:
    return load_dataset(f"imagefolder:{folder}{parts}", folder.parent / "scratch")


@pytest.mark.parametrize("test", ["test", "val", "valid", "validation"])
@pytest.mark.parametrize("train", ["train", "training"])
def test_split_folders_have_several_names(
    train: str, test: str, fashion: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pictures(tmp_path / "pics", fashion)
    plain = load(folder)
    assert plain.class_names == CLASSES
    (folder / "train").rename(folder / train)
    (folder / "test").rename(folder / test)
    with caplog.at_level(logging.INFO):
        data = load(folder)
    assert data.hash == plain.hash
    expected = [f"{folder}: {train}/ is taken for training, {test}/ for the test"]
    assert said(caplog, "is taken") == (expected if (train, test) != ("train", "test") else [])


def test_of_several_test_folders_the_first_with_classes_is_taken_and_said(
    fashion: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pictures(tmp_path / "pics", fashion)
    plain = load(folder).hash
    pictures(tmp_path / "more", fashion, each=2).joinpath("test").rename(folder / "val")
    with caplog.at_level(logging.INFO):
        assert load(folder).hash == plain
    assert said(caplog, "is taken") == [
        f"{folder}: train/ is taken for training, test/ for the test, and val/ left alone"
    ]
    # as ImageNet has it: the test images have no labels, and so lie in no class folders
    for path in sorted((folder / "test").glob("*/*")):
        path.rename(folder / "test" / f"{path.parent.name}{path.name}")
    for name in CLASSES:
        (folder / "test" / name).rmdir()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert len(load(folder).test) == 6
    assert said(caplog, "is taken") == [
        f"{folder}: train/ is taken for training, val/ for the test, and test/ left alone"
    ]
    # without another it is refused
    (folder / "val").rename(tmp_path / "val")
    with pytest.raises(DataError, match="test has classes that|train has classes that test/ lacks: boot, coat, shirt"):
        load(folder)


def unsplit(folder: Path, fashion: Dataset, each: int = 12) -> Path:
    """Class folders alone."""
    made = pictures(folder.with_name("split"), fashion, size=(16, 16), each=each) / "train"
    return made.rename(folder)


def test_a_share_is_held_out_by_names_alone(fashion: Dataset, tmp_path: Path) -> None:
    folder = unsplit(tmp_path / "pics", fashion, 40)
    data = load(folder, "@holdout=0.25")
    assert len(data.train) + len(data.test) == 120
    assert 15 <= len(data.test) <= 45
    files = sorted(folder.glob("*/*.png"))

    def is_tested(path: Path) -> bool:
        name = f"0:{path.relative_to(folder)}"
        return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) < 0.25 * 2**64

    for split, tested in ((data.train, False), (data.test, True)):
        wanted = [path for path in files if is_tested(path) == tested]
        assert np.array_equal(split.images.numpy(), np.stack([np.asarray(Image.open(path)) for path in wanted]))
        assert split.labels.tolist() == [CLASSES.index(path.parent.name) for path in wanted]
    # another place and more files move nothing
    moved = folder.rename(tmp_path / "moved")
    assert load(moved, "@holdout=0.25").hash == data.hash
    Image.open(files[0].parent.parent.with_name("moved") / "boot" / "0.png").save(moved / "boot" / "new.png")
    more = load(moved, "@holdout=0.25")
    old = {image.numpy().tobytes() for image in data.test.images}
    assert old <= {image.numpy().tobytes() for image in more.test.images}
    size = dataset_size(f"imagefolder:{moved}@holdout=0.25", tmp_path)
    assert size is not None
    assert (size.train, size.test, size.classes) == (len(more.train), len(more.test), 3)


def test_what_is_held_out_is_a_part_of_the_name(fashion: Dataset, tmp_path: Path, run_cli: Command) -> None:
    folder = unsplit(tmp_path / "pics", fashion, 60)
    name = f"imagefolder:{folder}@16@white@holdout=0.2@train=90@test=12"
    for typed in (
        "@holdout=0.20@16@test=12@train=090@WHITE",
        "@test=12@train=90@white@holdout=.2@16",
        "@16@#FFFFFF@holdout=0.200@train=90@test=12",
    ):
        assert canonical_dataset(f"imagefolder:{folder}{typed}") == name
    assert canonical_dataset(name) == name
    assert dataset_folder(name).startswith("imagefolder-pics-16-white-holdout-0-2-train-90-test-12-")
    where = ["--dataset", f"imagefolder:{folder}", "--root", tmp_path / "root", "--holdout", "0.20"]
    ended = run_cli("train", "R1111", "--width", "2", "--epochs", "1", *where)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith(f"on imagefolder:{folder}@holdout=0.2\n")
    short = ["--batch-size", "8", "--epochs", "0.5", "--run", "held"]
    ended = run_cli("sweep", "--senders", "R1111", "--receivers", "R1111", *short, "--root", tmp_path / "root")
    assert ended.returncode == 0, ended.stderr
    assert f"run held on imagefolder:{folder}@holdout=0.2\n" in ended.stdout
    # the folder of that very name comes first
    named = folder.rename(tmp_path / "pics@holdout=0.2")
    assert canonical_dataset(f"imagefolder:{named}") == f"imagefolder:{named}"
    assert canonical_dataset(f"imagefolder:{named}@holdout=0.3") == f"imagefolder:{named}@holdout=0.3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--holdout", "0"], "--holdout 0.0: expected a share between 0 and 1, such as 0.2"),
        (["--holdout", "1"], "--holdout 1.0: expected a share between 0 and 1, such as 0.2"),
        (["--holdout", "nan"], "--holdout nan: expected a share between 0 and 1, such as 0.2"),
        (["--holdout", "0.2", "--dataset", "cifar10"], "--holdout 0.2: only images of a folder are split by it"),
        (["--holdout", "0.3", "--dataset", "imagefolder:pics@holdout=0.2"], "says 0.2; leave one of them out"),
        (["--dataset", "imagefolder:pics@holdout=1.2"], "expected @holdout=SHARE with a share between 0 and 1"),
        (["--dataset", "imagefolder:pics@holdout=0"], "expected @holdout=SHARE with a share between 0 and 1"),
        (["--dataset", "imagefolder:pics@holdout=0.2@holdout=0.2"], "it says @holdout= twice"),
        (["--dataset", "npz:a.npz@holdout=0.2"], "a.npz@holdout=0.2 does not exist"),
    ],
)
def test_shares_that_cannot_be(options: list[str], message: str, run_cli: Command) -> None:
    dataset = [] if "--dataset" in options else ["--dataset", "imagefolder:pics"]
    ended = run_cli("train", "R1111", *options, *dataset)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []


def with_splits(folder: Path) -> str:
    (folder / "val").mkdir()
    return r"pics has the folder val/, by which its images are split: leave out holdout=0.2, or name"


def nested_in_classes(folder: Path) -> str:
    (folder / "coat" / "train").mkdir()
    return r"pics/coat has a folder train/, which is no class: expected class folders in .*pics, or split folders"


def class_of_one(folder: Path) -> str:
    for path in sorted((folder / "coat").iterdir())[1:]:
        path.unlink()
    return r"pics/coat has 1 images, of which holdout=0.2 makes none a (training|test) image: add images to the class"


def loose_image(folder: Path) -> str:
    (folder / "coat" / "1.png").rename(folder / "1.png")
    return r"pics/1\.png is in no class folder"


def no_folder(folder: Path) -> str:
    folder.rename(folder.with_name("gone"))
    return r"pics is no folder: expected one folder per class in it"


@pytest.mark.parametrize("spoil", [with_splits, nested_in_classes, class_of_one, loose_image, no_folder])
def test_folders_that_cannot_be_split(spoil: Callable[[Path], str], fashion: Dataset, tmp_path: Path) -> None:
    folder = unsplit(tmp_path / "pics", fashion, 20)
    assert len(load(folder, "@holdout=0.2").train)
    message = spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        load(folder, "@holdout=0.2")
    assert "\n" not in str(caught.value)


def test_a_folder_without_splits_says_what_to_do(fashion: Dataset, tmp_path: Path) -> None:
    folder = unsplit(tmp_path / "pics", fashion)
    with pytest.raises(DataError, match=r"no folder train/: .* for class folders alone use holdout=0.2$") as caught:
        load(folder)
    assert caught.value.as_typed().endswith("for class folders alone use --holdout 0.2")
    above = pictures(tmp_path / "above" / "pics", fashion).parent
    with pytest.raises(DataError, match=r"above has no folder train/: .*above/pics has one: name that folder$"):
        load(above)
    (above / "pics" / "test").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"no folder test/: .*to split its images, name .*pics/train with holdout=0.2$"):
        load(above / "pics")


GREY = np.add.outer(np.arange(16) * 16, np.arange(16)).astype(np.uint8)
"""All values from 0 to 255."""
DEEP = (GREY.astype(np.uint16) * 257 + np.arange(16, dtype=np.uint16) * 7 - 40 * (GREY > 0)).astype(np.uint16)
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], -1)


def cmyk() -> Image.Image:
    return Image.fromarray(COLOURS).convert("CMYK")


def palette() -> Image.Image:
    picture = Image.fromarray(GREY // 32).convert("P")
    picture.putpalette([*range(24), *[0] * (768 - 24)])
    return picture


def rounded(values: np.ndarray) -> np.ndarray:
    return np.floor(values.astype(np.float64) / 257 + 0.5).astype(np.uint8)


def repeated(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, -1)


def over(grey: np.ndarray, alpha: np.ndarray, behind: int) -> np.ndarray:
    return repeated(np.where(alpha, grey, behind).astype(np.uint8))


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[], np.ndarray]]] = {
    "grey.png": (lambda path: Image.fromarray(GREY).save(path), lambda: repeated(GREY)),
    "bits.png": (lambda path: Image.fromarray(GREY > 99).save(path), lambda: repeated((GREY > 99) * np.uint8(255))),
    "colour.bmp": (lambda path: Image.fromarray(COLOURS).save(path), lambda: COLOURS),
    "colour.tif": (lambda path: Image.fromarray(COLOURS).save(path), lambda: COLOURS),
    "packed.tiff": (lambda path: Image.fromarray(COLOURS).save(path, compression="tiff_lzw"), lambda: COLOURS),
    "clear.webp": (
        lambda path: Image.fromarray(np.dstack([repeated(GREY), (GREY > 99) * np.uint8(255)])).save(
            path, lossless=True
        ),
        lambda: over(GREY, GREY > 99, 255),
    ),
    "clear.png": (
        lambda path: Image.fromarray(np.dstack([GREY, (GREY > 99) * np.uint8(255)]), "LA").save(path),
        lambda: over(GREY, GREY > 99, 255),
    ),
    "palette.png": (
        lambda path: palette().save(path),
        lambda: np.stack([3 * (GREY // 32) + k for k in range(3)], -1).astype(np.uint8),
    ),
    "hole.png": (
        lambda path: palette().save(path, transparency=0),
        lambda: np.where((GREY < 32)[..., None], 255, np.stack([3 * (GREY // 32) + k for k in range(3)], -1)),
    ),
    "inks.tif": (lambda path: cmyk().save(path), lambda: np.asarray(cmyk().convert("RGB"))),
    "deep.png": (lambda path: Image.fromarray(DEEP).save(path), lambda: repeated(rounded(DEEP))),
    "deep.tif": (lambda path: Image.fromarray(DEEP).save(path), lambda: repeated(rounded(DEEP))),
    "deep.pgm": (lambda path: Image.fromarray(DEEP).save(path), lambda: repeated(rounded(DEEP))),
    "still.gif": (lambda path: palette().save(path), lambda: np.asarray(palette().convert("RGB"))),
}


def test_pictures_of_every_kind_in_one_folder_become_three_channels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "all"
    for split in ("train", "test"):
        (folder / split / "one").mkdir(parents=True)
        for name, (write, _) in KINDS.items():
            write(folder / split / "one" / name)
    with caplog.at_level(logging.INFO):
        data = load(folder, "@white")
    assert len(data.train) == len(KINDS)
    for name, image in zip(sorted(KINDS), data.train.images.numpy(), strict=True):
        assert np.array_equal(image, KINDS[name][1]()), name
    assert np.unique(DEEP).size > 200
    (line,) = said(caplog, "may be transparent")
    assert line.startswith("6 images may be transparent")
    assert said(caplog, "more than one frame") == []


def test_inks_as_adobe_writes_them(tmp_path: Path) -> None:
    """Inverted: a JPEG with four inks looks as it does everywhere."""
    folder = tmp_path / "inks"
    for split in ("train", "test"):
        (folder / split / "one").mkdir(parents=True)
        cmyk().resize((64, 64), Image.Resampling.NEAREST).save(folder / split / "one" / "a.jpg", quality=95)
    content = (folder / "train" / "one" / "a.jpg").read_bytes()
    assert b"Adobe" in content
    wanted = np.asarray(Image.fromarray(COLOURS).resize((64, 64), Image.Resampling.NEAREST)).astype(int)
    shown = load(folder).train.images[0].numpy().astype(int)
    assert np.abs(shown - wanted).mean() < 12
    assert np.abs(255 - shown - wanted).mean() > 60


def test_sixteen_bits_upright_inverted_and_with_a_hole(tmp_path: Path) -> None:
    """What only some files say of their numbers is done before they lose half of their bits."""
    folder = tmp_path / "deep"
    for split in ("train", "test"):
        (folder / split / "one").mkdir(parents=True)
        place = folder / split / "one"
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(DEEP).save(place / "a.png", exif=exif)
        for compression, name in ((None, "b.tif"), ("tiff_lzw", "c.tif")):
            Image.fromarray(DEEP).save(place / name, tiffinfo={0x0112: 6}, compression=compression)
        Image.fromarray(DEEP).save(place / "d.tif", tiffinfo={262: 0})
        Image.fromarray(DEEP).save(place / "e.png", transparency=int(DEEP[3, 3]))
    turned, whites = np.rot90(rounded(DEEP), -1), 255 - rounded(DEEP)
    hole = np.where(np.equal(DEEP, DEEP[3, 3]), 255, rounded(DEEP))
    shown = load(folder, "@white").train.images.numpy()
    for image, wanted in zip(shown, (turned, turned, turned, whites, hole), strict=True):
        assert np.array_equal(image, repeated(wanted))


def deep_colours(path: Path, pixels: np.ndarray) -> None:
    """A PNG of 16 bits in three colours as its specification has it; Pillow writes none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width, _ = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def test_sixteen_bits_of_three_colours_keep_their_upper_half(fashion: Dataset, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pics", fashion, size=(16, 16))
    pixels = np.stack([DEEP, DEEP.T, 65_535 - DEEP], -1)
    deep_colours(folder / "train" / "boot" / "0.png", pixels)
    shown = load(folder).train.images[0].numpy()
    assert np.array_equal(shown, pixels >> 8)
    assert np.abs(shown.astype(int) - rounded(pixels)).max() <= 1


def test_files_of_several_frames_show_the_first_and_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "moving"
    frames = [Image.fromarray(np.full((16, 16, 3), value, np.uint8)) for value in (40, 120, 200)]
    names = ("a.gif", "b.webp", "c.png", "d.tiff")
    for split in ("train", "test"):
        (folder / split / "one").mkdir(parents=True)
        for name in names:
            options = {"lossless": True} if name == "b.webp" else {}
            path = folder / split / "one" / name
            frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with caplog.at_level(logging.INFO):
        data = load(folder)
    assert data.train.images.flatten(1).unique(dim=1).flatten().tolist() == [40] * 4
    (line,) = said(caplog, "more than one frame")
    assert line == f"8 images have more than one frame, such as {folder}/train/one/a.gif: the first is taken"


def as_floats(folder: Path) -> str:
    Image.fromarray(GREY.astype(np.float32)).save(folder / "x.tif")
    return r"x\.tif has pixels of type F: expected 8 bits per channel, or 16; convert it first"


def of_32_bits(folder: Path) -> str:
    Image.fromarray(GREY.astype(np.int32)).save(folder / "x.tif")
    return r"x\.tif has pixels of type I: expected 8 bits per channel, or 16"


def lab(folder: Path) -> str:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    ImageCms.profileToProfile(Image.fromarray(COLOURS), *profiles, outputMode="LAB").save(folder / "x.tif")
    return r"x\.tif has pixels of type LAB: expected 8 bits per channel, or 16"


def unread(folder: Path) -> str:
    (folder / "x.heic").write_bytes(b"")
    return r"x\.heic: expected png, jpg, webp, bmp, gif, tif, ppm or pgm files; convert it first, or remove it"


@pytest.mark.parametrize("spoil", [as_floats, of_32_bits, lab, unread])
def test_pixels_whose_range_nobody_knows_are_refused(
    spoil: Callable[[Path], str], fashion: Dataset, tmp_path: Path
) -> None:
    folder = pictures(tmp_path / "pics", fashion, size=(16, 16))
    message = spoil(folder / "train" / "coat")
    with pytest.raises(DataError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_what_pillow_reads_is_read(fashion: Dataset, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pics", fashion, size=(16, 16))
    place = folder / "train" / "coat"
    image = Image.fromarray(fashion.train.images[0].numpy()).resize((16, 16))
    image.save(place / "x.jfif", format="JPEG")
    more = [suffix for suffix in (".avif", ".jp2") if suffix in SUFFIXES]
    for suffix in more:
        image.save(place / f"y{suffix}")
    assert load(folder).train.labels.bincount().tolist() == [4, 5 + len(more), 4]
    assert not re.search(r"\.heic|\.svg", " ".join(SUFFIXES))
