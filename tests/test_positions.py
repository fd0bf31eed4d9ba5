"""A sweep of some positions: their cells are those of the whole sweep, all others stay undone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import fastsitch
from fastsitch.analysis.best_match import run_best_matches
from fastsitch.analysis.error_tables import error_table
from fastsitch.analysis.leftover_statistics import leftover_accuracy
from fastsitch.analysis.stitch_error_files import read_run_errors
from fastsitch.analysis.triangle import triangle
from fastsitch.cli.run_summary import summary
from fastsitch.data import Dataset
from fastsitch.errors import ConfigError, RunError
from fastsitch.machine import resolve_device
from fastsitch.root import Root
from fastsitch.runs.run import Run
from fastsitch.runs.sweep_config import SweepConfig, sweep_config
from fastsitch.runs.sweep_plan import chosen_positions
from tests.conftest import Command, save_npz
from tests.written_runs import written_run

OPTIONS = {"recipe": "small", "epochs": 1, "batch_size": 16, "precision": "fp64"}
PAIR = ("R1111", "R1112")
POSITIONS = "layer*.1,stem,layer3.?"

ASKED = np.zeros((5, 6), bool)
"""Stem and layer3.0 of R1111; stem, layer3.0 and layer4.1 of R1112."""
ASKED[np.ix_([0, 3], [0, 3, 5])] = True


@pytest.fixture(scope="module")
def root(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with R1111 and R1112 trained on 160 images."""
    folder = tmp_path_factory.mktemp("positions")
    save_npz(folder / "small.npz", fashion.train, fashion.test, 160, 80)
    fastsitch.train(*PAIR, dataset=f"npz:{folder / 'small.npz'}", width=4, epochs=1, root=folder)
    return folder


@pytest.fixture(scope="module")
def some(root: Path) -> Run:
    return fastsitch.sweep(*PAIR, root=root, run="some", positions=POSITIONS, seeds=[0, 1], **OPTIONS)


def matched(root: Path, **options: object) -> list[Run]:
    """The same sweep of all and of some positions."""
    name = "-".join(map(str, options.values()))
    options = {**OPTIONS, "recipe": "small", **options}
    return [
        fastsitch.sweep(
            *PAIR, root=root, run=f"{name}-{'all' if asked is None else 'some'}", positions=asked, **options
        )
        for asked in (None, POSITIONS)
    ]


def assert_cells_of(run: Run, whole: Run, rtol: float) -> None:
    """What was asked for is as in the whole run, the rest is NaN with status 0."""
    for metric in run.metrics:
        values = run.matrix(*PAIR, metric)
        assert values.shape == ASKED.shape
        if metric == "status":
            assert np.array_equal(values, ASKED)
        else:
            assert np.isnan(values[~ASKED]).all()
            np.testing.assert_allclose(values[ASKED], whole.matrix(*PAIR, metric)[ASKED], rtol=rtol, err_msg=metric)


@pytest.mark.slow
def test_cells_are_those_of_the_whole_sweep(some: Run, root: Path) -> None:
    whole = fastsitch.sweep(*PAIR, root=root, run="whole", seeds=[0, 1], **OPTIONS)
    assert_cells_of(some, whole, rtol=1e-10)
    unit = some.units[1]
    assert set(some.stitches(unit)) == set(some.cells(some.units[1])) < set(whole.stitches(unit))
    for cell, stitch in some.stitches(unit).items():
        for mine, other in zip(stitch, whole.read_stitch(cell), strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "match"},
        {"init": "matched"},
        {"init": "matched", "optimizer": "preconditioned"},
        {"loss": "match", "solver": "sgd"},
    ],
    ids=" ".join,
)
def test_matched_stitches_are_those_of_the_whole_sweep(options: dict[str, object], root: Path) -> None:
    whole, partial = matched(root, **options)
    # solved side by side with other cells, or not: rounding in fp64
    assert_cells_of(partial, whole, rtol=1e-6)


def test_a_run_is_only_continued_with_its_positions(some: Run, root: Path) -> None:
    recorded = json.loads((some.path / "run.json").read_text())["config"]
    assert recorded["positions"] == ["layer*.1", "stem", "layer3.?"]
    assert Run.open(some.path).config == some.config
    file = some.path / "units" / f"{some.units[1].name}.npz"
    before, accuracy = file.read_bytes(), some.matrix(*PAIR)
    file.unlink()
    assert (some.matrix(*PAIR, "status") == 0).all()
    options = {"root": root, "run": "some", "seeds": [0, 1], **OPTIONS}
    fastsitch.sweep(*PAIR, positions=["layer*.1", "stem", "layer3.?"], **options)
    assert file.read_bytes() == before
    assert np.array_equal(some.matrix(*PAIR), accuracy, equal_nan=True)
    there = re.escape("positions is layer*.1,stem,layer3.? there")
    for other, asked in ((None, "all"), ("stem", "stem")):
        with pytest.raises(RunError, match=f"{there}, {asked} was asked for"):
            fastsitch.sweep(*PAIR, positions=other, **options)


def test_unknown_positions_are_refused_before_anything_is_written(root: Path, run_cli: Command) -> None:
    line = ("sweep", "--senders", "R1111", "--receivers", "R1112", "--batch-size", "16", "--root", root, "--run", "no")
    for positions, message in (
        (
            "stem,layer5.*,Stem",
            "--positions stem,layer5.*,Stem: no network of the sweep has a position layer5.* or Stem; they have "
            "stem, layer1.0, layer2.0, layer3.0, layer4.0, layer4.1",
        ),
        (
            "layer*.1",
            "--positions layer*.1: a network has none of these: R1111 has stem, layer1.0, layer2.0, layer3.0, layer4.0",
        ),
        (" , ", "--positions (none): expected names or patterns such as layer*.0; leave it out for all"),
    ):
        for more in ((), ("--dry-run",)):
            ended = run_cli(*line, "--positions", positions, *more)
            assert ended.returncode == 2
            (said,) = [said for said in ended.stderr.splitlines() if said.startswith("fastsitch: ")]
            assert said == f"fastsitch: {message}"
    assert not list(root.glob("runs/*/no"))
    with pytest.raises(ConfigError, match="^positions='0': no network of the sweep has a position 0; they have stem, "):
        fastsitch.estimate(*PAIR, root=root, batch_size=16, positions=[0])


def test_a_dry_run_counts_the_cells_asked_for(root: Path, run_cli: Command) -> None:
    for loss in ({}, {"loss": "match"}, {"init": "matched"}, {"loss": "match", "solver": "sgd"}):
        options = {"root": root, "recipe": "small", "batch_size": 16, **loss}
        whole = fastsitch.estimate(*PAIR, **options)
        some = fastsitch.estimate(*PAIR, positions=POSITIONS, **options)
        assert (whole.cells, some.cells) == (30, 6)
        (unit,) = some.units
        assert unit.kinds == {"equal": 2, "down 4": 1, "down 8": 1, "up 4": 1, "down 2": 1}
        # 4 and 16 channels into 4, 16 and 32
        assert unit.parameters == 5 * 4 + (4 * 16 + 1) * 16 + (4 * 64 + 1) * 32 + 17 * (4 + 16) + (16 * 4 + 1) * 32
        assert 0 < unit.flops < whole.units[0].flops
        assert unit.exact_flops < whole.units[0].exact_flops or not whole.units[0].exact_flops
    ended = run_cli(
        *("sweep", "--senders", "R1111", "--receivers", "R1112", "--batch-size", "16", "--root", root, "--dry-run"),
        *("--positions", POSITIONS),
    )
    assert ended.returncode == 0, ended.stderr
    assert "1 unit, 6 cells" in ended.stdout


def test_errors_and_tables_are_of_the_cells_asked_for(some: Run, root: Path, tmp_path: Path, run_cli: Command) -> None:
    fastsitch.measure_errors(some, root=root)
    whole = fastsitch.sweep(*PAIR, root=root, run="whole", seeds=[0, 1], **OPTIONS)
    fastsitch.measure_errors(whole, root=root)
    for split in ("train", "test"):
        mine, other = (fastsitch.read_errors(run, *PAIR, split=split) for run in (some, whole))
        for name in ("EV", "ES", "SV"):
            values = getattr(mine, name)
            assert np.array_equal(np.isnan(values), ~ASKED)
            np.testing.assert_allclose(values[ASKED], getattr(other, name)[ASKED], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(mine.variance[[0, 3, 5]], other.variance[[0, 3, 5]], rtol=1e-10)
        assert np.isnan(mine.variance[[1, 2, 4]]).all()
    errors = read_run_errors(some)
    for diagonal, count in ((True, 2), (False, 6)):
        for normalised in (False, True):
            table = error_table(errors, diagonal=diagonal, normalised=normalised)
            assert (table.cells, table.left_out) == ({"T2T": count}, {"T2T": 0})
            assert np.isfinite(list(table.entries["T2T"]["mean"].values())).all()
    # a diverged cell counts as one
    errors[*PAIR, "T2T"].EV[0, 3] = np.nan
    assert error_table(errors, diagonal=False).left_out == {"T2T": 1}
    ended = run_cli("tables", "some", "--root", root, "--out", tmp_path / "tables")
    assert ended.returncode == 0, ended.stderr


def test_summary_triangle_export_and_plots_leave_the_other_cells_out(
    some: Run, root: Path, tmp_path: Path, run_cli: Command
) -> None:
    assert "6/6" in summary(some)
    accuracy = some.matrix(*PAIR)
    # of the cells asked for, (0, 0), (3, 0) and (3, 3) lie in the lower left
    assert triangle(accuracy).lower_left == pytest.approx(accuracy[[0, 3, 3], [0, 0, 3]].mean())
    assert triangle(accuracy).rest == pytest.approx(accuracy[[0, 0, 3], [3, 5, 5]].mean())
    fastsitch.export_run(some, tmp_path)
    with np.load(tmp_path / "R1111--R1112.T2T.npz") as exported:
        assert np.array_equal(exported["status"], ASKED)
        assert np.array_equal(np.isfinite(exported["accuracy_interval"]), ASKED)
    for line in (
        ("plot", "some", "--out", tmp_path),
        ("plot", "some", "--out", tmp_path, "--metric", "loss"),
        ("plot", "some", "--out", tmp_path, "--figure", "overview"),
    ):
        ended = run_cli(*line, "--root", root)
        assert ended.returncode == 0, ended.stderr


def test_compare_averages_the_cells_asked_for(root: Path, run_cli: Command) -> None:
    """For a pair that the paper has."""
    fastsitch.sweep("R1111", "R1111", root=root, run="itself", positions="layer[13].0", **OPTIONS)
    ended = run_cli("compare", "itself", "--root", root)
    assert ended.returncode == 0, ended.stderr
    assert "over 4 of 25 cells" in ended.stdout


def test_images_are_of_the_sender_positions_asked_for(some: Run, root: Path, tmp_path: Path) -> None:
    fastsitch.images("some", count=2, root=root, out=tmp_path)
    with np.load(tmp_path / "R1111--R1112.T2T.npz") as drawn:
        assert drawn["sender_positions"].tolist() == ["stem", "layer3.0"]
        assert drawn["vanilla"].shape[:2] == (2, 2)
        assert np.isfinite(drawn["matched"]).all()
    # kept with the run: not trained again
    assert fastsitch.images("some", count=3, root=root, out=tmp_path)


def test_leftover_statistics_are_used_in_the_cells_of_both_runs(root: Path) -> None:
    vanilla = fastsitch.sweep(*PAIR, root=root, run="batch", positions=POSITIONS, receiver_bn="batch", **OPTIONS)
    exact = fastsitch.sweep(*PAIR, root=root, run="exact", positions="stem,layer4.*", loss="match", **OPTIONS)
    device = resolve_device("cpu")
    (found,) = leftover_accuracy(Root.at(root), vanilla, exact, device=device).values()
    assert np.argwhere(np.isfinite(found)).tolist() == [[0, 0], [0, 5]]
    other = fastsitch.sweep(*PAIR, root=root, run="other", positions="layer1.0", loss="match", **OPTIONS)
    with pytest.raises(RunError, match="expected runs of the same pairs and positions"):
        leftover_accuracy(Root.at(root), vanilla, other, device=device)


def test_best_matches_count_the_rows_asked_for(tmp_path: Path) -> None:
    matrix = np.full((5, 6), np.nan)
    matrix[np.ix_([0, 3, 4], [0, 3])] = [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]
    run = written_run(tmp_path / "written", {(*PAIR, "T2T", 0): matrix})
    row = run_best_matches(run, epsilons=(0.0,))[0]
    # three rows, two columns
    assert (row.possible, row.counted) == (0, 1)
    matrix[4] = np.nan
    run = written_run(tmp_path / "again", {(*PAIR, "T2T", 0): matrix})
    row = run_best_matches(run, epsilons=(0.0,))[0]
    assert (row.possible, row.rows.value, row.pairs.value) == (1, 1.0, 1.0)


@pytest.mark.slow
def test_positions_without_a_stitch_can_be_left_out(fashion: Dataset, tmp_path: Path) -> None:
    """Maps of 20, 20, 10, 5 and 3: the last one joins none of the others."""
    np.savez(
        tmp_path / "odd.npz",
        x_train=fashion.train.images[:160, 6:26, 6:26].numpy(),
        y_train=fashion.train.labels[:160].numpy(),
        x_test=fashion.test.images[:40, 6:26, 6:26].numpy(),
        y_test=fashion.test.labels[:40].numpy(),
    )
    fastsitch.train("R1111", dataset=f"npz:{tmp_path / 'odd.npz'}", width=4, epochs=1, root=tmp_path)
    for options in ({}, {"loss": "match"}):
        options = {"root": tmp_path, "group_size": 3, **OPTIONS, **options}
        with pytest.raises(ConfigError, match="no stitch from"):
            fastsitch.estimate("R1111", "R1111", **options)
        options = {**options, "positions": "stem,layer[123].0"}
        assert fastsitch.estimate("R1111", "R1111", **options).cells == 16
        run = fastsitch.sweep("R1111", "R1111", **options)
        assert (run.matrix("R1111", "R1111", "status") == np.pad(np.ones((4, 4)), (0, 1))).all()
        assert fastsitch.estimate("R1111", "R1111", **{**options, "positions": "layer4.0"}).cells == 1


def test_a_configuration_without_positions_is_unchanged() -> None:
    config = sweep_config(dataset="fashion-mini", senders="R1111", receivers="R1112")
    assert "positions" not in config.to_dict()
    assert SweepConfig.from_dict(config.to_dict()) == config
    some = sweep_config(dataset="fashion-mini", senders="R1111", receivers="R1112", positions="stem, stem,layer*.0")
    assert some.positions == ("stem", "layer*.0")
    assert some.hash != config.hash
    assert SweepConfig.from_dict(json.loads(json.dumps(some.to_dict()))) == some


def test_patterns_match_whole_names_and_their_case() -> None:
    names = ["stem", "layer1.0", "layer1.1", "layer10.0"]
    assert chosen_positions(names, []) == [0, 1, 2, 3]
    assert chosen_positions(names, ["layer1.0"]) == [1]
    assert chosen_positions(names, ["layer1.[!1]", "stem", "*1.1"]) == [0, 1, 2]
    assert chosen_positions(names, ["Stem", "layer1"]) == []
