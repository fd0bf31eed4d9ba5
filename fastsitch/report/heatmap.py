"""Annotated heat maps of stitching matrices: one matrix drawn, and one pair as a figure."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from fastsitch.files import output_folder
from fastsitch.report.metric_styles import Style, style_of
from fastsitch.report.write_figures import save_figure
from fastsitch.runs.output_source import source_of
from fastsitch.runs.run import Run
from fastsitch.runs.run_record import accuracy_note
from fastsitch.stitching.cells import Unit
from fastsitch.vocabulary import Metric, Setting

_DARK = 0.45
"""Below this luminance a cell's number is white."""

_CELL = 0.6
"""Side of a cell in inches."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One matrix (sender positions, receiver positions), rows = sender, with its labels and title."""

    matrix: NDArray[np.float64]
    status: NDArray[np.float64]
    """0 not run, 1 done, 2 diverged."""
    sender: str
    receiver: str
    sender_positions: Sequence[str]
    receiver_positions: Sequence[str]
    title: str


def pair_panel(run: Run, sender: str, receiver: str, setting: Setting, metric: Metric = "accuracy") -> Panel:
    """One pair and setting of a run; the accuracies of both networks in the title."""
    first, last = run.pair_networks(sender, receiver, setting)
    return Panel(
        matrix=run.matrix(sender, receiver, metric, setting=setting),
        status=run.matrix(sender, receiver, "status", setting=setting),
        sender=sender,
        receiver=receiver,
        sender_positions=[name for name, _ in first.positions],
        receiver_positions=[name for name, _ in last.positions],
        title=(
            f"{setting}: {_kind(setting[0])} {sender}{accuracy_note(first.accuracy)}"
            f"  →  {_kind(setting[-1])} {receiver}{accuracy_note(last.accuracy)}"
        ),
    )


def seeds_note(run: Run, pairs: Sequence[tuple[str, str, Setting]], metric: Metric) -> str:
    """A note for runs with several seeds: ``mean of 3 seeds, 95 % interval at most ±0.012``; else empty.

    The interval is the widest of all finished cells of ``pairs`` (sender, receiver, setting).
    """
    count = len(run.config.seeds)
    if count < 2:
        return ""
    widths = [run.interval(sender, receiver, metric, setting=setting).ravel() for sender, receiver, setting in pairs]
    finite = np.concatenate(widths)
    finite = finite[np.isfinite(finite)]
    return f"mean of {count} seeds" + (f", 95 % interval at most ±{finite.max():.2g}" if finite.size else "")


def draw(axes: Axes, panel: Panel, style: Style, scale: Normalize, *, labels: bool = True) -> None:
    """Draw one matrix with its numbers into ``axes``; diverged cells say so, cells that were not run stay grey.

    ``labels`` adds the names of the positions and of the axes.
    """
    colours = style.colours()
    axes.imshow(np.ma.masked_invalid(panel.matrix), norm=scale, cmap=colours)
    for (i, j), value in np.ndenumerate(panel.matrix):
        if np.isfinite(value):
            red, green, blue, _ = colours(scale(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < _DARK
            text, colour = style.text(float(value)), "white" if dark else "black"
        else:
            text, colour = ("div." if panel.status[i, j] == 2 else "–"), "black"
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=9)
    rows, columns = panel.matrix.shape
    axes.set_title(panel.title, fontsize=9)
    axes.tick_params(length=0, labelsize=8)
    if not labels:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.set_xticks(
        range(columns),
        [f"{j} {name}" for j, name in enumerate(panel.receiver_positions)],
        rotation=40,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_yticks(range(rows), [f"{i} {name}" for i, name in enumerate(panel.sender_positions)])
    axes.set_xlabel(f"receiver {panel.receiver}: position whose output is replaced")
    axes.set_ylabel(f"sender {panel.sender}: position")


def panels_figure(grid: Sequence[Sequence[Panel]], style: Style, *, title: str = "") -> Figure:
    """Matrices in rows and columns of one figure, with one colour scale."""
    panels = [panel for row in grid for panel in row]
    scale = style.scale([panel.matrix for panel in panels])
    # a column of panels is as wide as its widest matrix, a row as high as its highest
    widths = [max(panel.matrix.shape[1] for panel in column) for column in zip(*grid, strict=True)]
    heights = [max(panel.matrix.shape[0] for panel in row) for row in grid]
    # titles of neighbouring panels must not overlap
    least = 5.0 if len(widths) > 1 else 0.0
    # margins for the names of positions, on the left and slanted below
    beside = max(1.5, 0.95 + 0.07 * max(len(name) for panel in panels for name in panel.sender_positions))
    below = max(1.5, 1.15 + 0.045 * max(len(name) for panel in panels for name in panel.receiver_positions))
    size = (
        0.9 + sum(max(beside + _CELL * width, least) for width in widths),
        (0.4 if title else 0) + sum(below + _CELL * height for height in heights),
    )
    # the default margins of this layout cut rotated text
    margins = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=size, layout=margins)
    axes = figure.subplots(len(heights), len(widths), squeeze=False, width_ratios=widths, height_ratios=heights)
    for axes_row, panels_row in zip(axes, grid, strict=True):
        for panel_axes, panel in zip(axes_row, panels_row, strict=True):
            draw(panel_axes, panel, style, scale)
    bar = figure.colorbar(
        ScalarMappable(scale, style.colours()),
        ax=axes,
        fraction=0.05,
        pad=0.03 if len(panels) == 1 else 0.01,
        extend=_extend(scale, panels),
        aspect=20 if len(heights) == 1 else 50,
        # by default a colour bar pulls the panels to itself
        panchor=False,
    )
    bar.set_label(style.label)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def pair_figure(run: Run, sender: str, receiver: str, setting: Setting, metric: Metric = "accuracy") -> Figure:
    """The heat map of one pair and setting; network accuracies in the title."""
    style = style_of(run, metric)
    panel = pair_panel(run, sender, receiver, setting, metric)
    return panels_figure([[panel]], style, title=seeds_note(run, [(sender, receiver, setting)], metric))


def plot_run(run: Run, out: str | os.PathLike[str], metric: Metric = "accuracy") -> list[Path]:
    """Draw one heat map per pair and setting.

    Args:
        run: the run.
        out: folder for ``SENDER--RECEIVER.SETTING.png`` and ``.pdf``; the name of another metric than the accuracy
            stands before the suffix.
        metric: what the colours show.

    Returns:
        Paths of the PNG files.

    Raises:
        ConfigError: the run does not have this metric.
    """
    style_of(run, metric)
    folder = output_folder(out)
    paths = []
    for sender, receiver, setting in run.pairs():
        unit = Unit(sender=sender, receiver=receiver, setting=setting, loss=run.config.loss, seed=0)
        path = folder / figure_name(unit.pair, metric)
        paths.append(save_figure(pair_figure(run, sender, receiver, setting, metric), path, source_of("a matrix", run)))
    return paths


def figure_name(stem: str, metric: Metric) -> str:
    """The name of a figure's PNG; the metric is part of it unless it is the accuracy."""
    return f"{stem}.png" if metric == "accuracy" else f"{stem}.{metric}.png"


def _kind(letter: str) -> str:
    return "trained" if letter == "T" else "random"


def _extend(scale: Normalize, panels: Sequence[Panel]) -> str:
    """Ends of the colour bar beyond which there are values, as ``extend`` of a colour bar."""
    values = np.concatenate([panel.matrix[np.isfinite(panel.matrix)] for panel in panels])
    if values.size == 0 or scale.vmin is None or scale.vmax is None:
        return "neither"
    below, above = values.min() < scale.vmin, values.max() > scale.vmax
    return "both" if below and above else "min" if below else "max" if above else "neither"
