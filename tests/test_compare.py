"""Comparison of a run with the published matrices."""

import re
from pathlib import Path

import numpy as np
import pytest

from fastsitch.analysis.compare_published import compare_run, ranks, scale_reason, spearman
from fastsitch.analysis.published import published_accuracies, published_matrices
from fastsitch.errors import RunError
from fastsitch.network_names import BLOCKS
from fastsitch.networks.resnet import position_shapes
from fastsitch.report.comparison import comparison_text
from tests.conftest import Command
from tests.written_runs import written_run

PUBLISHED = {
    (matrix.source, matrix.sender, matrix.receiver, matrix.setting): matrix.accuracy for matrix in published_matrices()
}
FIGURE = PUBLISHED["Figure 2", "R1111", "R1111", "T2T"]
LOGS = PUBLISHED["the authors' logs", "R1111", "R1111", "T2T"]


@pytest.mark.parametrize(
    "matrix", published_matrices(), ids=lambda m: f"{m.source} {m.sender} {m.receiver} {m.setting}"
)
def test_published_matrices_have_the_positions_of_the_networks(matrix) -> None:  # type: ignore[no-untyped-def]
    shape = tuple(len(position_shapes(BLOCKS[name], 64, (32, 32))) for name in (matrix.sender, matrix.receiver))
    assert matrix.accuracy.shape == shape
    assert ((matrix.accuracy > 0) & (matrix.accuracy < 1)).all()


def test_everything_published_is_read() -> None:
    matrices = published_matrices()
    assert [sum(matrix.source == source for matrix in matrices) for source in ("Figure 2", "Figure 5")] == [4, 1]
    assert [matrix.matched for matrix in matrices].count(True) == 1
    assert sorted(published_accuracies()) == sorted(name for name in BLOCKS if name.startswith("R1") or name[1] == "2")


def test_ranks_and_their_correlation_by_hand() -> None:
    assert ranks(np.array([0.3, 0.1, 0.3, 0.9])).tolist() == [2.5, 1, 2.5, 4]
    a = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert spearman(a, a**3) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    # without ties 1 - 6 sum d^2 / (n (n^2 - 1)): d = 1, 1, 1, 1, 0
    assert spearman(a, np.array([2.0, 1.0, 4.0, 3.0, 5.0])) == pytest.approx(1 - 6 * 4 / 120)
    # with ties Pearson's over mean ranks: (1.5, 1.5, 3) and (1, 2, 3)
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(1.5 / np.sqrt(1.5 * 2))
    assert np.isnan(spearman(a, np.ones(5)))
    assert np.isnan(spearman(a[:1], a[:1]))


def test_a_run_of_the_published_kind_is_compared_in_full(tmp_path: Path) -> None:
    accuracy = FIGURE + 0.01
    accuracy[0, 1] = np.nan
    run = written_run(tmp_path / "run", {("R1111", "R1111", "T2T", 0): accuracy})
    comparison = compare_run(run)
    assert comparison.reason == ""
    assert comparison.accuracies == {"R1111": (0.9347, 0.9)}
    figure, logs = comparison.matrices
    assert [figure.published.source, logs.published.source] == ["Figure 2", "the authors' logs"]
    assert (figure.cells, figure.rank_correlation) == (24, pytest.approx(1))
    assert figure.mean_difference == pytest.approx(0.01)
    assert logs.mean_difference == pytest.approx(np.nanmean(np.abs(accuracy - LOGS)))
    assert 0.9 < logs.rank_correlation < 1
    text = comparison_text(comparison)
    assert "mean absolute difference 0.0100, over 24 of 25 cells" in text
    # published on the left, the run on the right
    assert re.search(r"^  0 0\.91 0\.54 0\.39 0\.34 0\.32 {6} {2}0 0\.92 {4}– 0\.40 0\.35 0\.33$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dataset": "fashion-mini"}, "its data set is fashion-mini, the published one cifar10"),
        ({"width": 16}, "its networks have width 16, the published ones 64"),
    ],
)
def test_at_another_scale_or_on_other_data_only_ranks_are_compared(
    options: dict[str, object], reason: str, tmp_path: Path
) -> None:
    run = written_run(tmp_path / "run", {("R1111", "R1111", "T2T", 0): FIGURE}, **options)  # type: ignore[arg-type]
    assert scale_reason(run) == reason
    comparison = compare_run(run)
    assert [matrix.mean_difference for matrix in comparison.matrices] == [None, None]
    assert comparison.matrices[0].rank_correlation == pytest.approx(1)
    text = comparison_text(comparison)
    assert reason in text
    assert "rank correlation alone is given" in text
    assert "mean absolute difference" not in text
    assert "0.9347" not in text


def test_matched_runs_are_compared_with_figure_5_and_vanilla_ones_are_not(tmp_path: Path) -> None:
    matrices = {("R1111", "R1111", "T2T", 0): FIGURE}
    (comparison,) = compare_run(written_run(tmp_path / "run", matrices, loss="match")).matrices
    assert comparison.published.source == "Figure 5"
    assert comparison.published.matched


def test_pairs_are_recognised_by_architecture_and_self_pairs_also_by_seed(tmp_path: Path) -> None:
    matrices = {
        ("R1111@1", "R1111@1", "T2T", 0): FIGURE,
        ("R1111@1", "R1111@2", "T2T", 0): FIGURE,
        ("R1111@1", "R1112", "T2T", 0): np.full((5, 6), 0.5),
    }
    shared = compare_run(written_run(tmp_path / "run", matrices)).matrices
    assert {(each.sender, each.receiver) for each in shared} == {("R1111@1", "R1111@1")}
    controls = {("R1111", "R1112@3", "R2T", 0): PUBLISHED["Figure 2", "R1111", "R1112", "R2T"]}
    (control,) = compare_run(written_run(tmp_path / "controls", controls)).matrices
    assert control.mean_difference == 0


def test_units_that_are_not_done_have_no_cells(tmp_path: Path) -> None:
    run = written_run(
        tmp_path / "run",
        {("R1111", "R1111", "T2T", 0): FIGURE},
    )
    next((run.path / "units").glob("*.npz")).unlink()
    text = comparison_text(compare_run(run))
    assert "Spearman rank correlation –, mean absolute difference –, over 0 of 25 cells" in text


def test_a_run_without_a_published_pair_is_refused_with_a_list_of_them(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", {("R2111", "R1111", "T2T", 0): np.full((6, 5), 0.5)})
    with pytest.raises(RunError, match=r"shares no pair .* vanilla matrices: those are R1111--R1111\.T2T, R1112--"):
        compare_run(run)


def test_compare_from_the_command_line(tmp_path: Path, run_cli: Command) -> None:
    written_run(tmp_path / "root" / "runs" / "cifar10" / "first", {("R1111", "R1111", "T2T", 0): FIGURE})
    shown = run_cli("compare", "first", "--root", tmp_path / "root")
    assert shown.returncode == 0, shown.stderr
    assert "R1111 -> R1111, T2T, vanilla: Figure 2" in shown.stdout
    missing = run_cli("compare", "none", "--root", tmp_path / "root")
    assert missing.returncode == 2
    assert "no run 'none'" in missing.stderr
