"""Figures of the images that input stitches generate: a row per sender position, each beside the actual image."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastsitch.files import output_folder, write_npz
from fastsitch.generation.generate_images import PairImages
from fastsitch.generation.input_stitches import VARIANTS
from fastsitch.report.write_figures import save_figure
from fastsitch.runs.output_source import require_replaceable
from fastsitch.runs.run_record import accuracy_note
from fastsitch.stitching.cells import Unit

DPI = 160

GAP = 222
"""Grey of the gaps between tiles, so that a white tile has visible edges."""

_TILE = 128
"""Least width and height of an image, in dots."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 1.15, 0.85, 1.0, 0.3
"""Margins in inches."""

_LEAST_WIDTH = 4.4
"""In inches, so that the title fits."""

_HOW = {"vanilla": "trained on the task loss", "matched": "least squares to the image"}


def image_grid(generated: NDArray[np.float32], actual: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pixels (height, width, 3) of a grid: row s shows, for each of n images, what position s generates and the image.

    ``generated`` (S, n, H, W, 3) and ``actual`` (n, H, W, 3) are in [0, 1]; values that are not finite become grey. For
    the gaps see :func:`tile_corners`.
    """
    positions, images, height, width, channels = generated.shape
    rows, columns = tile_corners(positions, images, (height, width))
    grid = np.full((rows[-1] + height, columns[-1][1] + width, channels), GAP, np.uint8)
    for s, top in enumerate(rows):
        for k, pair in enumerate(columns):
            for left, image in zip(pair, (generated[s, k], actual[k]), strict=True):
                grid[top : top + height, left : left + width] = np.rint(255 * np.nan_to_num(image, nan=0.5))
    return grid


def tile_corners(positions: int, images: int, size: tuple[int, int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Where the tiles of a grid begin: the top of every row, and the left edges of both tiles of every image."""
    height, width = size
    # narrow within a pair, wide between pairs
    narrow, wide = max(1, width // 16), max(2, width // 4)
    rows = [s * (height + max(1, height // 16)) for s in range(positions)]
    starts = [k * (2 * width + narrow + wide) for k in range(images)]
    return rows, [(start, start + width + narrow) for start in starts]


def images_figure(pair: PairImages, variant: str) -> Figure:
    """The grid of one pair, setting and variant, with the accuracy of the stitched network beside each row."""
    positions, images, height, width, _ = pair.generated[variant].shape
    grid = image_grid(pair.generated[variant], pair.actual)
    scale = max(1, -(-_TILE // max(height, width)))
    # every pixel becomes the same whole number of dots, so that viewers do not smooth small images
    grid = grid.repeat(scale, 0).repeat(scale, 1)
    tall, broad = grid.shape[0] / DPI, grid.shape[1] / DPI
    size = (max(_LEAST_WIDTH, _LEFT + broad + _RIGHT), _TOP + tall + _BOTTOM)
    # sizes in whole dots, so that nothing is resampled
    figure_width, figure_height = (round(length * DPI) / DPI for length in size)
    left, bottom = round(_LEFT * DPI) / DPI, round(_BOTTOM * DPI) / DPI
    figure = Figure(figsize=(figure_width, figure_height), dpi=DPI)
    axes = figure.add_axes(
        (left / figure_width, bottom / figure_height, broad / figure_width, tall / figure_height), frameon=False
    )
    axes.imshow(grid, interpolation="none", aspect="auto")
    rows, columns = tile_corners(positions, images, (height, width))
    middles = [(row + height / 2) * scale for row in rows]
    axes.set_xticks([])
    axes.set_yticks(
        middles, [f"{i} {name}" for i, name in zip(pair.indices, pair.sender_positions, strict=True)], fontsize=8
    )
    axes.tick_params(length=0)
    right, above = grid.shape[1] + 0.08 * DPI, -0.06 * DPI
    for middle, accuracy in zip(middles, pair.accuracy(variant), strict=True):
        text = f"{accuracy:.3f}" if np.isfinite(accuracy) else "diverged"
        axes.text(right, middle, text, va="center", fontsize=8)
    axes.text(right, above, "accuracy", va="bottom", fontsize=7)
    axes.text(-0.04 * DPI, above, "sender position", va="bottom", ha="right", fontsize=7)
    for (first, second), index, label in zip(columns, pair.images, pair.labels, strict=True):
        for corner, text in ((first, "generated"), (second, "actual")):
            axes.text((corner + width / 2) * scale, above, text, va="bottom", ha="center", fontsize=7)
        middle = (first + second + width) / 2 * scale
        title = f"test image {index}, class {label}"
        axes.text(middle, -0.21 * DPI, title, va="bottom", ha="center", fontsize=8)
    sender, receiver = pair.network_accuracies
    figure.text(
        0.1 / figure_width,
        1 - 0.1 / figure_height,
        f"{pair.setting}: {_KIND[pair.setting[0]]} {pair.sender}{accuracy_note(sender)}"
        f"  →  input of {_KIND[pair.setting[-1]]} {pair.receiver}{accuracy_note(receiver)}\n"
        f"stitches {_HOW[variant]}; values outside [0, 1] clamped",
        va="top",
        fontsize=9,
    )
    return figure


_KIND = {"T": "trained", "R": "random"}


def require_images_replaceable(units: Sequence[Unit], folder: Path, source: str) -> None:
    """Raise ConfigError where results of something else than ``source`` have the names of these units' images."""
    for unit in units:
        for end in ("npz", *(f"{variant}.png" for variant in VARIANTS)):
            require_replaceable(folder / f"{replace(unit, loss='task').pair}.{end}", source)


def write_images(pairs: Sequence[PairImages], out: str | os.PathLike[str], source: str) -> list[Path]:
    """Write ``SENDER--RECEIVER.SETTING.VARIANT.png`` and ``.pdf`` for every pair and variant; return the PNG paths.

    Beside them ``SENDER--RECEIVER.SETTING.npz`` holds the pixels: ``actual`` (n, H, W, 3), and for each variant
    ``VARIANT`` (S, n, H, W, 3) in [0, 1], ``VARIANT_accuracy``, ``VARIANT_status`` and ``VARIANT_clamped``, the share
    of values that had to be clamped (S,); ``images``, ``labels`` and ``sender_positions`` say what they belong to.
    ``source`` says whose images these are; raises ConfigError where other results have their names.
    """
    folder = output_folder(out)
    paths = []
    for pair in pairs:
        name = Unit(sender=pair.sender, receiver=pair.receiver, setting=pair.setting, loss="task", seed=0).pair
        require_replaceable(folder / f"{name}.npz", source)
        write_npz(folder / f"{name}.npz", _arrays(pair), source)
        for variant in VARIANTS:
            path = folder / f"{name}.{variant}.png"
            paths.append(save_figure(images_figure(pair, variant), path, source, DPI))
    return paths


def _arrays(pair: PairImages) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {
        "sender_positions": np.array(pair.sender_positions),
        "images": np.array(pair.images),
        "labels": np.array(pair.labels),
        "actual": pair.actual,
    }
    for variant in VARIANTS:
        arrays[variant] = pair.generated[variant]
        arrays[f"{variant}_accuracy"] = pair.accuracy(variant)
        arrays[f"{variant}_status"] = np.array([result.status for result in pair.results[variant]], np.int8)
        arrays[f"{variant}_clamped"] = pair.clamped[variant]
    return arrays
