"""The triangle and the injective best match, on matrices whose answers are known."""

import csv
from pathlib import Path

import numpy as np
import pytest

from fastsitch.analysis.best_match import holds, margins, run_best_matches
from fastsitch.analysis.triangle import gap_over_cells, lower_left_mask, run_triangles
from fastsitch.identity import numpy_generator
from fastsitch.report.pattern_tables import best_match_text, patterns_text, triangle_text, write_patterns
from fastsitch.runs.run import Run
from tests.written_runs import written_run

STEP = np.where(lower_left_mask(5, 5), 0.9, 0.6)
FLAT = np.full((5, 5), 0.5)
NOISY = STEP + numpy_generator("noise").normal(0, 0.03, (5, 5))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    matrices = {
        ("R1111", "R1111", "T2T", 0): STEP,
        ("R1111", "R1111@1", "T2T", 0): FLAT,
        ("R1111@1", "R1111", "T2T", 0): np.full((5, 5), np.nan),
        ("R1111@1", "R1111@1", "T2T", 0): NOISY,
    }
    return written_run(tmp_path / "run", matrices)


def test_the_gap_of_constant_regions_is_certain() -> None:
    estimate = gap_over_cells(STEP, numpy_generator("x"))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.3, 0.3, 0.3), abs=1e-15)
    noisy = gap_over_cells(NOISY, numpy_generator("x"))
    assert noisy.low < noisy.value < noisy.high
    # about 1.96 standard errors of a difference of two means
    mask = lower_left_mask(5, 5)
    error = np.sqrt(NOISY[mask].var() / mask.sum() + NOISY[~mask].var() / (~mask).sum())
    assert noisy.high - noisy.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_pairs_count_the_same_and_lost_ones_not_at_all(run: Run) -> None:
    rows = run_triangles(run)
    assert str(rows) == str(run_triangles(run))
    assert [row.pairs for row in rows] == [1, 1, 0, 1, 3]
    gaps = [row.gap.value for row in rows if row.pair and row.pairs]
    assert gaps[:2] == pytest.approx([0.3, 0.0], abs=1e-15)
    everything = rows[-1]
    assert everything.gap.value == pytest.approx(np.mean(gaps))
    assert everything.regions.gap == pytest.approx(np.mean(gaps))
    # resampled pairs lie between the least and the greatest
    assert min(gaps) <= everything.gap.low < everything.gap.high <= max(gaps) + 1e-15
    assert np.isnan(rows[2].gap.value)
    text = triangle_text(rows)
    assert patterns_text(run).startswith(text)
    assert "all 3 pairs" in text
    assert "0.300  0.300 to 0.300" in text


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        # injective, gaps 0.4, 0.1, 0.2
        ([[0.9, 0.5, 0.1], [0.2, 0.6, 0.7], [0.1, 0.9, 0.7]], [0.4, 0.1, 0.2]),
        # rows 0 and 1 have the same best column, row 2 another
        ([[0.9, 0.5, 0.1], [0.8, 0.6, 0.7], [0.1, 0.7, 0.9]], [0, 0, 0.2]),
        # row 0 has a tie, and so one of its best columns is that of row 1
        ([[0.9, 0.9, 0.1], [0.2, 0.6, 0.1], [0.1, 0.7, 0.9]], [0, 0, 0.2]),
        # cells that are not finite are not the best; the margin of a row with a single cell is NaN
        ([[np.nan, 0.5, 0.2], [np.nan, np.nan, 0.7], [0.1, 0.7, 0.9]], [0.3, np.nan, 0]),
        # more rows than columns: never all of them
        ([[0.9, 0.1], [0.1, 0.9], [0.8, 0.3]], [0, 0.8, 0]),
    ],
)
def test_margins_by_hand(matrix: list[list[float]], expected: list[float]) -> None:
    np.testing.assert_allclose(margins(np.array(matrix)), expected, rtol=0, atol=1e-12)


def test_at_least_epsilon_means_what_it_says() -> None:
    margin = margins(np.array([[0.3, 0.2, 0.0], [0.0, 0.1, 0.3]]))
    # 0.3 - 0.2 is below 0.1 in floating point
    assert holds(margin, 0.1).tolist() == [1, 1]
    assert holds(margin, 0.15).tolist() == [0, 1]
    assert holds(np.array([0.0, np.nan, 0.1]), 0.0).tolist() == [0, 1]


def test_the_share_of_rows_and_pairs_falls_with_epsilon(tmp_path: Path) -> None:
    diagonal = np.eye(5) * np.linspace(0.1, 0.5, 5) + 0.2
    matrices = {
        ("R1111", "R1111", "T2T", 0): diagonal,
        ("R1111", "R1112", "T2T", 0): np.full((5, 6), 0.5),
        ("R1112", "R1111", "T2T", 0): np.vstack([diagonal, diagonal[:1]]),
        ("R1112", "R1112", "T2T", 0): np.full((6, 6), np.nan),
    }
    rows = run_best_matches(written_run(tmp_path / "run", matrices), epsilons=(0.0, 0.1, 0.25, 0.6))
    shares = {row.epsilon: row for row in rows if row.pair is None}
    # of the first pair 5, 5, 3, 0 rows of five; of the second none; of the third rows 0 and 5 share their best
    assert [shares[epsilon].rows.value for epsilon in (0.0, 0.1, 0.25, 0.6)] == pytest.approx(
        [(1 + 0 + 4 / 6) / 3, (1 + 0 + 4 / 6) / 3, (3 / 5 + 0 + 3 / 6) / 3, 0]
    )
    assert [shares[epsilon].pairs.value for epsilon in (0.0, 0.1, 0.25, 0.6)] == pytest.approx([1 / 3, 1 / 3, 0, 0])
    assert {(row.possible, row.counted) for row in shares.values()} == {(2, 3)}
    first = next(row for row in rows if row.pair == ("R1111", "R1111") and row.epsilon == 0.25)
    assert (first.rows.value, first.pairs.value) == (0.6, 0)
    assert 0 <= first.rows.low < 0.6 < first.rows.high <= 1
    assert "2 of 3" in best_match_text(rows)


def test_with_several_settings_all_pairs_are_pooled(tmp_path: Path) -> None:
    lower = np.where(lower_left_mask(5, 5), 0.8, 0.2)
    matrices = {
        ("R1111", "R1111", "T2T", 0): lower,
        ("R1111", "R1111", "T2R", 0): np.full((5, 5), 0.1),
        ("R1111", "R1111", "R2R", 0): np.eye(5),
    }
    run = written_run(tmp_path / "run", matrices)
    *_, pooled = run_triangles(run)
    assert (pooled.setting, pooled.pair, pooled.pairs) == ("all", None, 3)
    # 15 cells of the identity lie in the lower left, 5 of them are 1
    assert pooled.gap.value == pytest.approx((0.6 + 0 + 5 / 15) / 3)
    assert pooled.gap.low < pooled.gap.value < pooled.gap.high
    best = [row for row in run_best_matches(run, epsilons=(0.0, 1.0)) if row.setting == "all"]
    assert [(row.epsilon, row.counted) for row in best] == [(0.0, 3), (1.0, 3)]
    for row in best:
        assert (row.rows.value, row.pairs.value) == pytest.approx((1 / 3, 1 / 3))


def test_patterns_as_files(run: Run, tmp_path: Path) -> None:
    triangles, matches = write_patterns(run, tmp_path / "out")
    with triangles.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["sender"] for row in rows] == ["R1111", "R1111", "R1111@1", "R1111@1", "all"]
    assert float(rows[0]["gap"]) == pytest.approx(0.3)
    with matches.open() as file:
        assert {row["epsilon"] for row in csv.DictReader(file)} >= {"0.0", "0.01", "0.2"}
