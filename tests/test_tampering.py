"""Files that were altered, exchanged or never ours: refused by name or made again, never believed."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsitch
from fastsitch.checked_files import DamagedFile, parse_json, read_npz, with_hash
from fastsitch.data import Dataset
from fastsitch.errors import ConfigError, DataError, FastsitchError, NetworkError, RunError
from fastsitch.files import exclusive, write_atomically
from fastsitch.network_names import NetworkName
from fastsitch.networks.foreign_weights import read_weights
from fastsitch.networks.model_source import ModelSource
from fastsitch.runs.run import Run
from tests.conftest import Command, save_npz
from tests.processes import RunningCommand

OPTIONS = {"recipe": "small", "batch_size": 32, "epochs": 0.2, "precision": "fp32", "seeds": [0, 1]}
UNITS = ["R1111--R1111.T2T.task.seed0", "R1111--R1111.T2T.task.seed1"]


@pytest.fixture(scope="module")
def made(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with R1111 trained on 160 images, and a run of two units."""
    folder = tmp_path_factory.mktemp("tampering")
    save_npz(folder / "few.npz", fashion.train, fashion.test, 160, 64)
    fastsitch.train("R1111", dataset=f"npz:{folder / 'few.npz'}", width=4, epochs=1, root=folder / "root")
    fastsitch.sweep("R1111", "R1111", root=folder / "root", run="run", **OPTIONS)
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(made / "root", tmp_path / "root"))


def run_of(root: Path, name: str = "run") -> Run:
    return fastsitch.open_run(name, root=root)


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def contents(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run.path / "units").iterdir())}


def swap(root: Path) -> None:
    """Another unit's stitches, of the same size."""
    units = run_of(root).path / "units"
    shutil.copy(units / f"{UNITS[1]}.safetensors", units / f"{UNITS[0]}.safetensors")


def flip_one_bit(root: Path) -> None:
    file = run_of(root).path / "units" / f"{UNITS[0]}.safetensors"
    flip(file, file.stat().st_size - 3, 6)


def garble(root: Path) -> None:
    file = run_of(root).path / "units" / f"{UNITS[0]}.safetensors"
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("tamper", [swap, flip_one_bit, garble])
def test_stitches_that_are_not_those_of_their_unit_are_not_believed(
    tamper: object, root: Path, run_cli: Command, caplog: pytest.LogCaptureFixture
) -> None:
    whole = contents(run_of(root))
    assert callable(tamper)
    tamper(root)
    run = run_of(root)
    with pytest.raises(RunError, match="does not hold the stitches that were written with"):
        run.stitch("R1111", "R1111", 0, 0)
    refused = run_cli("tables", "run", "--root", root)
    assert refused.returncode == 2
    assert UNITS[0] in refused.stderr
    assert "Traceback" not in refused.stderr
    fastsitch.sweep("R1111", "R1111", root=root, run="run", **OPTIONS)
    assert "training the unit again" in caplog.text
    assert contents(run_of(root)) == whole


def test_units_belong_to_the_options_they_were_made_with(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(root)
    before = contents(run)
    (run.path / "run.json").unlink()
    again = fastsitch.sweep("R1111", "R1111", root=root, run="run", lr=0.5, **OPTIONS)
    assert "was made with other options, networks or data than those of the run" in caplog.text
    assert contents(again) != before
    expected = fastsitch.sweep("R1111", "R1111", root=root, run="other", lr=0.5, **OPTIONS)
    assert contents(again) == contents(expected)


def test_a_unit_of_another_run_is_refused(root: Path, tmp_path: Path) -> None:
    other = fastsitch.sweep("R1111", "R1111", root=root, run="other", lr=0.5, **OPTIONS)
    run = run_of(root)
    for suffix in ("npz", "safetensors"):
        shutil.copy(other.path / "units" / f"{UNITS[0]}.{suffix}", run.path / "units" / f"{UNITS[0]}.{suffix}")
    with pytest.raises(RunError, match=r"seed0\.npz was made with other options, networks or data"):
        fastsitch.export_run(run_of(root), tmp_path / "out")
    with pytest.raises(RunError, match="was made with other options"):
        run_of(root).matrix("R1111", "R1111", "accuracy")


def test_no_bit_of_a_record_is_believed_when_it_has_changed(root: Path) -> None:
    """Of the run's file: every bit of some bytes, at random."""
    path = run_of(root).path / "run.json"
    content, known = path.read_bytes(), json.loads(path.read_bytes())
    draw = random.Random(0)
    for position in draw.sample(range(len(content)), 150):
        path.write_bytes(content)
        flip(path, position, draw.randrange(8))
        try:
            Run.open(path.parent)
        except RunError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert json.loads(path.read_bytes()) == known
    whole = content.decode()
    altered = (whole.replace("seeds", "seedz"), whole.replace("run_hash", "rUn_hash"))
    for text in ("", "[]", "[" * 200_000, '{"format": 1}', "null", *altered):
        path.write_text(text)
        with pytest.raises(RunError, match=r"run\.json is damaged"):
            Run.open(path.parent)


def test_no_bit_of_a_unit_is_believed_when_it_has_changed(root: Path) -> None:
    run = run_of(root)
    path = run.path / "units" / f"{UNITS[0]}.npz"
    content, known = path.read_bytes(), run.read(run.units[0])
    draw = random.Random(1)
    # the directory of the archive is at the end: there every byte
    positions = [*draw.sample(range(len(content)), 150), *range(len(content) - 120, len(content))]
    for position in positions:
        path.write_bytes(content)
        flip(path, position, draw.randrange(8))
        try:
            found = run.read(run.units[0])
        except RunError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert found.keys() == known.keys()
            assert all(
                np.array_equal(found[name], known[name], equal_nan=True) for name in run.metrics if name in known
            )
    for size in range(0, len(content), 97):
        path.write_bytes(content[:size])
        with pytest.raises(RunError, match="is damaged"):
            run.read(run.units[0])


def test_arrays_of_other_names_dtypes_and_shapes_are_refused(root: Path) -> None:
    run = run_of(root)
    path = run.path / "units" / f"{UNITS[0]}.npz"
    known = read_npz(path)
    for change in (
        {"accuracy": known["accuracy"][:2]},
        {"accuracy": known["accuracy"].astype(np.int64)},
        {"status": known["status"].astype(float)},
        {"unit": np.array(3)},
        {"loss": np.array("none")},
        {"store_hash": np.array(["a", "b"])},
    ):
        with path.open("wb") as file:
            np.savez(file, **{**known, **change})
        with pytest.raises(RunError, match=f"is damaged .*{next(iter(change))} is .*expected"):
            run.read(run.units[0])
    for change in ({"stitches_bytes": np.array("many")}, {"stitches_bytes": np.ones((2, 2), int)}):
        with path.open("wb") as file:
            np.savez(file, **{**known, **change})
        assert not run.intact(run.units[0])
        with pytest.raises(RunError, match=r"npz is damaged: stitches_bytes is .*expected"):
            run.stitches(run.units[0])
    np.savez_compressed(path, **known)
    with pytest.raises(RunError, match="is not stored as it was written"):
        run.read(run.units[0])
    path.unlink()
    path.mkdir()
    with pytest.raises(RunError, match="is no regular file: expected results of a unit; remove it"):
        run.done(run.units[0])


def test_json_vouches_for_itself() -> None:
    content = with_hash({"a": [1, 2.5, None], "b": "ü"}, "hash")
    assert parse_json(json.dumps(content), "hash") == {"a": [1, 2.5, None], "b": "ü"}
    for text, message in (
        (json.dumps({**content, "b": "u"}), "altered"),
        ('{"a": 1}', "it lacks hash"),
        ("[1]", "no JSON object"),
        ("{", "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
    ):
        with pytest.raises(DamagedFile, match=message):
            parse_json(text, "hash")
    assert parse_json('{"a": 1}', "hash", required=False) == {"a": 1}


def test_one_bad_entry_hides_no_others_in_the_list(root: Path, run_cli: Command) -> None:
    (folder,) = (root / "runs").iterdir()
    models = root / "models" / folder.name
    (stores,) = (root / "activations").iterdir()
    for name in ("deep", "no-object"):
        (folder / name).mkdir()
    (folder / "deep" / "run.json").write_text("[" * 200_000)
    (folder / "no-object" / "run.json").write_text("3")
    (stores / "R1112" / "manifest.json").mkdir(parents=True)
    (models / "R1122.json").write_text("[" * 200_000)
    (models / "R1212.json").mkdir()
    os.makedirs(os.fsencode(folder) + b"/caf\xe9")
    (Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9")) / "run.json").write_text("{}")
    networks = root / "networks" / folder.name
    networks.mkdir(parents=True, exist_ok=True)
    (networks / "mine.json").write_text('{"a": 1}')
    listed = run_cli("list", "--root", root)
    assert listed.returncode == 0, listed.stderr
    assert "Traceback" not in listed.stderr
    assert listed.stdout.count("unusable") >= 6
    for line in ("R1111 ", "run ", "deep", "no-object"):
        assert line in listed.stdout


def test_outputs_are_regular_files(tmp_path: Path, run_cli: Command) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/null"), tmp_path):
        with pytest.raises(ConfigError, match="is no regular file"):
            write_atomically(path, lambda file: file.write(b"x"))
    refused = run_cli("bench", "--width", "4", "--repeats", "1", "--json", "/dev/null")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert Path("/dev/null").is_char_device()


def test_nothing_is_written_through_a_link_that_somebody_put_there(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    target = tmp_path / "target.json"
    (tmp_path / "target.json.partial").symlink_to(victim)
    write_atomically(target, lambda file: file.write(b"new"))
    assert (target.read_text(), victim.read_text()) == ("new", "precious")
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(ConfigError, match="lock is no regular file"), exclusive(tmp_path / "lock", "something"):
        pass
    assert victim.read_text() == "precious"


@pytest.mark.kill
def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    child = os.fork()
    if not child:
        write_atomically(target, lambda file: os.kill(os.getpid(), signal.SIGKILL))
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(f"-{child}.partial")
    seen: list[list[str]] = []
    write_atomically(target, lambda file: seen.append([path.name for path in tmp_path.iterdir()]))
    assert [left.name not in names for names in seen] == [True]
    assert list(tmp_path.iterdir()) == [target]


def test_two_processes_write_the_same_figures(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    commands = [RunningCommand("plot", "run", "--root", root, "--out", out) for _ in range(3)]
    for command in commands:
        ended = command.ended()
        assert ended.returncode == 0, ended.stderr
    assert {path.suffix for path in out.iterdir()} == {".png", ".pdf"}


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("weights.pt", "weights.safetensors", "nets.py", "data.npz"):
        os.mkfifo(tmp_path / name)
    for name in ("weights.pt", "weights.safetensors"):
        with pytest.raises(NetworkError, match=rf"{name}'? is no regular file"):
            read_weights(tmp_path / name)
    with pytest.raises(NetworkError, match=r"/dev/zero'? is no regular file"):
        read_weights(Path("/dev/zero"))
    with pytest.raises(NetworkError, match=r"nets\.py is no regular file"):
        ModelSource.parse(f"{tmp_path}/nets.py:small")
    with pytest.raises(DataError, match=r"data\.npz is no regular file"):
        fastsitch.load_dataset(f"npz:{tmp_path}/data.npz")


HOSTILE = """
import sys
import torch
from torch import nn

class Leaves(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 10)
    def forward(self, x):
        sys.exit(0)

class Strange(BaseException):
    pass

class Liar:
    __class__ = nn.Linear

def leaves(): return Leaves()
def lies(): return Liar()
def raises(): raise Strange("on purpose\\x1b[31m" + "x" * 1000)
def doubles():
    torch.set_default_dtype(torch.float64)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


class Mute(Exception):
    def __str__(self):
        raise ValueError

def mute(classes):
    raise Mute

built = 0

def grows(classes):
    global built
    built += 1
    return nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(built)], nn.Flatten(), nn.LazyLinear(classes))

class Stays(nn.Sequential):
    def eval(self):
        raise RuntimeError("never")

def stays(classes):
    return Stays(nn.Flatten(), nn.Linear(3072, classes))
"""


def test_code_that_leaves_or_raises_anything_is_named(tmp_path: Path, run_cli: Command) -> None:
    (tmp_path / "hostile.py").write_text(HOSTILE)
    for name in ("leaves", "raises", "lies", "mute", "grows", "stays"):
        ended = run_cli("add", "n", "--from", f"{tmp_path}/hostile.py:{name}", "--root", tmp_path / "root")
        assert ended.returncode == 2, (name, ended)
        assert ended.stderr.count("\n") == 1
        assert "hostile.py" in ended.stderr
        assert len(ended.stderr) < 700
        assert "\x1b" not in ended.stderr
    ended = run_cli("add", "n", "--from", f"{tmp_path}/hostile.py:doubles", "--root", tmp_path / "root")
    assert ended.returncode == 0, ended.stderr
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("name", ["R1111\n", "R1111 ", " R1111", "R1111@\u0663", "R\u0661111", "R1111@1\n"])
def test_names_of_networks_have_no_blanks_and_plain_digits(name: str) -> None:
    with pytest.raises(NetworkError, match="unknown network"):
        NetworkName.parse(name)


def test_archives_that_would_not_fit_or_are_empty_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    x, y = np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.int64)
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
    for change, message in (
        ({"x_train": np.zeros((2, 0, 28), np.uint8)}, "at least one pixel"),
        ({"x_train": np.zeros((0, 28, 28), np.uint8), "y_train": y[:0]}, "at least one image"),
        ({"x_train": x.astype(bool)}, "expected images as uint8"),
        ({"y_train": y.astype(bool)}, "expected 2 integer labels, found bool"),
    ):
        np.savez(path, **{**arrays, **change})
        with pytest.raises(DataError, match=message):
            fastsitch.load_dataset(f"npz:{path}")
    # a header that promises 10^30 images
    np.savez(path, **arrays)
    content = path.read_bytes()
    header = b"'shape': (2, 28, 28), }"
    assert header in content
    for shape in (b"(9" + b"9" * 6 + b", 28), }", b"(-2, 28, 28), }", b"(2, 28, 28, }", b"((2, 28, 28"):
        wrong = (b"'shape': " + shape).ljust(len(header))[: len(header)]
        path.write_bytes(content.replace(header, wrong))
        with pytest.raises(FastsitchError, match=r"bomb\.npz"):
            fastsitch.load_dataset(f"npz:{path}")
