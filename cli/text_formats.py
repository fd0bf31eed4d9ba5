"""Numbers, sizes, durations and tables as text."""

from collections.abc import Sequence
from io import StringIO

from fastsitch.errors import printable

_WIDEST = 10_000
"""Tables are as wide as they need to be: whoever reads them from a pipe wants whole lines."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces; numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=True)
    for column, title in enumerate(header):
        numeric = bool(rows) and all(_is_number(row[column]) for row in rows)
        drawn.add_column(title, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        # names of files need not be text
        drawn.add_row(*(printable(cell.encode(errors="backslashreplace").decode()) for cell in row))
    text = StringIO()
    Console(file=text, width=_WIDEST, color_system=None, markup=False, highlight=False, emoji=False).print(drawn)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in "+-–" or text == "nan"


def duration(seconds: float) -> str:
    """``45 s``, ``3:20 min``, ``5:07 h``, ``3 days``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    if seconds < 172800:
        return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d} h"
    return f"{seconds / 86400:.1f} days"


def counted(count: float, noun: str) -> str:
    """``1 epoch``, ``0.5 epochs``, ``1,200 cells``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def rate_text(rate: float, unit: str) -> str:
    """A rate per second, or per minute or hour where that reads better."""
    for factor, name in ((1, "s"), (60, "min"), (3600, "h")):
        if rate * factor >= 1 or name == "h":
            return f"{rate * factor:.1f} {unit}/{name}"
    raise AssertionError


def size(count: float) -> str:
    """Bytes in a readable unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
