"""Figures and texts as files."""

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from fastsitch.files import write_atomically

FIGURE_KINDS = ("pdf", "png")
_DPI = 160


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PDF and PNG; ``path`` is that of the PNG, and returned."""
    for kind in FIGURE_KINDS:
        write_atomically(_with_kind(path, kind), partial(figure.savefig, format=kind, dpi=_DPI))
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text (UTF-8) and return its path."""
    content = text.encode()
    write_atomically(path, lambda file: file.write(content))
    return path


def _with_kind(path: Path, kind: str) -> Path:
    assert path.suffix == ".png", path
    return path.with_suffix(f".{kind}")
