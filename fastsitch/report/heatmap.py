"""Annotated heat maps of stitching matrices."""

import os
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastsitch.files import output_folder, write_atomically
from fastsitch.stitching.cells import Unit
from fastsitch.sweep.results import Run

_COLOURS = "viridis"


def heatmap(
    accuracy: NDArray[np.float64],
    status: NDArray[np.float64],
    *,
    sender_positions: list[str],
    receiver_positions: list[str],
    title: str,
    sender: str,
    receiver: str,
) -> Figure:
    """One matrix (sender positions, receiver positions) as a figure; rows = sender, colour scale 0 to 1.

    Cells that diverged say so; cells that were not run stay grey.
    """
    rows, columns = accuracy.shape
    figure = Figure(figsize=(2.6 + 0.72 * columns, 1.9 + 0.56 * rows), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps[_COLOURS].with_extremes(bad="0.85")
    image = axes.imshow(np.ma.masked_invalid(accuracy), vmin=0, vmax=1, cmap=colours)
    for i in range(rows):
        for j in range(columns):
            value = accuracy[i, j]
            if np.isfinite(value):
                text, colour = f"{value:.2f}", "black" if value > 0.6 else "white"
            else:
                text, colour = ("div." if status[i, j] == 2 else "–"), "black"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(
        range(columns),
        [f"{j} {name}" for j, name in enumerate(receiver_positions)],
        rotation=40,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_yticks(range(rows), [f"{i} {name}" for i, name in enumerate(sender_positions)])
    axes.set_xlabel(f"receiver {receiver}: position whose output is replaced")
    axes.set_ylabel(f"sender {sender}: position")
    axes.set_title(title, fontsize=10)
    axes.tick_params(length=0, labelsize=8)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    bar.set_label("accuracy of the stitched network")
    return figure


def pair_figure(run: Run, sender: str, receiver: str, setting: str) -> Figure:
    """The heat map of one pair and setting; network accuracies in the title."""
    first, last = run.pair_networks(sender, receiver, setting)
    title = (
        f"{setting}: {_kind(setting[0])} {sender} ({first.accuracy:.3f})"
        f"  →  {_kind(setting[-1])} {receiver} ({last.accuracy:.3f})"
    )
    if len(run.config.seeds) > 1:
        title += f", mean of {len(run.config.seeds)} seeds"
    return heatmap(
        run.matrix(sender, receiver, "accuracy", setting=setting),
        run.matrix(sender, receiver, "status", setting=setting),
        sender_positions=[name for name, _ in first.positions],
        receiver_positions=[name for name, _ in last.positions],
        title=title,
        sender=sender,
        receiver=receiver,
    )


def plot_run(run: Run, out: str | os.PathLike[str]) -> list[Path]:
    """Write one heat map per pair and setting as PNG and PDF; return the PNG paths."""
    folder = output_folder(out)
    paths = []
    for sender, receiver, setting in run.pairs():
        figure = pair_figure(run, sender, receiver, setting)
        unit = Unit(sender=sender, receiver=receiver, setting=setting, loss=run.config.loss, seed=0)
        for kind in ("pdf", "png"):
            path = folder / f"{unit.pair}.{kind}"
            write_atomically(path, partial(figure.savefig, format=kind, dpi=160))
        paths.append(path)
    return paths


def _kind(letter: str) -> str:
    return "trained" if letter == "T" else "random"
