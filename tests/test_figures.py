"""Figures of runs: what they show and the files they are written to."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fastsitch
from fastsitch.errors import ConfigError, RunError
from fastsitch.identity import numpy_generator
from fastsitch.report import side_by_side as figures
from fastsitch.report.heatmap import Panel, pair_figure, pair_panel, panels_figure
from fastsitch.report.metric_styles import STYLES
from fastsitch.report.overview_figure import overview_figure, plot_overview
from fastsitch.runs.run import Run
from tests.conftest import Command
from tests.written_runs import written_run

SETTINGS = ("T2T", "T2R", "R2T", "R2R")
POSITIONS = {"R1111": 5, "R1111@1": 5, "R1112": 6, "R1122": 7}


def accuracies(
    senders: tuple[str, ...], receivers: tuple[str, ...], settings: tuple[str, ...], seeds: int = 1
) -> dict[tuple[str, str, str, int], np.ndarray]:
    generator = numpy_generator("figures")
    return {
        (sender, receiver, setting, seed): generator.uniform(size=(POSITIONS[sender], POSITIONS[receiver]))
        for sender, receiver, setting, seed in product(senders, receivers, settings, range(seeds))
    }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return written_run(tmp_path / "run", accuracies(("R1111", "R1112"), ("R1112", "R1111"), ("T2T", "R2T")))


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def maps(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.images]


def values(run: Run, sender: str, receiver: str, metric: str = "accuracy", setting: str = "T2T") -> list[str]:
    return [f"{value:.2f}" for value in run.matrix(sender, receiver, metric, setting=setting).ravel()]


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure made during the test."""
    made: list[Figure] = []

    def record(*arguments: object, **options: object) -> Figure:
        made.append(panels_figure(*arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(figures, "panels_figure", record)
    return made


def files(paths: list[Path]) -> list[str]:
    for path in paths:
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert path.with_suffix(".pdf").read_bytes()[:5] == b"%PDF-"
    return [path.name for path in paths]


def test_a_pair_stands_beside_its_controls(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = drawn(monkeypatch)
    paths = figures.plot_controls(run, tmp_path / "out", pairs=[("R1111", "R1112")])
    assert files(paths) == ["R1111--R1112.controls.png"]
    (figure,) = made
    assert [axes.get_title().split(":")[0] for axes in maps(figure)] == ["T2T", "R2T"]
    for axes, setting in zip(maps(figure), ("T2T", "R2T"), strict=True):
        assert texts(axes) == values(run, "R1111", "R1112", setting=setting)
        assert axes.images[0].get_clim() == (0, 1)
    with pytest.raises(RunError, match="has no pair R1111--R2222"):
        figures.plot_controls(run, tmp_path / "out", pairs=[("R1111", "R2222")])


def test_both_directions_of_two_networks(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = drawn(monkeypatch)
    # once for the pair, and not for a network with itself
    assert files(figures.plot_directions(run, tmp_path / "out")) == ["R1111--R1112.directions.png"]
    labels = [(axes.get_ylabel()[7:12], axes.get_xlabel()[9:14], axes.get_title()[:3]) for axes in maps(made[0])]
    assert labels == [
        ("R1111", "R1112", "T2T"),
        ("R1111", "R1112", "R2T"),
        ("R1112", "R1111", "T2T"),
        ("R1112", "R1111", "R2T"),
    ]
    one_way = written_run(tmp_path / "one", accuracies(("R1111",), ("R1112",), ("T2T",)))
    with pytest.raises(ConfigError, match="no two networks stitched in both directions: it stitches R1111 to R1112"):
        figures.plot_directions(one_way, tmp_path / "out")


def test_vanilla_beside_matched(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = drawn(monkeypatch)
    matrices = accuracies(("R1111",), ("R1111", "R1122"), ("T2T",))
    matched = written_run(tmp_path / "matched", matrices, loss="match")
    paths = figures.plot_matched(run, matched, tmp_path / "out")
    assert files(paths) == ["R1111--R1111.T2T.matched.png"]
    left, right = maps(made[0])
    assert (left.get_title(), right.get_title()) == ("vanilla", "matched (similarity-trained)")
    assert texts(left) == values(run, "R1111", "R1111")
    assert texts(right) == values(matched, "R1111", "R1111")
    with pytest.raises(ConfigError, match="run 'run' has loss task: expected one with loss='match'"):
        figures.plot_matched(run, run, tmp_path / "out")
    other = written_run(tmp_path / "other", accuracies(("R1122",), ("R1111",), ("T2T",)), loss="match")
    with pytest.raises(ConfigError, match="have no pair and setting in common"):
        figures.plot_matched(run, other, tmp_path / "out")
    again = written_run(tmp_path / "again", matrices, loss="match", network_accuracy=0.8)
    with pytest.raises(ConfigError, match="trained again between runs 'run' and 'again'"):
        figures.plot_matched(run, again, tmp_path / "out")


def test_a_network_into_itself_beside_its_twin(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = drawn(monkeypatch)
    twin = written_run(tmp_path / "twin", accuracies(("R1111",), ("R1111@1",), ("T2T",)))
    paths = figures.plot_baseline(run, twin, tmp_path / "out")
    assert files(paths) == ["R1111--R1111@1.baseline.png"]
    left, right = maps(made[0])
    assert texts(left) == values(run, "R1111", "R1111")
    assert texts(right) == values(twin, "R1111", "R1111@1")


def test_all_pairs_on_one_page(run: Run, tmp_path: Path) -> None:
    figure = overview_figure(run, setting="R2T")
    shown = maps(figure)
    order = [(sender, receiver) for sender in ("R1111", "R1112") for receiver in ("R1112", "R1111")]
    for axes, (sender, receiver) in zip(shown, order, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), run.matrix(sender, receiver, setting="R2T"))
    assert [axes.get_title() for axes in shown] == ["R1112", "R1111", "", ""]
    assert [axes.get_ylabel() for axes in shown] == ["R1111", "", "R1112", ""]
    # all cells have one size, so that maps of different networks can be compared
    width, height = figure.get_size_inches()
    cells = [
        (
            axes.get_position().width * width / POSITIONS[receiver],
            axes.get_position().height * height / POSITIONS[sender],
        )
        for axes, (sender, receiver) in zip(shown, order, strict=True)
    ]
    np.testing.assert_allclose(cells, cells[0][0])
    assert files(plot_overview(run, tmp_path / "out")) == ["overview.T2T.png", "overview.R2T.png"]
    with pytest.raises(ConfigError, match="no setting R2R: expected one of T2T, R2T"):
        overview_figure(run, setting="R2R")


def test_several_seeds_are_labelled_with_their_widest_interval(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", accuracies(("R1111",), ("R1112",), ("T2T",), seeds=3))
    widest = run.interval("R1111", "R1112").max()
    note = f"mean of 3 seeds, 95 % interval at most ±{widest:.2g}"
    figure = pair_figure(run, "R1111", "R1112", "T2T")
    assert figure.get_suptitle() == note
    assert note in overview_figure(run).texts[0].get_text()


@pytest.mark.parametrize(
    ("metric", "limits"),
    [("accuracy_ratio", (0, 1)), ("accuracy_drop", (0, 1)), ("loss", None), ("train_loss", None)],
)
def test_other_metrics(metric: str, limits: tuple[float, float] | None, run: Run) -> None:
    (axes,) = maps(pair_figure(run, "R1111", "R1112", "T2T", metric))
    matrix = run.matrix("R1111", "R1112", metric)
    assert axes.images[0].get_clim() == (limits or (matrix.min(), matrix.max()))
    assert texts(axes) == [STYLES[metric].text(value) for value in matrix.ravel()]
    # bright is good: the best cell has the colour at the bright end
    colours = axes.images[0].get_cmap()(axes.images[0].norm(matrix))[..., :3].sum(-1)
    accuracy = run.matrix("R1111", "R1112")
    assert colours[np.unravel_index(accuracy.argmax(), accuracy.shape)] == colours.max()


def test_numbers_are_short() -> None:
    loss = STYLES["loss"].text
    assert [loss(value) for value in (0.5, 12.345, 123.4, 1.2e7, 0.0097, 0.0004, 0.0)] == [
        "0.50",
        "12.35",
        "123",
        "1e7",
        "0.01",
        "4e-4",
        "0.00",
    ]
    assert STYLES["accuracy_drop"].text(-0.002) == "0.00"


def test_colours_follow_the_logarithm_over_a_wide_range() -> None:
    scale = STYLES["loss"].scale([np.array([1.0, np.nan]), np.array([100.0])])
    assert float(scale(10.0)) == pytest.approx(0.5)
    assert float(STYLES["loss"].scale([np.array([1.0, 3.0])])(2.0)) == pytest.approx(0.5)


def test_cells_without_a_value_are_marked(tmp_path: Path) -> None:
    matrix = np.full((5, 5), 0.5)
    matrix[1, 2] = np.nan
    run = written_run(tmp_path / "run", {("R1111", "R1111", "T2T", 0): matrix})
    (axes,) = maps(pair_figure(run, "R1111", "R1111", "T2T"))
    assert texts(axes)[7] == "div."
    next((run.path / "units").glob("*.npz")).unlink()
    panel: Panel = pair_panel(run, "R1111", "R1111", "T2T")
    (axes,) = maps(panels_figure([[panel]], STYLES["loss"]))
    assert set(texts(axes)) == {"–"}


def test_numbers_can_be_read_on_every_colour(run: Run) -> None:
    """Contrast of at least 3 to 1 (WCAG) between each number and its cell."""
    for metric in ("accuracy", "accuracy_drop", "loss"):
        (axes,) = maps(pair_figure(run, "R1111", "R1112", "T2T", metric))
        image = axes.images[0]
        cells = image.get_cmap()(image.norm(run.matrix("R1111", "R1112", metric))).reshape(-1, 4)
        for cell, text in zip(cells, axes.texts, strict=True):
            light, dark = sorted((luminance(cell), 1.0 if text.get_color() == "white" else 0.0), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3


def luminance(colour: np.ndarray) -> float:
    linear = np.where(colour[:3] <= 0.04045, colour[:3] / 12.92, ((colour[:3] + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


OPTIONS: list[tuple[Mapping[str, str], str]] = [
    ({"figure": "pie"}, "figure='pie': expected one of pairs, controls, directions, overview"),
    (
        {"metric": "beauty"},
        "metric='beauty': expected one of accuracy, accuracy_ratio, accuracy_drop, loss, train_loss",
    ),
    ({"metric": "matched_error"}, "metric='matched_error': expected one of accuracy"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_wrong_choices_are_refused(options: Mapping[str, str], message: str, run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        fastsitch.plot_figures(run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_figures_from_the_command_line(tmp_path: Path, run_cli: Command) -> None:
    folder = tmp_path / "root" / "runs" / "cifar10"
    written_run(folder / "first", accuracies(("R1111",), ("R1111",), ("T2T",)))
    written_run(folder / "second", accuracies(("R1111",), ("R1111",), ("T2T",)), loss="match")
    common = ["--root", tmp_path / "root", "--out", tmp_path / "out"]
    for options in (["--metric", "accuracy_drop"], ["--figure", "overview"], ["--matched", "second"]):
        assert run_cli("plot", "first", *common, *options).returncode == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "R1111--R1111.T2T.accuracy_drop.png",
        "R1111--R1111.T2T.matched.png",
        "overview.T2T.png",
    ]
