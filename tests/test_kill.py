"""Real kills at random moments: nothing half-written is ever taken for whole, and the same command finishes the job."""

import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import fastsitch
from fastsitch.activations.store import ActivationStore
from fastsitch.data import Dataset
from fastsitch.networks.checkpoint import load_network
from fastsitch.networks.names import NetworkName
from fastsitch.root import Root
from tests.conftest import Command, cli_environment, cli_line, save_npz


def kill_while(arguments: list[str | Path], cwd: Path, begun: Path, delay: float) -> bool:
    """Start a command, wait until ``begun`` exists, then ``delay`` seconds, and kill it; False if it was faster."""
    process = subprocess.Popen(
        cli_line(*arguments), cwd=cwd, env=cli_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not begun.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> random.Random:
    value = random.SystemRandom().randrange(10**6)
    print(f"moments drawn with seed {value}")
    return random.Random(value)


def test_precompute_survives_kills(fashion: Dataset, tmp_path: Path, run_cli: Command, seed: random.Random) -> None:
    save_npz(tmp_path / "some.npz", fashion.train, fashion.test, 3000, 500)
    dataset = f"npz:{tmp_path / 'some.npz'}"
    root = tmp_path / "root"
    fastsitch.train("R1111", dataset=dataset, width=8, epochs=1, root=root)
    arguments: list[str | Path] = ["precompute", "R1111", "--dataset", dataset, "--root", root]
    store = Root.at(root).activations(dataset) / "R1111"
    partial = store.with_name("R1111.partial")
    start = time.monotonic()
    assert run_cli(*arguments).returncode == 0
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
    finished = run_cli(*arguments)
    assert finished.returncode == 0, finished.stderr
    assert contents(store) == whole
    assert not partial.exists()
    assert "up to date" in run_cli(*arguments).stdout


def test_a_sweep_survives_kills(fashion: Dataset, tmp_path: Path, run_cli: Command, seed: random.Random) -> None:
    save_npz(tmp_path / "small.npz", fashion.train, fashion.test, 160, 80)
    dataset = f"npz:{tmp_path / 'small.npz'}"
    root = tmp_path / "root"
    fastsitch.train("R1111", "R1112", dataset=dataset, width=4, epochs=1, root=root)

    def arguments(name: str) -> list[str | Path]:
        options = ["--recipe", "small", "--batch-size", "16", "--seeds", "0,1,2,3,4,5", "--run", name, "--root", root]
        return ["sweep", "--senders", "R1111", "--receivers", "R1112", *options]

    assert run_cli(*arguments("whole")).returncode == 0
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
    finished = run_cli(*arguments("killed"))
    assert finished.returncode == 0, finished.stderr
    assert contents(units).keys() >= contents(runs / "whole" / "units").keys()
    whole, killed = (fastsitch.open_run(name, root=root) for name in ("whole", "killed"))
    for metric in ("accuracy", "loss", "train_loss", "status"):
        assert np.array_equal(
            killed.matrix_by_seed("R1111", "R1112", metric), whole.matrix_by_seed("R1111", "R1112", metric)
        )
    for name, content in contents(runs / "whole" / "units").items():
        assert contents(units)[name] == content


def test_training_survives_a_kill_while_it_saves(fashion: Dataset, tmp_path: Path, seed: random.Random) -> None:
    """Weights are written under their own name before the record that names them, so either is whole."""
    save_npz(tmp_path / "small.npz", fashion.train, fashion.test, 160, 80)
    dataset = f"npz:{tmp_path / 'small.npz'}"
    root = tmp_path / "root"
    fastsitch.train("R1111", dataset=dataset, width=32, epochs=1, root=root)
    folder = Root.at(root).models(dataset)
    again: list[str | Path] = ["train", "R1111", "--dataset", dataset, "--width", "32", "--epochs", "2", "--force"]
    for _ in range(2):
        newest = max(path.stat().st_mtime_ns for path in folder.iterdir())
        process = subprocess.Popen(
            cli_line(*again, "--root", root),
            cwd=tmp_path,
            env=cli_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not any(
            path.suffix == ".partial" or path.stat().st_mtime_ns > newest
            for path in folder.glob("*.safetensors*")
            if path.exists()
        ):
            time.sleep(0.0005)
        time.sleep(seed.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        (entry,) = fastsitch.inventory.networks(Root.at(root))
        assert load_network(folder, NetworkName.parse("R1111")).record == entry.record
        assert entry.record.recipe["epochs"] in (1, 2)
