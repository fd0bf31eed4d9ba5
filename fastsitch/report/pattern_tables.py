"""The triangle and the best matches of a run as text and CSV."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastsitch.analysis.best_match import BestMatchRow, run_best_matches
from fastsitch.analysis.bootstrap import Estimate
from fastsitch.analysis.triangle import TriangleRow, run_triangles
from fastsitch.files import output_folder
from fastsitch.report.write_figures import write_text
from fastsitch.runs.run import Run
from fastsitch.vocabulary import Metric


def patterns_text(run: Run, metric: Metric = "accuracy") -> str:
    """The triangle of every pair and over all pairs, then how often best matches are injective."""
    return f"{triangle_text(run_triangles(run, metric))}\n\n{best_match_text(run_best_matches(run, metric))}"


def triangle_text(rows: Sequence[TriangleRow]) -> str:
    """One line per pair, and one over all pairs of a setting; with several settings also one over all of them."""
    names = [_name(row.pair, row.pairs) for row in rows]
    width = max(map(len, ["pair", *names]))
    lines = [f"{'pair':{width}}  setting  lower left   rest    gap  95 % interval"]
    for name, row in zip(names, rows, strict=True):
        regions = f"{_value(row.regions.lower_left):>10}  {_value(row.regions.rest):>5}  {_value(row.gap.value):>5}"
        lines.append(f"{name:{width}}  {row.setting:7}  {regions}  {_interval(row.gap)}")
    lines.append("lower left: receiver depth j/J <= sender depth i/I; intervals by bootstrap over cells, or over pairs")
    return "\n".join(lines)


def best_match_text(rows: Sequence[BestMatchRow]) -> str:
    """Over all pairs of each setting: how often rows and whole pairs have an injective best match, by epsilon."""
    lines = ["setting  epsilon   rows  95 % interval     pairs  95 % interval     pairs that could"]
    for row in rows:
        if row.pair is None:
            shares = "  ".join(f"{_value(share.value):>5}  {_interval(share):16}" for share in (row.rows, row.pairs))
            lines.append(f"{row.setting:7}  {row.epsilon:7g}  {shares}  {row.possible} of {row.counted}")
    lines.append(
        "share of sender positions whose best receiver position is that of no other, and better than their second best "
        "by epsilon or more"
    )
    return "\n".join(lines)


def write_patterns(run: Run, out: str | os.PathLike[str], metric: Metric = "accuracy") -> list[Path]:
    """Write ``triangle.csv`` and ``best_match.csv``; return the paths.

    One row per pair, one over all pairs of a setting, and with several settings one over all pairs of all of them.
    """
    folder = output_folder(out)
    triangles = [
        [row.setting, *_pair(row.pair), row.pairs, row.regions.lower_left, row.regions.rest, *_numbers(row.gap)]
        for row in run_triangles(run, metric)
    ]
    matches = [
        [
            row.setting,
            *_pair(row.pair),
            row.counted,
            row.possible,
            row.epsilon,
            *_numbers(row.rows),
            *_numbers(row.pairs),
        ]
        for row in run_best_matches(run, metric)
    ]
    pair = ["setting", "sender", "receiver", "pairs"]
    gap = ["lower_left", "rest", "gap", "gap_low", "gap_high"]
    shares = [f"{what}{end}" for what in ("rows", "pairs_held") for end in ("", "_low", "_high")]
    return [
        write_text(folder / "triangle.csv", _csv([*pair, *gap], triangles)),
        write_text(folder / "best_match.csv", _csv([*pair, "possible_pairs", "epsilon", *shares], matches)),
    ]


def _name(pair: tuple[str, str] | None, pairs: int) -> str:
    return f"all {pairs} pairs" if pair is None else " -> ".join(pair)


def _pair(pair: tuple[str, str] | None) -> tuple[str, str]:
    return pair or ("all", "all")


def _value(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "–"


def _interval(estimate: Estimate) -> str:
    return f"{estimate.low:.3f} to {estimate.high:.3f}" if np.isfinite(estimate.low) else "–"


def _numbers(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    return text.getvalue()
