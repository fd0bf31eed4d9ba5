"""How a sweep connects representations of different kinds is chosen by name and recorded, never silently."""

import json
from pathlib import Path

import numpy as np
import pytest

import fastsitch
from fastsitch.data import Dataset
from fastsitch.errors import ConfigError, RunError
from fastsitch.runs.run import Run
from fastsitch.runs.sweep_config import SweepConfig, sweep_config
from tests.conftest import Command

OPTIONS = {"recipe": "small", "epochs": 1, "batch_size": 16}


@pytest.fixture(scope="module")
def root(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with R1111 trained on images of 20x20, whose maps are 20, 20, 10, 5 and 3 wide."""
    folder = tmp_path_factory.mktemp("rules")
    np.savez(
        folder / "small.npz",
        x_train=fashion.train.images[:160, 6:26, 6:26].numpy(),
        y_train=fashion.train.labels[:160].numpy(),
        x_test=fashion.test.images[:40, 6:26, 6:26].numpy(),
        y_test=fashion.test.labels[:40].numpy(),
    )
    fastsitch.train("R1111", dataset=f"npz:{folder / 'small.npz'}", width=4, epochs=1, root=folder)
    return folder


@pytest.fixture(scope="module")
def run(root: Path) -> Run:
    return fastsitch.sweep("R1111", "R1111", root=root, run="area", resample="area", **OPTIONS)


def pair_line(root: Path, *more: str) -> tuple[str | Path, ...]:
    return ("sweep", "--senders", "R1111", "--receivers", "R1111", "--batch-size", "16", "--root", root, *more)


def test_the_command_line_refuses_other_sizes_with_one_line_that_names_the_choices(
    root: Path, run_cli: Command
) -> None:
    for more in ((), ("--dry-run",)):
        ended = run_cli(*pair_line(root, "--run", "none", *more))
        assert ended.returncode == 2
        (line,) = [line for line in ended.stderr.splitlines() if line.startswith("fastsitch: ")]
        assert ended.stderr.strip().endswith(line)
        assert "no stitch from 3x3 to 20x20" in line
        assert "--resample area or --resample bilinear" in line
    assert not list(root.glob("runs/*/none"))


def test_a_dry_run_names_the_kinds(root: Path, run_cli: Command) -> None:
    ended = run_cli(*pair_line(root, "--dry-run", "--resample", "bilinear", "--class-token", "mean"))
    assert ended.returncode == 0, ended.stderr
    # from and to 3x3, but for 3x3 itself
    assert "8 bilinear" in ended.stdout
    ended = run_cli(*pair_line(root, "--dry-run", "--resample", "nearest"))
    assert ended.returncode == 2
    assert "--resample nearest: expected one of none, area, bilinear" in ended.stderr


def test_a_run_records_how_it_was_made(run: Run, root: Path, tmp_path: Path) -> None:
    assert (run.matrix("R1111", "R1111", "status") == 1).all()
    recorded = json.loads((run.path / "run.json").read_text())["config"]
    assert recorded["resample"] == "area"
    assert "class_token" not in recorded
    assert Run.open(run.path).config == run.config
    fastsitch.export_run(run, tmp_path)
    sidecar = json.loads((tmp_path / "R1111--R1111.T2T.json").read_text())
    assert sidecar["rules"] == {"resample": "area", "class_token": "sender"}
    with pytest.raises(RunError, match="resample is area there, bilinear was asked for"):
        fastsitch.sweep("R1111", "R1111", root=root, run="area", resample="bilinear", **OPTIONS)
    with pytest.raises(RunError, match="class_token is sender there, mean was asked for"):
        fastsitch.sweep("R1111", "R1111", root=root, run="area", resample="area", class_token="mean", **OPTIONS)


def test_matching_images_and_errors_follow_the_rules_of_the_run(run: Run, root: Path, tmp_path: Path) -> None:
    matched = fastsitch.sweep("R1111", "R1111", root=root, run="match", resample="bilinear", loss="match")
    error = matched.matrix("R1111", "R1111", "matched_error")
    assert np.isfinite(error).all()
    assert (np.diag(error) < 1e-8).all()
    trained = fastsitch.sweep(
        "R1111", "R1111", root=root, run="sgd", resample="bilinear", loss="match", solver="sgd", **OPTIONS
    )
    assert (trained.matrix("R1111", "R1111", "matched_error") >= error - 1e-9).all()
    fastsitch.measure_errors(run)
    assert np.isfinite(fastsitch.read_errors(run, "R1111", "R1111").EV).all()
    assert fastsitch.images("area", count=2, root=root, out=tmp_path)


def test_configurations_without_rules_have_the_hashes_they_had() -> None:
    config = sweep_config(dataset="fashion-mini", senders="R1111", receivers="R1112")
    assert config.hash.startswith(HASH_OF_THEN)
    assert not {"resample", "class_token"} & config.to_dict().keys()
    assert SweepConfig.from_dict(config.to_dict()) == config
    for option, value in (("resample", "area"), ("class_token", "zero")):
        other = sweep_config(dataset="fashion-mini", senders="R1111", receivers="R1112", **{option: value})
        assert other.hash != config.hash
        assert SweepConfig.from_dict(json.loads(json.dumps(other.to_dict()))) == other
    with pytest.raises(ConfigError, match="class_token='first': expected one of sender, mean, zero"):
        sweep_config(dataset="fashion-mini", senders="R1111", receivers="R1112", class_token="first")


HASH_OF_THEN = "fe983f72a16fe60d"
"""Hash of this configuration before there were any rules: runs made then can be continued."""
