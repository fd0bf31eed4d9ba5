"""An error table as a figure."""

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fastsitch.analysis.error_tables import STATISTICS, ErrorTable, colours
from fastsitch.analysis.stitch_errors import MEASURES

SHADES = {"red": (0.96, 0.66, 0.62), "yellow": (1.00, 0.93, 0.62), "green": (0.74, 0.89, 0.73)}
"""Backgrounds, light enough for black text; (red, green, blue)."""

_CELL = 0.68
"""Width of a cell in inches."""


def number(value: float) -> str:
    """Two significant digits, as in the published tables: ``4.4e-2``."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def table_figure(table: ErrorTable) -> Figure:
    """Rows are settings, groups of columns statistics; red highest, yellow second, green lowest of EV, ES and SV."""
    columns, rows = len(STATISTICS) * len(MEASURES), len(table.entries)
    # in cells: one column of settings, two rows of heads; the title above and the notes below come on top
    width, height = columns + 1, rows + 2
    figure = Figure(figsize=(_CELL * (width + 0.4), 0.3 * (height + 2.4)))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.2, width + 0.2), ylim=(height + 1.3, -1.1))
    axes.axis("off")
    axes.text(0, -0.5, table.title, fontsize=10, va="center")
    for group, statistic in enumerate(STATISTICS):
        left = 1 + group * len(MEASURES)
        axes.text(left + len(MEASURES) / 2, 0.5, statistic, ha="center", va="center", fontsize=9)
        axes.plot([left, left], [0, height], color="0.6", linewidth=0.6)
        for offset, measure in enumerate(MEASURES):
            axes.text(left + offset + 0.5, 1.5, measure, ha="center", va="center", fontsize=9)
    for row, (setting, statistics) in enumerate(table.entries.items()):
        top = row + 2
        axes.text(0.5, top + 0.5, setting, ha="center", va="center", fontsize=9)
        for group, entry in enumerate(statistics.values()):
            shade = colours(entry)
            for offset, measure in enumerate(MEASURES):
                left = 1 + group * len(MEASURES) + offset
                if measure in shade:
                    axes.add_patch(Rectangle((left, top), 1, 1, facecolor=SHADES[shade[measure]], linewidth=0))
                axes.text(left + 0.5, top + 0.5, number(entry[measure]), ha="center", va="center", fontsize=8)
    for line in (0, 2, height):
        axes.plot([0, width], [line, line], color="black", linewidth=0.8)
    counts = ", ".join(
        f"{setting} {table.cells[setting]}"
        + (f" ({table.left_out[setting]} left out)" if table.left_out[setting] else "")
        for setting in table.entries
    )
    note = f"red highest, yellow second, green lowest of EV, ES, SV; cells: {counts}"
    axes.text(0, height + 0.6, note, fontsize=7.5, va="center", color="0.3")
    return figure
