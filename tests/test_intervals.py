"""Intervals over seeds, and by bootstrap."""

from pathlib import Path

import numpy as np
import pytest

import fastsitch
from fastsitch.analysis.bootstrap import mean_estimate
from fastsitch.errors import RunError
from fastsitch.identity import numpy_generator
from fastsitch.runs.confidence_interval import half_width, t_quantile
from tests.written_runs import written_run


@pytest.mark.parametrize(
    ("freedom", "printed"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (10, 2.2281), (30, 2.0423), (120, 1.9799)],
)
def test_quantiles_are_those_of_printed_tables(freedom: int, printed: float) -> None:
    assert t_quantile(freedom) == pytest.approx(printed, abs=5e-5)


def test_quantiles_in_closed_form() -> None:
    # one degree of freedom is Cauchy's distribution, two are t / sqrt(2 + t^2)
    assert t_quantile(1, 0.5) == pytest.approx(1, rel=1e-14)
    assert t_quantile(2, 0.5) == pytest.approx(np.sqrt(2 / 3), rel=1e-14)
    with pytest.raises(ValueError, match="expected at least 1"):
        t_quantile(0)


def test_the_half_width_by_hand() -> None:
    by_seed = np.array([[1.0, 5.0, 1.0], [2.0, 5.0, np.nan], [3.0, 5.0, 2.0]])
    widths = half_width(by_seed)
    assert widths[0] == pytest.approx(4.302652729749464 / np.sqrt(3), rel=1e-12)
    assert widths[1] == 0
    assert np.isnan(widths[2])
    assert np.isnan(half_width(by_seed[:1])).all()


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    """20,000 experiments of four seeds: 95 % within four standard errors."""
    drawn = numpy_generator("coverage").normal(0.7, 0.1, (4, 20_000))
    covered = np.abs(drawn.mean(0) - 0.7) <= half_width(drawn)
    assert covered.mean() == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 20_000))


def test_a_run_and_its_export_have_the_interval(tmp_path: Path) -> None:
    generator = numpy_generator("accuracies")
    matrices = {("R1111", "R1112", "T2T", seed): generator.uniform(size=(5, 6)) for seed in (0, 1, 2)}
    run = written_run(tmp_path / "run", matrices)
    by_seed = np.stack(list(matrices.values()))
    expected = 4.302652729749464 * by_seed.std(0, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(run.interval("R1111", "R1112"), expected, rtol=1e-12)
    # a ratio to a constant scales with it
    np.testing.assert_allclose(run.interval("R1111", "R1112", "accuracy_ratio"), expected / 0.9, rtol=1e-12)
    with pytest.raises(RunError, match="the status has no interval"):
        run.interval("R1111", "R1112", "status")
    (path,) = fastsitch.export_run(run, tmp_path / "out")
    with np.load(path, allow_pickle=False) as file:
        np.testing.assert_array_equal(file["accuracy_interval"], run.interval("R1111", "R1112"))
        assert {name for name in file.files if name.endswith("_interval")} == {
            f"{metric}_interval" for metric in run.metrics if metric != "status"
        }


def test_a_single_seed_has_no_interval(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", {("R1111", "R1112", "T2T", 0): np.full((5, 6), 0.5)})
    assert np.isnan(run.interval("R1111", "R1112")).all()
    (path,) = fastsitch.export_run(run, tmp_path / "out")
    with np.load(path, allow_pickle=False) as file:
        assert not [name for name in file.files if name.endswith("_interval")]


def test_the_bootstrap_of_a_mean() -> None:
    values = numpy_generator("values").normal(3.0, 2.0, 400)
    estimate = mean_estimate(values, numpy_generator("bootstrap"))
    assert estimate == mean_estimate(values, numpy_generator("bootstrap"))
    assert estimate.value == values.mean()
    # with many values the interval is that of the normal distribution
    error = 1.96 * values.std() / np.sqrt(400)
    assert estimate.low == pytest.approx(estimate.value - error, abs=0.1 * error)
    assert estimate.high == pytest.approx(estimate.value + error, abs=0.1 * error)
    assert mean_estimate(np.full(5, 0.25), numpy_generator("constant")).low == 0.25
    few = mean_estimate(values[:1], numpy_generator("few"))
    assert few.value == values[0]
    assert np.isnan([few.low, few.high, mean_estimate(values[:0], numpy_generator("none")).value]).all()
