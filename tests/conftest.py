"""Fixtures: a few real images, small networks, and the command line as a user runs it."""

import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsitch.cli import main, progress_display
from fastsitch.data import Dataset, Split, load_dataset
from fastsitch.identity import torch_generator
from fastsitch.network_names import BLOCKS
from fastsitch.networks.resnet import SmallResNet, initialise
from tests.processes import Ended, RunningCommand

torch.set_num_threads(1)

Command = Callable[..., Ended]


@pytest.fixture(scope="session")
def fashion() -> Dataset:
    """The embedded data set."""
    return load_dataset("fashion-mini", Path("unused"))


@pytest.fixture(scope="session")
def images(fashion: Dataset) -> torch.Tensor:
    """Twelve real images, normalised, fp64 (12, 3, 32, 32)."""
    return fashion.normalisation.apply(fashion.train.images[:12], torch.float64)


@pytest.fixture
def small_npz(fashion: Dataset, tmp_path: Path) -> Path:
    """A data set of 160 + 80 real images as an npz file."""
    path = tmp_path / "small.npz"
    save_npz(path, fashion.train, fashion.test, 160, 80)
    return path


def save_npz(path: Path, train: Split, test: Split, trained: int, tested: int) -> None:
    """Write the first images of both splits, grey and 28x28 as they came."""
    np.savez(
        path,
        x_train=train.images[:trained, 2:30, 2:30, 0].numpy(),
        y_train=train.labels[:trained].numpy(),
        x_test=test.images[:tested, 2:30, 2:30, 0].numpy(),
        y_test=test.labels[:tested].numpy(),
    )


def network(
    architecture: str,
    seed: int = 0,
    width: int = 4,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (3, 32, 32),
) -> SmallResNet:
    """An untrained network in fp64 and eval mode whose BatchNorm is not the identity."""
    chain = SmallResNet(BLOCKS[architecture], width=width, classes=classes, input_shape=input_shape)
    generator = torch_generator("test network", architecture, seed)
    initialise(chain, generator)
    for module in chain.modules():
        if isinstance(module, torch.nn.Conv2d):
            # signals and gradients of about the same size at every position, so that nothing hides in small numbers
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=generator)
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
            ):
                torch.nn.init.uniform_(tensor, low, high, generator=generator)
    return chain.double().eval()


@pytest.fixture
def run_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``fastsitch`` as a user would, in an empty working directory, but in this process.

    Importing torch takes longer than most of the work.
    """
    (tmp_path / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")
    for name in [name for name in os.environ if name.startswith("FASTSITCH_")]:
        monkeypatch.delenv(name)
    logger = logging.getLogger("fastsitch")

    def run(*arguments: str | Path) -> Ended:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["fastsitch", *map(str, arguments)])
            # what show_log changes is as it was afterwards
            patch.setattr(logger, "handlers", logger.handlers)
            patch.setattr(logger, "propagate", logger.propagate)
            level = logger.level
            progress_display.show_log()
            try:
                code = main._run()
            finally:
                logger.setLevel(level)
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture
def hub_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches of the libraries of Hugging Face, ``prepared`` and ``hub``, and no network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "prepared")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def run_process(tmp_path: Path) -> Command:
    """Run ``fastsitch`` in an empty working directory, in a process of its own."""
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)

    def run(*arguments: str | Path) -> Ended:
        return RunningCommand(*arguments, cwd=folder).ended()

    return run


def cli_line(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fastsitch.cli.main", *map(str, arguments)]


def cli_environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FASTSITCH_")}
    return {**kept, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    """A user's file with a network factory, ``small``: a copy of tests/network_factories.py."""
    return Path(shutil.copy(Path(__file__).with_name("network_factories.py"), tmp_path))


@pytest.fixture
def few(fashion: Dataset, tmp_path: Path) -> str:
    """The name of a data set of 160 + 64 real images in a file."""
    save_npz(tmp_path / "few.npz", fashion.train, fashion.test, 160, 64)
    return f"npz:{tmp_path / 'few.npz'}"
