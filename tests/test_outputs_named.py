"""Where outputs go, and how what others have named is shown: on this machine, in one line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastsitch
from fastsitch.errors import ConfigError
from tests.conftest import Command
from tests.network_factories import small
from tests.test_places import without_privileges
from tests.written_runs import written_run


def written(root: Path, *names: str) -> None:
    for name in names:
        written_run(root / "runs" / "cifar10" / name, {("R1111", "R1111", "T2T", 0): np.full((5, 5), 0.5)})


@pytest.mark.parametrize("out", ["$UNDEFINED/x", "${UNDEFINED}", "s3://bucket/x", "file:///tmp/x", "file:x", "gs://x"])
@pytest.mark.parametrize("command", ["export", "plot", "demo", "paper", "tables", "images", "bench"])
def test_outputs_are_folders_on_this_machine(out: str, command: str, tmp_path: Path, run_cli: Command) -> None:
    root = tmp_path / "root"
    written(root, "run")
    line = [command] if command in ("demo", "paper", "bench") else [command, "run"]
    option, kind = ("--json", "file") if command == "bench" else ("--out", "folder")
    ended = run_cli(*line, option, out, "--root", root)
    assert ended.returncode == 2, ended
    assert ended.stderr.count("\n") == 1
    problem = f"is not set; expected the name of a {kind}" if "$" in out else f"is an address: expected a {kind} on"
    assert f"{option} {out}" in ended.stderr
    assert problem in ended.stderr
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("option", ["--root", "--data-dir"])
def test_roots_are_folders_on_this_machine(option: str, tmp_path: Path, run_cli: Command) -> None:
    for place in ("$UNDEFINED/x", "s3://bucket/x"):
        ended = run_cli("train", "R1111", option, place)
        assert ended.returncode == 2
        assert f"{option} {place}" in ended.stderr
    assert not list((tmp_path / "work").iterdir())
    os.environ["FASTSITCH_PLACE"] = str(tmp_path / "set")
    try:
        assert run_cli("list", "--root", tmp_path).returncode == 0
        written(tmp_path / "root", "run")
        ended = run_cli("export", "run", "--root", tmp_path / "root", "--out", "$FASTSITCH_PLACE/x")
        assert ended.returncode == 0, ended.stderr
    finally:
        del os.environ["FASTSITCH_PLACE"]
    assert list((tmp_path / "set" / "x").glob("*.npz"))


@pytest.mark.parametrize("command", ["export", "plot", "demo", "paper", "images"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    command: str, tmp_path: Path, run_cli: Command
) -> None:
    root = tmp_path / "root"
    written(root, "run")
    (tmp_path / "closed").mkdir(mode=0o555)
    line = [command] if command in ("demo", "paper") else [command, "run"]
    with without_privileges():
        ended = run_cli(*line, "--out", tmp_path / "closed" / "out", "--root", root)
    assert ended.returncode == 2, ended
    assert f"cannot use --out {tmp_path}/closed/out (Permission denied)" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (root / "models").exists()


def test_a_json_file_of_another_run_is_not_replaced(tmp_path: Path) -> None:
    written(tmp_path, "first", "second")
    first, second = (fastsitch.open_run(name, root=tmp_path) for name in ("first", "second"))
    (matrices,) = fastsitch.export_run(first, tmp_path / "out")
    matrices.unlink()
    sidecar = matrices.with_suffix(".json")
    with pytest.raises(ConfigError, match=r"json shows matrices of run first on cifar10, not matrices of run second"):
        fastsitch.export_run(second, tmp_path / "out")
    assert json.loads(sidecar.read_text())["run"] == "first"
    fastsitch.export_run(first, tmp_path / "out")
    sidecar.write_text("no JSON")
    fastsitch.export_run(first, tmp_path / "out")
    assert json.loads(sidecar.read_text())["run"] == "first"


FACTORY = """
from torch import nn

Odd = type("Odd\\nname\\x1b[31m", (nn.Sequential,), {})

def network(classes):
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Odd(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), pool, nn.Linear(8, classes), nn.Tanh())

def unfit(classes):
    return Odd(nn.Linear(3, classes))
"""


def test_names_of_classes_and_files_are_shown_in_one_line(few: str, tmp_path: Path, run_cli: Command) -> None:
    folder = tmp_path / "a\nb\x1b[31m"
    folder.mkdir()
    (folder / "nets.py").write_text(FACTORY)
    where = ["--dataset", few, "--root", tmp_path / "root"]
    added = run_cli("add", "net", "--from", f"{folder}/nets.py:network", *where)
    assert added.returncode == 0, added.stderr
    assert "the Odd?name?[31m ends in tanh" in added.stderr
    assert "a?b?[31m/nets.py:network" in added.stdout
    refused = run_cli("add", "other", "--from", f"{folder}/nets.py:unfit", *where)
    assert refused.returncode == 2
    listed = run_cli("list", "--root", tmp_path / "root")
    assert "a?b?[31m/nets.py:network" in listed.stdout
    for shown, lines in ((added.stderr, 1), (refused.stderr, 1)):
        assert shown.count("\n") == lines
    for shown in (added.stdout, added.stderr, refused.stderr, listed.stdout):
        assert "\x1b" not in shown


def test_names_of_weights_are_shown_in_one_line(few: str, factory: Path, tmp_path: Path, run_cli: Command) -> None:
    state = small(10, (3, 32, 32)).state_dict()
    save_file(
        {f"a\nb\x1b[31m{k}.{name}": torch.ones(2) for k in range(9) for name in state}, tmp_path / "w.safetensors"
    )
    ended = run_cli(
        "add", "net", "--from", f"{factory}:small", "--weights", tmp_path / "w.safetensors", "--dataset", few
    )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "a?b?[31m" in ended.stderr
    assert "\x1b" not in ended.stderr
    # a line to paste stays one of its own
    assert "train first with\n  fastsitch train R1111" in run_cli("precompute", "R1111", "--dataset", few).stderr
