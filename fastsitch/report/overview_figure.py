"""All pairs of a run on one page."""

import os
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from fastsitch.errors import ConfigError
from fastsitch.files import output_folder
from fastsitch.report.heatmap import figure_name, seeds_note
from fastsitch.report.metric_styles import style_of
from fastsitch.report.write_figures import save_figure
from fastsitch.runs.output_source import source_of
from fastsitch.runs.run import Run
from fastsitch.vocabulary import Metric, Setting

_PAGE = (6.3, 8.5)
"""Largest width and height of all matrices in inches: with margins an upright page of A4, unscaled."""
_LARGEST_CELL = 0.25
_HEAD, _SIDE, _FOOT, _LEAST_WIDTH = 1.15, 0.95, 0.85, 5.6
"""Margins in inches: title and receivers above, senders beside, colour bar below; and the least page width."""


def overview_figure(run: Run, metric: Metric = "accuracy", setting: Setting = "T2T") -> Figure:
    """Small heat maps of all pairs: rows are senders, columns receivers; all cells of one size, one colour scale.

    In each map the first sender position is at the top, the first receiver position on the left. Raises ConfigError
    when the run does not have this setting or metric.
    """
    if setting not in run.config.settings:
        raise ConfigError(
            f"run {run.name!r} has no setting {setting}: expected one of {', '.join(run.config.settings)}"
        )
    style = style_of(run, metric)
    senders, receivers = run.config.senders, run.config.receivers
    maps = {(a, b): run.matrix(a, b, metric, setting=setting) for a in senders for b in receivers}
    scale, colours = style.scale(list(maps.values())), style.colours()
    heights = [maps[sender, receivers[0]].shape[0] for sender in senders]
    widths = [maps[senders[0], receiver].shape[1] for receiver in receivers]
    gap = 0.8
    across, down = (sum(cells) + gap * (len(cells) - 1) for cells in (widths, heights))
    cell = min(_PAGE[0] / across, _PAGE[1] / down, _LARGEST_CELL)
    size = (max(cell * across + 2 * _SIDE, _LEAST_WIDTH), cell * down + _HEAD + _FOOT)
    figure = Figure(figsize=size)
    for row, sender in enumerate(senders):
        for column, receiver in enumerate(receivers):
            left = _SIDE + cell * (sum(widths[:column]) + gap * column)
            bottom = size[1] - _HEAD - cell * (sum(heights[: row + 1]) + gap * row)
            box = (left, bottom, cell * widths[column], cell * heights[row])
            axes = figure.add_axes((box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]))
            axes.imshow(np.ma.masked_invalid(maps[sender, receiver]), norm=scale, cmap=colours, aspect="auto")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_linewidth(0.3)
            if row == 0:
                axes.set_title(receiver, fontsize=7, rotation=45, ha="left", rotation_mode="anchor", pad=3)
                axes.title.set_x(0.3)
            if column == 0:
                axes.set_ylabel(sender, fontsize=7, rotation=0, ha="right", va="center")
    _frame(figure, size, setting, seeds_note(run, [(a, b, setting) for a, b in maps], metric))
    bar_width = min(3.0, size[0] - 2 * _SIDE)
    bar = figure.colorbar(
        ScalarMappable(scale, colours),
        cax=figure.add_axes((_SIDE / size[0], 0.5 / size[1], bar_width / size[0], 0.12 / size[1])),
        orientation="horizontal",
    )
    bar.set_label(style.label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def plot_overview(
    run: Run, out: str | os.PathLike[str], *, metric: Metric = "accuracy", settings: tuple[Setting, ...] | None = None
) -> list[Path]:
    """Write ``overview.SETTING.png`` and ``.pdf`` for each setting (default: all of the run); return the PNG paths."""
    folder = output_folder(out)
    source = source_of("an overview", run)
    return [
        save_figure(overview_figure(run, metric, setting), folder / figure_name(f"overview.{setting}", metric), source)
        for setting in settings or run.config.settings
    ]


def _frame(figure: Figure, size: tuple[float, float], setting: Setting, note: str) -> None:
    """Write the title, and what rows and columns are."""
    title = f"{setting}, all pairs" + (f" ({note})" if note else "")
    figure.text(0.15 / size[0], 1 - 0.2 / size[1], title, fontsize=10, va="center")
    line = (
        "down: sender, its first position at the top; across: receiver, its first position on the left; grey: no value"
    )
    figure.text(0.15 / size[0], 1 - 0.42 / size[1], line, fontsize=7, va="center", color="0.3")
