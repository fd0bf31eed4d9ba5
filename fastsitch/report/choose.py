"""Figures by name."""

import os
from pathlib import Path

from fastsitch.errors import ConfigError
from fastsitch.report.figures import plot_controls, plot_directions, plot_matched
from fastsitch.report.heatmap import plot_run
from fastsitch.report.overview import plot_overview
from fastsitch.sweep.results import Run

FIGURES = ("pairs", "controls", "directions", "overview")


def plot_figures(
    run: Run,
    out: str | os.PathLike[str],
    *,
    figure: str = "pairs",
    metric: str = "accuracy",
    matched: Run | None = None,
) -> list[Path]:
    """Draw one kind of figure of a run, or with ``matched`` its matrices beside those; return the PNG paths.

    Raises ConfigError for an unknown figure or metric, and for a kind that cannot be drawn of this run.
    """
    if figure not in FIGURES:
        raise ConfigError(f"--figure {figure}: expected one of {', '.join(FIGURES)}")
    if matched is not None:
        if figure != "pairs":
            raise ConfigError(f"--matched with --figure {figure}: it is a figure of its own; give one of them")
        return plot_matched(run, matched, out, metric=metric)
    if figure == "controls":
        return plot_controls(run, out, metric=metric)
    if figure == "directions":
        return plot_directions(run, out, metric=metric)
    if figure == "overview":
        return plot_overview(run, out, metric=metric)
    return plot_run(run, out, metric)
