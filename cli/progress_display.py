"""What a command shows while it works: log lines, and how far it is."""

import logging
import math
import sys
import time
from typing import TYPE_CHECKING

from fastsitch.cli.interrupts import raise_interrupt
from fastsitch.cli.text_formats import duration, rate_text
from fastsitch.errors import printable
from fastsitch.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_PLAIN_INTERVAL = 15.0
"""Seconds between progress lines where the output is not a terminal."""

_debug = False


def set_debug(value: bool) -> bool:
    """Remember whether tracebacks are wanted."""
    global _debug
    _debug = _debug or value
    return value


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return _debug


class ProgressDisplay:
    """A bar on stderr; where that is no terminal, a line now and then. ``report`` is what work is given.

    Rate and time left count anew with every piece of work.
    """

    _active: "ProgressDisplay | None" = None

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._line: TaskID | None = None
        self._work = ("", "", 0.0)
        self._began = self._first = self._written = 0.0

    def __enter__(self) -> "ProgressDisplay":
        ProgressDisplay._active = self
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}", markup=False), BarColumn(24), TextColumn("{task.fields[text]}"))
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        ProgressDisplay._active = None
        if self._bar is not None:
            self._bar.stop()

    def report(self, progress: Progress) -> None:
        """Show how far the work is; raises a Ctrl-C that was swallowed on the way here."""
        raise_interrupt()
        now = time.monotonic()
        work = (progress.task, progress.unit, progress.total)
        if work != self._work:
            self._work, self._began, self._first, self._written = work, now, progress.done, 0.0
        text = _amount(progress) + _pace(progress, progress.done - self._first, now - self._began)
        if self._bar is not None:
            self._draw(self._bar, progress, text)
        elif now - self._written >= _PLAIN_INTERVAL:
            self._written = now
            _write_line(f"{progress.task}: {text}")

    def _draw(self, bar: "Bar", progress: Progress, text: str) -> None:
        if self._line is None:
            self._line = bar.add_task(progress.task, total=progress.total, text=text)
        bar.update(
            self._line, description=progress.task, completed=progress.done, total=progress.total or None, text=text
        )

    def write(self, line: str) -> None:
        """A line above the bar."""
        if self._bar is None:
            _write_line(line)
        else:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _amount(progress: Progress) -> str:
    done = f"{progress.done:.1f}" if progress.unit == "cells" else f"{progress.done:.0f}"
    return f"{done}/{progress.total:.0f} {progress.unit}"


def _pace(progress: Progress, progressed: float, elapsed: float) -> str:
    rate = progressed / elapsed if elapsed > 0 else 0.0
    pace = ""
    if rate > 0:
        left = (progress.total - progress.done) / rate if progress.left is None else progress.left
        # nothing is said of what nobody knows yet
        pace = f", {rate_text(rate, progress.unit)}" + ("" if math.isnan(left) else f", {duration(left)} left")
    return f"{pace}  {progress.note}".rstrip()


def _write_line(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class _LineHandler(logging.Handler):
    """Log records as plain lines on stderr, above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        display, line = ProgressDisplay._active, printable(self.format(record))
        if display is None:
            _write_line(line)
        else:
            display.write(line)


def show_log() -> None:
    """Send what the library logs to stderr."""
    logger = logging.getLogger("fastsitch")
    logger.setLevel(logging.INFO)
    logger.handlers = [_LineHandler()]
    logger.propagate = False
