"""Commands killed at random moments: no partial file is taken for complete, and the same command finishes the job."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import fastsitch
from fastsitch.activations.store import ActivationStore
from fastsitch.data import Dataset
from fastsitch.folders import LocalFolder
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network
from fastsitch.root import Root
from tests.conftest import Command, save_npz
from tests.processes import RunningCommand

pytestmark = pytest.mark.kill


def kill_while(arguments: list[str | Path], cwd: Path, begun: Path, delay: float) -> bool:
    """Start a command, wait until ``begun`` exists, then ``delay`` seconds, and kill it; False if it was faster."""
    command = RunningCommand(*arguments, cwd=cwd)
    command.wait_for(begun.exists)
    time.sleep(delay)
    return command.kill() == -signal.SIGKILL


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> random.Random:
    value = random.SystemRandom().randrange(10**6)
    print(f"moments drawn with seed {value}")
    return random.Random(value)


def test_precompute_survives_kills(fashion: Dataset, tmp_path: Path, run_process: Command, seed: random.Random) -> None:
    save_npz(tmp_path / "some.npz", fashion.train, fashion.test, 3000, 500)
    dataset = f"npz:{tmp_path / 'some.npz'}"
    root = tmp_path / "root"
    fastsitch.train("R1111", dataset=dataset, width=8, epochs=1, root=root)
    arguments: list[str | Path] = ["precompute", "R1111", "--dataset", dataset, "--root", root]
    store = Path(Root.at(root).activations(dataset)) / "R1111"
    partial = store.with_name("R1111.partial")
    start = time.monotonic()
    assert run_process(*arguments).returncode == 0
    whole = contents(store)
    took = time.monotonic() - start
    subprocess.run(["rm", "-r", store], check=True)
    killed = 0
    for _ in range(4):
        killed += kill_while(arguments, tmp_path, partial, seed.uniform(0, 0.4 * took))
        if store.exists():
            # the kill came after the rename: what is there has to be whole
            ActivationStore.open(store)
            subprocess.run(["rm", "-r", store], check=True)
    assert killed
    finished = run_process(*arguments)
    assert finished.returncode == 0, finished.stderr
    assert contents(store) == whole
    assert not partial.exists()
    assert "is up to date" in run_process(*arguments).stderr


def test_a_sweep_survives_kills(fashion: Dataset, tmp_path: Path, run_process: Command, seed: random.Random) -> None:
    save_npz(tmp_path / "small.npz", fashion.train, fashion.test, 160, 80)
    dataset = f"npz:{tmp_path / 'small.npz'}"
    root = tmp_path / "root"
    fastsitch.train("R1111", "R1112", dataset=dataset, width=4, epochs=1, root=root)

    def arguments(name: str) -> list[str | Path]:
        options = [
            "--recipe",
            "small",
            "--batch-size",
            "16",
            "--epochs",
            "1",
            "--seeds",
            "0,1,2,3,4,5",
            "--run",
            name,
            "--root",
            root,
        ]
        return ["sweep", "--senders", "R1111", "--receivers", "R1112", *options]

    assert run_process(*arguments("whole")).returncode == 0
    runs = Root.at(root).runs(dataset)
    units = runs / "killed" / "units"
    # killed at random moments after the run began, after its first unit and after its third
    moments = [runs / "killed" / "run.json", *(units / f"R1111--R1112.T2T.task.seed{seed}.npz" for seed in (0, 2))]
    counts = []
    for moment in moments:
        assert kill_while(arguments("killed"), tmp_path, moment, seed.uniform(0.0, 0.05))
        counts.append(len(list(units.glob("*.npz"))) if units.exists() else 0)
    assert counts == sorted(counts)
    assert 3 <= counts[-1] < 6
    finished = run_process(*arguments("killed"))
    assert finished.returncode == 0, finished.stderr
    assert contents(units).keys() >= contents(runs / "whole" / "units").keys()
    whole, killed = (fastsitch.open_run(name, root=root) for name in ("whole", "killed"))
    for metric in ("accuracy", "loss", "train_loss", "status"):
        assert np.array_equal(
            killed.matrix_by_seed("R1111", "R1112", metric), whole.matrix_by_seed("R1111", "R1112", metric)
        )
    for name, content in contents(runs / "whole" / "units").items():
        assert contents(units)[name] == content


def saves_after(folder: Path, newest: int) -> bool:
    """Whether weights are being written, or have been since a time."""
    return any(
        path.suffix == ".partial" or path.stat().st_mtime_ns > newest
        for path in folder.glob("*.safetensors*")
        if path.exists()
    )


def test_training_survives_a_kill_while_it_saves(fashion: Dataset, tmp_path: Path, seed: random.Random) -> None:
    """Weights are written first, then the record that names them, so that both are complete."""
    save_npz(tmp_path / "small.npz", fashion.train, fashion.test, 160, 80)
    dataset = f"npz:{tmp_path / 'small.npz'}"
    root = tmp_path / "root"
    fastsitch.train("R1111", dataset=dataset, width=32, epochs=1, root=root)
    folder = Root.at(root).models(dataset)
    again: list[str | Path] = ["train", "R1111", "--dataset", dataset, "--width", "32", "--epochs", "2", "--force"]
    for _ in range(2):
        newest = max(path.stat().st_mtime_ns for path in folder.iterdir())
        command = RunningCommand(*again, "--root", root, cwd=tmp_path)
        command.wait_for(lambda newest=newest: saves_after(folder, newest), pause=0.0005)
        time.sleep(seed.uniform(0, 0.02))
        command.kill()
        (entry,) = fastsitch.runs.inventory.networks(Root.at(root))
        assert load_network(folder, NetworkName.parse("R1111")).record == entry.record
        assert entry.record.recipe["epochs"] in (1, 2)


def kill_at_the_sync_of(part: str) -> None:
    """Let this process be killed when it has written a file with this in its name, before it is renamed."""
    sync = os.fsync

    def killing_sync(handle: int) -> None:
        if part in os.readlink(f"/proc/self/fd/{handle}"):
            os.kill(os.getpid(), signal.SIGKILL)
        sync(handle)

    os.fsync = killing_sync


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files are read from /proc")
def test_what_a_kill_left_is_removed_by_the_next_command(fashion: Dataset, tmp_path: Path) -> None:
    save_npz(tmp_path / "few.npz", fashion.train, fashion.test, 256, 64)
    root, dataset = tmp_path / "root", f"npz:{tmp_path / 'few.npz'}"
    train = ["train", "R1111", "--width", "4", "--dataset", dataset, "--root", root]
    fastsitch.train("R1111", width=4, epochs=1, dataset=dataset, root=root)
    before = contents(root / "models")
    line = [*train, "--epochs", "2", "--force"]
    assert RunningCommand(*line, prepare=partial(kill_at_the_sync_of, ".safetensors")).wait() == -signal.SIGKILL
    (left,) = root.glob("models/*/*.partial")
    assert {**before, left.relative_to(root / "models").as_posix(): left.read_bytes()} == contents(root / "models")
    # the weights that are made now have another name
    assert RunningCommand(*train, "--epochs", "3", "--force").wait() == 0
    assert {path.suffix for path in root.glob("models/*/*")} == {".json", ".lock", ".safetensors"}

    # measuring the disk
    child = os.fork()
    if child == 0:
        kill_at_the_sync_of(".fastsitch-scratch-")
        LocalFolder(tmp_path / "stores").reading_rate(1 << 20)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list(tmp_path.glob(".fastsitch-scratch-*"))) == 1
    assert LocalFolder(tmp_path / "stores").reading_rate(1 << 20) > 0
    assert list(tmp_path.glob(".fastsitch-scratch-*")) == []


def bound_files(size: int) -> None:
    """Let no file of this process grow beyond so many bytes, as on a full disk."""
    # the first long file would end the process otherwise
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_is_named_and_nothing_is_left_of_what_did_not_fit(fashion: Dataset, tmp_path: Path) -> None:
    save_npz(tmp_path / "few.npz", fashion.train, fashion.test, 256, 64)
    root, out = tmp_path / "root", tmp_path / "out"
    where = ["--dataset", f"npz:{tmp_path / 'few.npz'}", "--root", root]
    sweep = ["--senders", "R1111", "--receivers", "R1111", "--batch-size", "32", "--epochs", "0.2", "--run", "a"]
    for size, place, line in (
        (4000, "models/", ["train", "R1111", "--width", "4", "--epochs", "1", *where]),
        (100_000, "activations/", ["precompute", "R1111", *where]),
        (9000, "runs/", ["sweep", *sweep, *where]),
        (2000, "out/", ["export", "a", "--out", out, "--root", root]),
        (9000, "out/", ["plot", "a", "--out", out, "--root", root]),
        (1500, "errors/", ["tables", "a", "--root", root]),
    ):
        ended = RunningCommand(*line, prepare=partial(bound_files, size)).ended()
        assert (ended.returncode, ended.stdout if line[0] != "sweep" else "") == (1, ""), ended.stderr
        said = ended.stderr.splitlines()[-1]
        assert place in said
        assert said.endswith("File too large; make room and run the same command again")
        assert [path for path in tmp_path.rglob("*") if path.suffix in (".partial", ".old")] == []
        ended = RunningCommand(*line).ended()
        assert ended.returncode == 0, ended.stderr
