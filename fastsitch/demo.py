"""The main job from nothing: two networks, their stitches, matrices and heat maps."""

from dataclasses import dataclass
from pathlib import Path

from fastsitch.analysis.triangle import triangle
from fastsitch.api_networks import precompute, train
from fastsitch.api_runs import sweep
from fastsitch.files import output_folder
from fastsitch.progress import Report, ignore
from fastsitch.report.heatmap import plot_run
from fastsitch.runs.export import export_run
from fastsitch.runs.run import Run
from fastsitch.vocabulary import DEFAULT_DATASET

SENDER, RECEIVER = "R1111", "R1112"
EPOCHS = 8
"""Epochs of network training: enough for the pattern to be clear, short enough for a laptop."""


@dataclass(frozen=True)
class DemoResult:
    """The finished run, and what to expect of it: a line of text each, and whether it holds."""

    run: Run
    checks: list[tuple[str, bool]]


def run_demo(
    out: Path, *, root: Path | str, width: int = 16, device: str = "auto", report: Report = ignore
) -> DemoResult:
    """Train R1111 and R1112 on the embedded images, stitch them (T2T and R2T), write everything to ``out``.

    What is there already is used again. Raises ConfigError, before any work, where ``out`` cannot be a folder.
    """
    out = output_folder(out)
    records = train(
        SENDER,
        RECEIVER,
        dataset=DEFAULT_DATASET,
        width=width,
        epochs=EPOCHS,
        root=root,
        device=device,
        report=report,
    )
    precompute(
        SENDER,
        f"{SENDER}-random@0",
        dataset=DEFAULT_DATASET,
        root=root,
        device=device,
        report=report,
    )
    run = sweep(
        [SENDER],
        [RECEIVER],
        dataset=DEFAULT_DATASET,
        settings=("T2T", "R2T"),
        run="demo",
        root=root,
        device=device,
        report=report,
    )
    export_run(run, out)
    plot_run(run, out)
    trained = run.matrix(SENDER, RECEIVER, "accuracy", setting="T2T")
    random = run.matrix(SENDER, RECEIVER, "accuracy", setting="R2T")
    regions = triangle(trained)
    fall = float(trained[-1].mean() - random[-1].mean())
    accuracies = [record.accuracy or 0.0 for record in records]
    return DemoResult(
        run,
        [
            (
                f"both networks reach 0.87: {SENDER} {accuracies[0]:.3f}, {RECEIVER} {accuracies[1]:.3f}",
                min(accuracies) >= 0.87,
            ),
            (
                f"T2T: lower left (j/J <= i/I) {regions.lower_left:.3f}, rest {regions.rest:.3f}: "
                f"gap {regions.gap:.3f}, expected at least 0.04",
                regions.gap >= 0.04,
            ),
            (
                f"last row: T2T {trained[-1].mean():.3f}, R2T {random[-1].mean():.3f}: "
                f"difference {fall:.3f}, expected at least 0.3",
                fall >= 0.3,
            ),
        ],
    )
