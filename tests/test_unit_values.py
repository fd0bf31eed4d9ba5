"""Matrices of a unit that no training gives, and units that do not say what they depend on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastsitch
from fastsitch.checked_files import read_npz
from fastsitch.errors import RunError
from fastsitch.files import write_npz
from tests.written_runs import written_run

ACCURACIES = {("R1111", "R1111", "T2T", seed): np.full((5, 5), 0.5) for seed in (0, 1)}


def changed(path: Path, change: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    arrays = {name: array for name, array in read_npz(path).items() if name not in without}
    write_npz(path, {**arrays, **change})


def with_value(value: float) -> np.ndarray:
    matrix = np.full((5, 5), 0.5)
    matrix[1, 2] = value
    return matrix


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": np.zeros((5, 5), np.int8)}, r"status of cell \(0, 0\) is 0"),
        ({"status": np.full((5, 5), 9, np.int8)}, r"status of cell \(0, 0\) is 9"),
        ({"status": np.ones((5, 5), np.int64)}, "status is int64 .*: expected i1"),
        ({"loss": np.ones((5, 5), np.float16)}, "loss is float16 .*: expected f8"),
        ({"loss": with_value(np.inf)}, r"loss of cell \(1, 2\) is inf, with status 1"),
        ({"loss": with_value(-1)}, r"loss of cell \(1, 2\) is -1"),
        ({"train_loss": with_value(np.nan)}, r"train_loss of cell \(1, 2\) is nan"),
        ({"accuracy": with_value(1.5)}, r"accuracy of cell \(1, 2\) is 1.5, with status 1"),
        ({"accuracy": with_value(-0.1)}, r"accuracy of cell \(1, 2\) is -0.1"),
        ({"accuracy": with_value(np.nan)}, r"accuracy of cell \(1, 2\) is nan, with status 1"),
        ({"status": with_value(2).clip(1).astype(np.int8)}, r"accuracy of cell \(1, 2\) is 0.5, with status 2"),
    ],
)
def test_values_that_no_training_gives_are_not_believed(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    run = written_run(tmp_path / "runs" / "cifar10" / "run", ACCURACIES)
    unit = run.units[0]
    assert run.intact(unit)
    changed(run.path / "units" / f"{unit.name}.npz", change)
    with pytest.raises(RunError, match=rf"seed0\.npz is damaged \({message}"):
        run.matrix("R1111", "R1111", "accuracy")
    with pytest.raises(RunError, match="is damaged"):
        fastsitch.export_run(run, tmp_path / "out")
    assert not run.intact(unit)
    assert run.intact(run.units[1])


def test_cells_that_were_not_asked_for_and_those_that_diverged_are_as_they_were_written(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", {("R1111", "R1111", "T2T", 0): with_value(np.nan)})
    assert run.matrix("R1111", "R1111", "status")[1, 2] == 2
    assert np.isnan(run.matrix("R1111", "R1111", "accuracy")[1, 2])
    changed(run.path / "units" / f"{run.units[0].name}.npz", {"status": np.ones((5, 5), np.int8)})
    with pytest.raises(RunError, match=r"accuracy of cell \(1, 2\) is nan, with status 1"):
        run.matrix("R1111", "R1111", "accuracy")


@pytest.mark.parametrize("missing", ["inputs", "stitches_hash"])
def test_a_unit_that_does_not_say_what_it_depends_on_is_said_once(
    missing: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = written_run(tmp_path / "run", ACCURACIES)
    for unit in run.units:
        changed(run.path / "units" / f"{unit.name}.npz", {}, without=(missing,))
    assert (run.matrix("R1111", "R1111", "accuracy") == 0.5).all()
    run.matrix("R1111", "R1111", "loss")
    (record,) = caplog.records
    assert "of run run does not record what it depends on, as in version 0.1" in record.getMessage()
