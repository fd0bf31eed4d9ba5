"""Figures and texts as files."""

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from fastsitch.files import write_atomically
from fastsitch.runs.output_source import PNG_KEY, require_replaceable

FIGURE_KINDS = ("pdf", "png")
_DPI = 160


def save_figure(figure: Figure, path: Path, source: str, dpi: int = _DPI) -> Path:
    """Write a figure as PDF and PNG; ``path`` is that of the PNG, and returned.

    ``source`` says what it shows; raises ConfigError where another figure has the name.
    """
    require_replaceable(path, source)
    for kind in FIGURE_KINDS:
        metadata = {PNG_KEY: source} if kind == "png" else {}
        write_atomically(_with_kind(path, kind), partial(figure.savefig, format=kind, dpi=dpi, metadata=metadata))
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text (UTF-8) and return its path."""
    content = text.encode()
    write_atomically(path, lambda file: file.write(content))
    return path


def _with_kind(path: Path, kind: str) -> Path:
    assert path.suffix == ".png", path
    return path.with_suffix(f".{kind}")
