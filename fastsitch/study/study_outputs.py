"""Tables and figures of a study whose runs are finished."""

from dataclasses import dataclass
from pathlib import Path

from fastsitch.analysis.stitch_error_files import read_run_errors
from fastsitch.report.overview_figure import plot_overview
from fastsitch.report.pattern_tables import write_patterns
from fastsitch.report.side_by_side import plot_baseline, plot_controls, plot_directions, plot_matched
from fastsitch.report.table_formats import write_tables
from fastsitch.runs.output_source import source_of
from fastsitch.runs.run import Run
from fastsitch.vocabulary import SPLITS


@dataclass(frozen=True, kw_only=True)
class StudyRuns:
    """The finished runs: vanilla and matched stitches of the same pairs, and each network stitched into its twin."""

    vanilla: list[Run]
    matched: list[Run]
    baselines: list[Run]


def write_all_tables(runs: StudyRuns, out: Path) -> list[Path]:
    """Write Tables 1 and 2, on training and on test images, and the statistics of the triangle; return the paths."""
    files = []
    for split in SPLITS:
        errors = {pair: values for run in runs.vanilla for pair, values in read_run_errors(run, split).items()}
        files += write_tables(errors, out / "tables" / split, source_of(f"errors on {split} images", *runs.vanilla))
    for run in runs.vanilla:
        files += write_patterns(run, out / "patterns" if len(runs.vanilla) == 1 else out / "patterns" / run.name)
    return files


def draw_all_figures(runs: StudyRuns, out: Path) -> list[Path]:
    """Draw Figures 2, 4 and 5, overviews, and the baseline beside the self-pairs; return the PNG paths."""
    files = []
    for vanilla, matched in zip(runs.vanilla, runs.matched, strict=True):
        files += plot_controls(vanilla, out / "controls")
        files += plot_matched(vanilla, matched, out / "matched")
        if len(runs.vanilla) == 1:
            files += plot_overview(vanilla, out)
    if len(runs.vanilla) == 2:
        files += plot_directions(runs.vanilla[0], out, reverse=runs.vanilla[1])
    for twin in runs.baselines:
        files += plot_baseline(runs.vanilla[0], twin, out / "baseline")
    return files
