"""Tables 1 and 2: statistics and colours for an example worked out by hand, in every output format."""

import csv
import io
import os
import pty
from pathlib import Path

import numpy as np
import pytest

from fastsitch.analysis.error_tables import TABLE_NAMES, StitchErrorsByPair, colours, error_table, error_tables
from fastsitch.analysis.stitch_errors import StitchErrors
from fastsitch.report.table_figure import number, table_figure
from fastsitch.report.table_formats import table_csv, table_latex, table_text, tables_text, wants_colour, write_tables

SQUARE = StitchErrors(
    EV=np.array([[4.0, 1.0], [2.0, 8.0]]),
    ES=np.array([[1.0, 3.0], [1.0, 2.0]]),
    SV=np.array([[2.0, 2.0], [2.0, 9.0]]),
    variance=np.array([2.0, 4.0]),
)
WIDE = StitchErrors(
    EV=np.array([[6.0, np.nan, 5.0], [3.0, 10.0, 0.5]]),
    ES=np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
    SV=np.array([[6.0, np.nan, 5.0], [4.0, 7.0, 0.5]]),
    variance=np.array([2.0, 1.0, 0.0]),
)


@pytest.fixture
def errors() -> StitchErrorsByPair:
    return {
        ("R1111", "R1111", "T2T"): SQUARE,
        ("R1111", "R1112", "T2T"): WIDE,
        ("R1111", "R1111", "R2T"): SQUARE,
    }


def test_statistics_of_the_diagonal_equal_those_worked_out_by_hand(errors: StitchErrorsByPair) -> None:
    table = error_table(errors, diagonal=True)
    # cells (0, 0), (1, 1) of both: EV 4, 8, 6, 10; ES 1, 2, 0, 1; SV 2, 9, 6, 7
    assert list(table.entries) == ["T2T", "R2T"]
    assert table.entries["T2T"] == {
        "minimum": {"EV": 4, "ES": 0, "SV": 2},
        "mean": {"EV": 7, "ES": 1, "SV": 6},
        "maximum": {"EV": 10, "ES": 2, "SV": 9},
        "standard deviation": {
            "EV": pytest.approx(np.sqrt(5)),
            "ES": pytest.approx(np.sqrt(0.5)),
            "SV": pytest.approx(np.sqrt(26 / 4)),
        },
    }
    assert (table.cells, table.left_out) == ({"T2T": 4, "R2T": 2}, {"T2T": 0, "R2T": 0})


def test_cells_without_a_value_are_left_out_of_all_columns_and_counted(errors: StitchErrorsByPair) -> None:
    table = error_table(errors, diagonal=False)
    assert (table.cells, table.left_out) == ({"T2T": 9, "R2T": 4}, {"T2T": 1, "R2T": 0})
    # the ES of the cell that diverged is 0 and does not count
    assert table.entries["T2T"]["mean"]["ES"] == pytest.approx((1 + 3 + 1 + 2 + 0 + 0 + 1 + 1 + 1) / 9)
    assert table.entries["T2T"]["maximum"] == {"EV": 10, "ES": 3, "SV": 9}


def test_normalised_errors_are_over_the_variance_of_the_expected_representation(errors: StitchErrorsByPair) -> None:
    table = error_table(errors, diagonal=True, normalised=True)
    # EV 4/2, 8/4, 6/2, 10/1; ES 1/2, 2/4, 0/2, 1/1; SV 2/2, 9/4, 6/2, 7/1
    assert table.entries["T2T"]["mean"] == {
        "EV": pytest.approx(17 / 4),
        "ES": pytest.approx(2 / 4),
        "SV": pytest.approx(13.25 / 4),
    }
    # the position that does not vary has no normalised error: two cells, and the one that diverged
    assert error_table(errors, diagonal=False, normalised=True).left_out["T2T"] == 3


def test_a_table_without_any_cell_is_empty_not_wrong() -> None:
    nothing = np.full((2, 2), np.nan)
    lost = StitchErrors(EV=nothing, ES=nothing, SV=nothing, variance=np.ones(2))
    table = error_table({("R1111", "R1111", "T2T"): lost}, diagonal=False)
    assert np.isnan(list(table.entries["T2T"]["mean"].values())).all()
    assert (table.cells["T2T"], table.left_out["T2T"]) == (0, 4)
    assert "nan" in table_text(table, colour=False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((3.0, 1.0, 2.0), ("red", "green", "yellow")),
        ((1.0, 2.0, 3.0), ("green", "yellow", "red")),
        ((2.0, 1.0, 2.0), ("red", "green", "red")),
        ((2.0, 1.0, 1.0), ("red", "green", "green")),
        ((1.0, 1.0, 1.0), ("red", "red", "red")),
    ],
)
def test_highest_red_second_yellow_lowest_green(values: tuple[float, ...], expected: tuple[str, ...]) -> None:
    entry = dict(zip(("EV", "ES", "SV"), values, strict=True))
    assert tuple(colours(entry).values()) == expected


def test_numbers_have_two_digits() -> None:
    assert [number(value) for value in (0.044, 430000.0, 1.0, 2.2e-5, 0.0, np.nan)] == [
        "4.4e-2",
        "4.3e5",
        "1.0e0",
        "2.2e-5",
        "0.0e0",
        "nan",
    ]


def test_the_text_marks_ranks_or_colours_them(errors: StitchErrorsByPair) -> None:
    table = error_table(errors, diagonal=True)
    plain = table_text(table, colour=False)
    assert "\x1b" not in plain
    line = next(line for line in plain.splitlines() if line.strip().startswith("mean"))
    assert line.split() == ["mean", "7.0e0", "(1)", "1.0e0", "(3)", "6.0e0", "(2)"]
    coloured = table_text(table, colour=True)
    for shown in ("\x1b[30;41m 7.0e0 \x1b[0m", "\x1b[30;42m 1.0e0 \x1b[0m", "\x1b[30;43m 6.0e0 \x1b[0m"):
        assert shown in coloured
    assert tables_text(errors, colour=False).startswith(plain)
    assert max(map(len, plain.splitlines()[1:])) <= 100


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not wants_colour(io.StringIO())
    master, slave = pty.openpty()
    with os.fdopen(master), os.fdopen(slave, "w") as terminal:
        assert wants_colour(terminal)
        monkeypatch.setenv("NO_COLOR", "1")
        assert not wants_colour(terminal)
        monkeypatch.setenv("NO_COLOR", "")
        assert wants_colour(terminal)


def test_the_csv_holds_every_digit(errors: StitchErrorsByPair) -> None:
    table = error_table(errors, diagonal=True)
    rows = list(csv.DictReader(io.StringIO(table_csv(table))))
    assert len(rows) == 8
    for row in rows:
        entry = table.entries[row["setting"]][row["statistic"]]
        assert {measure: float(row[measure]) for measure in entry} == entry
        assert {measure: row[f"{measure}_colour"] for measure in entry} == colours(entry)
        assert (int(row["cells"]), int(row["left_out"])) == (table.cells[row["setting"]], 0)


def test_the_latex_is_a_whole_tabular(errors: StitchErrorsByPair) -> None:
    text = table_latex(error_table(errors, diagonal=True))
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    assert lines[0].startswith(r"\begin{tabular}{l|rrr|rrr|rrr|rrr}")
    assert lines[-1] == r"\end{tabular}"
    assert text.count("{") == text.count("}")
    body = [line for line in lines if line.startswith(("T2T", "R2T"))]
    assert len(body) == 2
    for line in body:
        assert line.endswith(r"\\")
        assert line.count("&") == 12
        assert line.count(r"\cellcolor[rgb]{") == 12
    assert r"\cellcolor[rgb]{0.96,0.66,0.62}4.0e0 & \cellcolor[rgb]{0.74,0.89,0.73}0.0e0" in body[0]


def test_the_figure_shows_every_number(errors: StitchErrorsByPair) -> None:
    table = error_table(errors, diagonal=True)
    axes = table_figure(table).axes[0]
    shown = [text.get_text() for text in axes.texts]
    for statistics in table.entries.values():
        for entry in statistics.values():
            assert {number(value) for value in entry.values()} <= set(shown)
    assert len(axes.patches) == 24


def test_all_tables_are_written_in_all_formats(errors: StitchErrorsByPair, tmp_path: Path) -> None:
    names = [table.name for table in error_tables(errors)]
    assert tuple(names) == TABLE_NAMES
    paths = write_tables(errors, tmp_path / "out", "errors on train images of run a")
    assert sorted(paths) == sorted((tmp_path / "out").iterdir())
    assert {path.name for path in paths} == {
        f"{name}.{kind}" for name in names for kind in ("csv", "tex", "pdf", "png")
    }
    assert (tmp_path / "out" / "table_2.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out" / "table_2.pdf").read_bytes()[:5] == b"%PDF-"
    assert (tmp_path / "out" / "table_1.csv").read_text() == table_csv(error_table(errors, diagonal=True))
