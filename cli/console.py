"""Text on the terminal: log lines, progress, tables, errors."""

import logging
import sys
import time
from collections.abc import Sequence

_BAR = 24
_PLAIN_INTERVAL = 15.0
"""Seconds between progress lines where the output is not a terminal."""

_debug = False


def set_debug(value: bool) -> bool:
    """Remember whether tracebacks are wanted."""
    global _debug
    _debug = _debug or value
    return value


def debugging() -> bool:
    return _debug


class Progress:
    """One line on stderr that is redrawn in place; on anything but a terminal a line now and then."""

    _active: "Progress | None" = None

    def __init__(self, what: str, unit: str) -> None:
        self.what = what
        self.unit = unit
        self._terminal = sys.stderr.isatty()
        self._began = time.monotonic()
        self._first: float | None = None
        self._total = 0.0
        self._drawn = 0.0
        self._text = ""

    def __enter__(self) -> "Progress":
        Progress._active = self
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        Progress._active = None

    def restart(self, what: str, unit: str) -> None:
        """Begin another piece of work, unless it is the one at hand: rate and time left count anew."""
        if (what, unit) == (self.what, self.unit):
            return
        self.clear()
        self.what, self.unit = what, unit
        self._began, self._first, self._drawn = time.monotonic(), None, 0.0

    def update(self, done: float, total: float, note: str = "") -> None:
        """Show that ``done`` of ``total`` is finished; rate and time left count from the first call of each total."""
        now = time.monotonic()
        if self._first is None or total != self._total:
            self._began, self._first, self._total = now, done, total
        if now - self._drawn < (0.1 if self._terminal else _PLAIN_INTERVAL):
            return
        self._drawn = now
        elapsed = now - self._began
        progressed = done - self._first
        rate = progressed / elapsed if elapsed > 0 else 0.0
        pace = f", {rate_text(rate, self.unit)}, {duration((total - done) / rate)} left" if rate > 0 else ""
        filled = round(_BAR * done / total) if total else _BAR
        bar = "#" * filled + "." * (_BAR - filled)
        amount = f"{done:.1f}" if self.unit == "cells" else f"{done:.0f}"
        text = f"{self.what} [{bar}] {amount}/{total:.0f} {self.unit}{pace}  {note}".rstrip()
        self.clear()
        if self._terminal:
            sys.stderr.write(text)
            self._text = text
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the line off the terminal."""
        if self._text:
            sys.stderr.write("\r" + " " * len(self._text) + "\r")
            self._text = ""


class _LineHandler(logging.Handler):
    """Log records as plain lines on stderr, above the progress line."""

    def emit(self, record: logging.LogRecord) -> None:
        if Progress._active is not None:
            Progress._active.clear()
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()


def show_log() -> None:
    """Send what the library logs to stderr."""
    logger = logging.getLogger("fastsitch")
    logger.setLevel(logging.INFO)
    logger.handlers = [_LineHandler()]
    logger.propagate = False


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces; numbers to the right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [all(_is_number(row[column]) for row in rows) and bool(rows) for column in range(len(header))]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


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
