"""Sweeps with --receiver-bn batch: dry run, results, resume, export, and statistics reused for matched stitches."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastsitch
from fastsitch.analysis.leftover_statistics import leftover_accuracy
from fastsitch.data import Dataset, load_dataset
from fastsitch.errors import ConfigError, RunError
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network
from fastsitch.networks.resnet import position_shapes
from fastsitch.planning.group_memory import StepKind, group_memory, statistics_bytes
from fastsitch.progress import Progress
from fastsitch.root import Root
from fastsitch.runs.run import Run
from fastsitch.runs.sweep_config import sweep_config
from fastsitch.stitching.cells import Cell, Unit
from tests.conftest import Command, save_npz
from tests.test_batch_statistics import Stitched
from tests.test_engine import CPU

PAIR = ["--senders", "R1111", "--receivers", "R1112", "--epochs", "1", "--batch-size", "16"]
OPTIONS = {"recipe": "small", "epochs": 1, "batch_size": 16}


@pytest.fixture(scope="module")
def root(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with R1111 and R1112 trained on 160 images."""
    folder = tmp_path_factory.mktemp("receiver-bn")
    save_npz(folder / "small.npz", fashion.train, fashion.test, 160, 80)
    fastsitch.train("R1111", "R1112", dataset=f"npz:{folder / 'small.npz'}", width=4, epochs=1, root=folder)
    return folder


@pytest.fixture(scope="module")
def vanilla(root: Path) -> Run:
    return fastsitch.sweep(
        "R1111", "R1112", receiver_bn="batch", settings="T2T,T2R", precision="fp64", run="v", root=root, **OPTIONS
    )


def unit_of(setting: str, loss: str = "task") -> Unit:
    return Unit(sender="R1111", receiver="R1112", setting=setting, loss=loss, seed=0)


@pytest.mark.slow
def test_a_sweep_is_resumed_and_exported_from_the_command_line(root: Path, run_cli: Command, tmp_path: Path) -> None:
    line = ["sweep", *PAIR, "--receiver-bn", "batch", "--compile", "on", "--run", "line", "--root", root]
    swept = run_cli(*line)
    assert swept.returncode == 0, swept.stderr
    assert swept.stderr.count("compile off: with batch statistics the receiver's blocks run eagerly") == 1
    run = fastsitch.open_run("line", root=root)
    assert run.config.receiver_bn == "batch"
    assert (run.matrix("R1111", "R1112", "status") == 1).all()
    (results,) = (run.path / "units").glob("*.npz")
    kept = [file.read_bytes() for file in (results, results.with_suffix(".safetensors"))]
    results.unlink()
    assert run_cli(*line).returncode == 0
    assert [file.read_bytes() for file in (results, results.with_suffix(".safetensors"))] == kept
    assert "run line is done already" in run_cli(*line).stderr
    other = run_cli(*line[: line.index("--receiver-bn")], *line[line.index("--compile") :])
    assert other.returncode == 2
    assert "receiver_bn is batch there, frozen was asked for" in other.stderr
    assert run_cli("export", "line", "--out", tmp_path / "out", "--root", root).returncode == 0
    assert json.loads((tmp_path / "out" / "R1111--R1112.T2T.json").read_text())["receiver_bn"] == "batch"
    dry_run = run_cli(*line, "--dry-run")
    assert dry_run.returncode == 0, dry_run.stderr


def test_running_statistics_are_saved_with_the_stitches(vanilla: Run, root: Path) -> None:
    unit = unit_of("T2T")
    saved = load_file(vanilla.path / "units" / f"{unit.name}.safetensors")
    assert torch.equal(
        saved["1-1.block2.bn1.running_mean"], vanilla.read_statistics(Cell(unit, 1, 1))["block2.bn1.running_mean"]
    )
    cells = [(i, j) for i in range(5) for j in range(6)]
    kept = [vanilla.read_statistics(Cell(unit, i, j)) for i, j in cells]
    shapes = [position.shape for position in load_network(models(root), NetworkName.parse("R1112")).chain.positions]
    # as the disk's prediction counts them
    assert sum(4 * tensor.numel() for statistics in kept for tensor in statistics.values()) == statistics_bytes(
        cells, shapes
    )
    assert vanilla.read_statistics(Cell(unit, 3, 5)) == {}
    frozen = fastsitch.sweep("R1111", "R1112", run="frozen", root=root, **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="run 'frozen' has no running statistics: expected one made with receiver_bn"):
        frozen.read_statistics(Cell(unit, 1, 1))
    with pytest.raises(RunError, match=r"has no stitch \(9, 1\)"):
        vanilla.read_statistics(Cell(unit, 9, 1))
    with pytest.raises(RunError, match=r"R2R\.task\.seed0 of run 'v' is not done"):
        vanilla.read_statistics(Cell(unit_of("R2R"), 1, 1))


def models(root: Path) -> Path:
    return Root.at(root).models(f"npz:{root / 'small.npz'}")


@pytest.mark.parametrize("setting", ["T2T", "T2R"])
def test_a_saved_stitch_and_its_statistics_give_the_accuracy_in_the_matrix(
    setting: str, vanilla: Run, root: Path
) -> None:
    assert accuracies(root, setting, vanilla, vanilla, "task") == pytest.approx(
        vanilla.matrix("R1111", "R1112", setting=setting), abs=1.5 / 80
    )


def accuracies(root: Path, setting: str, run: Run, left: Run, loss: str) -> np.ndarray:
    """Accuracies of saved stitches, rebuilt in plain modules with the running statistics that another run left."""
    dataset = load_dataset(f"npz:{root / 'small.npz'}", root)
    receiver_name = "R1112" if setting == "T2T" else "R1112-random@1"
    sender, receiver = (
        load_network(models(root), NetworkName.parse(name)).chain.double() for name in ("R1111", receiver_name)
    )
    x = dataset.normalisation.apply(dataset.test.images).double()
    matrix = np.zeros((5, 6))
    for i, j in np.ndindex(5, 6):
        stitched = Stitched(Cell(unit_of(setting), i, j), sender, receiver)
        weight_FD, bias_D = run.read_stitch(Cell(unit_of(setting, loss), i, j))
        stitched.load(weight_FD, bias_D, left.read_statistics(Cell(unit_of(setting), i, j)))
        with torch.no_grad():
            matrix[i, j] = (stitched.logits(x).argmax(-1) == dataset.test.labels).double().mean().item()
    return matrix


@pytest.mark.slow
def test_matched_stitches_are_evaluated_with_the_statistics_that_vanilla_ones_left(vanilla: Run, root: Path) -> None:
    matched = fastsitch.sweep("R1111", "R1112", loss="match", settings="T2R,R2R", run="m", root=root)
    reports: list[Progress] = []
    found = leftover_accuracy(Root.at(root), vanilla, matched, device=CPU, report=reports.append)
    # done in both: T2R alone
    assert list(found) == [("R1111", "R1112", "T2R", 0)]
    assert [(progress.note, progress.done, progress.total) for progress in reports] == [(unit_of("T2R").name, 1, 1)]
    expected = accuracies(root, "T2R", matched, vanilla, "match")
    np.testing.assert_allclose(found["R1111", "R1112", "T2R", 0], expected, atol=1.5 / 80)
    accuracy = matched.matrix("R1111", "R1112", setting="T2R")
    np.testing.assert_allclose(expected[:, -1], accuracy[:, -1], atol=2.5 / 80)
    assert np.abs(expected[:, 0] - accuracy[:, 0]).max() > 2.5 / 80
    for runs, message in (
        ((matched, matched), "run 'm' has no running statistics"),
        ((vanilla, vanilla), "run 'v' has no matched stitches: expected one made with loss='match'"),
    ):
        with pytest.raises(RunError, match=message):
            leftover_accuracy(Root.at(root), *runs, device=CPU)
    other = fastsitch.sweep("R1112", "R1111", loss="match", run="n", root=root)
    with pytest.raises(RunError, match="no sender, receiver, setting and seed is done in both 'v' and 'n'"):
        leftover_accuracy(Root.at(root), vanilla, other, device=CPU)


def test_it_works_with_augmentation_and_a_matched_start(root: Path) -> None:
    run = fastsitch.sweep(
        "R1111",
        "R1111",
        receiver_bn="batch",
        init="matched",
        recipe="published-schedule",
        epochs=1,
        batch_size=32,
        run="published",
        root=root,
    )
    assert run.resolved.source == "live"
    assert (run.matrix("R1111", "R1111", "status") == 1).all()
    assert run.read_statistics(Cell(run.units[0], 0, 3)).keys() == {
        f"block4.{layer}.running_{what}" for layer in ("bn1", "bn2", "projection.1") for what in ("mean", "var")
    }


def test_values_that_cannot_work_are_refused() -> None:
    names = {"dataset": "cifar10", "senders": "R1111", "receivers": "R1112"}
    with pytest.raises(ConfigError, match="receiver_bn='train': expected one of frozen, batch"):
        sweep_config(**names, receiver_bn="train")
    with pytest.raises(ConfigError, match="receiver_bn='batch': matched stitches are not trained .* with loss='match'"):
        sweep_config(**names, receiver_bn="batch", loss="match")
    assert sweep_config(**names, receiver_bn="batch", init="matched").receiver_bn == "batch"
    assert sweep_config(**names).receiver_bn == "frozen"


def test_batch_statistics_need_more_memory() -> None:
    shapes = [shape for _, shape in position_shapes((1, 1, 1, 1), 16, (32, 32))]
    cells = [(i, j) for i in range(5) for j in range(5)]
    kinds = [StepKind(images=64, itemsize=2, device="cpu", batch_statistics=batch) for batch in (False, True)]
    frozen, batch = (group_memory(cells, shapes, shapes, kind) for kind in kinds)
    # what goes into each BatchNorm layer, instead of what leaves the inner ReLU: 2 tensors in the first block, else 3
    carried = [5, 10, 15, 20]
    more = sum(
        64 * 2 * stitches * channels * height * width * extra
        for stitches, (channels, height, width), extra in zip(carried, shapes[1:], (1, 2, 2, 2), strict=True)
    )
    assert batch - frozen == pytest.approx(more, rel=0.05)
