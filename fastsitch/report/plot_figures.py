"""Draw figures by the name of their kind."""

import os
from pathlib import Path

from fastsitch.errors import ConfigError, argument
from fastsitch.report.heatmap import plot_run
from fastsitch.report.overview_figure import plot_overview
from fastsitch.report.side_by_side import plot_controls, plot_directions, plot_matched
from fastsitch.runs.run import Run
from fastsitch.vocabulary import FigureKind, Metric, require_choice


def plot_figures(
    run: Run,
    out: str | os.PathLike[str],
    *,
    figure: FigureKind = "pairs",
    metric: Metric = "accuracy",
    matched: Run | None = None,
) -> list[Path]:
    """Draw one kind of figure of a run, or with ``matched`` its matrices beside those of another.

    Args:
        run: the run.
        out: folder for the files.
        figure: a heat map for each pair, a pair's settings side by side, both ways of two networks, or all pairs on one
            page.
        metric: what the colours show.
        matched: a run of matched stitches of the same networks, drawn beside ``run``.

    Returns:
        Paths of the PNG files; PDF files lie beside them.

    Raises:
        ConfigError: the figure, or the metric, cannot be drawn of this run.
    """
    require_choice("figure", figure, FigureKind)
    if matched is not None:
        if figure != "pairs":
            raise ConfigError(
                f"{argument('matched')} and {argument('figure', figure)} are two different figures: give one of them"
            )
        return plot_matched(run, matched, out, metric=metric)
    if figure == "controls":
        return plot_controls(run, out, metric=metric)
    if figure == "directions":
        return plot_directions(run, out, metric=metric)
    if figure == "overview":
        return plot_overview(run, out, metric=metric)
    return plot_run(run, out, metric)
