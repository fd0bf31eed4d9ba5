"""Error tables as text for a terminal, CSV, LaTeX, PNG and PDF."""

import csv
import io
import os
from pathlib import Path
from typing import TextIO

from fastsitch.analysis.error_tables import (
    COLOURS,
    STATISTICS,
    TABLE_NAMES,
    ErrorTable,
    StitchErrorsByPair,
    colours,
    error_tables,
)
from fastsitch.analysis.stitch_errors import MEASURES
from fastsitch.files import output_folder
from fastsitch.report.table_figure import SHADES, number, table_figure
from fastsitch.report.write_figures import FIGURE_KINDS, save_figure, write_text
from fastsitch.runs.output_source import require_replaceable

_ANSI = {"red": "\x1b[30;41m", "yellow": "\x1b[30;43m", "green": "\x1b[30;42m"}
_PLAIN = "\x1b[0m"


def wants_colour(stream: TextIO) -> bool:
    """Whether text for ``stream`` may be coloured: it is a terminal, and NO_COLOR is unset or empty."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def table_text(table: ErrorTable, *, colour: bool) -> str:
    """One line per setting and statistic; without colour (1), (2) and (3) mark highest, second and lowest."""
    width = 10 if colour else 14
    head = f"{'':8}{'':20}" + "".join(f"{measure:>{width}}" for measure in MEASURES)
    lines = [table.title, f"{head}{'cells':>9}{'left out':>10}"]
    for setting, statistics in table.entries.items():
        for statistic, entry in statistics.items():
            shade = colours(entry)
            line = f"{setting if statistic == STATISTICS[0] else '':8}{statistic:20}"
            for measure in MEASURES:
                text, name = number(entry[measure]), shade.get(measure)
                if colour:
                    padding = " " * (width - len(text) - 2)
                    line += padding + (f"{_ANSI[name]} {text} {_PLAIN}" if name else f" {text} ")
                else:
                    line += f"{text + (f' ({COLOURS.index(name) + 1})' if name else '    '):>{width}}"
            if statistic == STATISTICS[0]:
                line += f"{table.cells[setting]:>9}{table.left_out[setting]:>10}"
            lines.append(line.rstrip())
    lines.append(
        "red highest, yellow second, green lowest of a line"
        if colour
        else "(1) highest, (2) second, (3) lowest of a line"
    )
    return "\n".join(lines)


def tables_text(errors: StitchErrorsByPair, *, colour: bool) -> str:
    """Tables 1 and 2, each unchanged and normalised."""
    return "\n\n".join(table_text(table, colour=colour) for table in error_tables(errors))


def table_csv(table: ErrorTable) -> str:
    """One row per setting and statistic: the measures at full precision, their colours, the numbers of cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    shades = [f"{measure}_colour" for measure in MEASURES]
    writer.writerow(["setting", "statistic", *MEASURES, *shades, "cells", "left_out"])
    for setting, statistics in table.entries.items():
        for statistic, entry in statistics.items():
            shade = colours(entry)
            values = [repr(entry[measure]) for measure in MEASURES]
            names = [shade.get(measure, "") for measure in MEASURES]
            writer.writerow([setting, statistic, *values, *names, table.cells[setting], table.left_out[setting]])
    return text.getvalue()


def table_latex(table: ErrorTable) -> str:
    """A ``tabular`` for ``\\input``; the document needs only the package colortbl."""
    columns = len(MEASURES)
    groups = "l" + ("|" + "r" * columns) * len(STATISTICS)
    titles = " & ".join(
        rf"\multicolumn{{{columns}}}{{{'c' if statistic == STATISTICS[-1] else 'c|'}}}{{{statistic}}}"
        for statistic in STATISTICS
    )
    lines = [
        f"% {table.title}",
        r"% needs \usepackage{colortbl}; red highest, yellow second, green lowest of EV, ES, SV",
        rf"\begin{{tabular}}{{{groups}}}",
        rf"\hline & {titles} \\",
        " & ".join(["", *(MEASURES * len(STATISTICS))]).lstrip() + r" \\ \hline",
    ]
    for setting, statistics in table.entries.items():
        cells: list[str] = [setting]
        for entry in statistics.values():
            shade = colours(entry)
            for measure in MEASURES:
                text, name = number(entry[measure]), shade.get(measure)
                cells.append(rf"\cellcolor[rgb]{{{_rgb(name)}}}{text}" if name else text)
        lines.append(" & ".join(cells) + r" \\")
    counts = "; ".join(
        f"{setting} {table.cells[setting]} cells, {table.left_out[setting]} left out" for setting in table.entries
    )
    return "\n".join([*lines, r"\hline", r"\end{tabular}", f"% {counts}"]) + "\n"


def require_tables_replaceable(folder: Path, source: str) -> None:
    """Raise ConfigError where tables of something else than ``source`` lie in a folder."""
    for name in TABLE_NAMES:
        require_replaceable(folder / f"{name}.png", source)


def write_tables(errors: StitchErrorsByPair, out: str | os.PathLike[str], source: str) -> list[Path]:
    """Write Tables 1 and 2, each unchanged and normalised, as CSV, TEX, PDF and PNG; return all paths.

    ``source`` says what they are of; raises ConfigError where other tables have their names.
    """
    folder = output_folder(out)
    paths = []
    require_tables_replaceable(folder, source)
    for table in error_tables(errors):
        stem = folder / table.name
        paths.append(write_text(stem.with_suffix(".csv"), table_csv(table)))
        paths.append(write_text(stem.with_suffix(".tex"), table_latex(table)))
        save_figure(table_figure(table), stem.with_suffix(".png"), source)
        paths += [stem.with_suffix(f".{kind}") for kind in FIGURE_KINDS]
    return paths


def _rgb(name: str) -> str:
    return ",".join(f"{channel:.2f}" for channel in SHADES[name])
