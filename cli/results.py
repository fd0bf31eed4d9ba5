"""The commands that hand results out: export, plot, tables, compare; and the table at the end of a sweep."""

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import fastsitch
from fastsitch.analysis.compare import compare_run
from fastsitch.analysis.error_files import SPLITS, run_errors
from fastsitch.analysis.measure import MeasureReport
from fastsitch.analysis.triangle import triangle
from fastsitch.cli.console import Progress, table
from fastsitch.cli.options import ActivationsOption, DataDirOption, DatasetOption, DebugOption, DeviceOption, RootOption
from fastsitch.errors import ConfigError
from fastsitch.files import output_folder
from fastsitch.report.choose import plot_figures
from fastsitch.report.comparison import comparison_text
from fastsitch.report.tables import tables_text, wants_colour, write_tables
from fastsitch.sweep.results import Run

RunArgument = Annotated[str, typer.Argument(help="Name of the run, as sweep and list show it.")]
OutOption = Annotated[Path, typer.Option(help="Folder to write to.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (export, plot, tables, compare):
        app.command()(command)


def export(
    run: RunArgument,
    out: OutOption,
    root: RootOption = None,
    dataset: DatasetOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the matrices of a run as NumPy files, each with a JSON file that says how it was made."""
    for path in fastsitch.export_run(fastsitch.open_run(run, dataset=dataset, root=root), out):
        typer.echo(str(path))


def plot(
    run: RunArgument,
    out: OutOption,
    metric: Annotated[
        str, typer.Option(help="accuracy, accuracy_ratio, accuracy_drop, loss, train_loss or matched_error.")
    ] = "accuracy",
    figure: Annotated[
        str,
        typer.Option(
            help="pairs (one heat map each), controls (a pair's settings side by side), directions (both ways of two "
            "networks) or overview (all pairs on one page)."
        ),
    ] = "pairs",
    matched: Annotated[
        str | None,
        typer.Option(help="A run with --loss match: its matrices beside those of RUN.", show_default="none"),
    ] = None,
    root: RootOption = None,
    dataset: DatasetOption = None,
    debug: DebugOption = False,
) -> None:
    """Draw the matrices of a run as annotated heat maps, PNG and PDF."""
    chosen = fastsitch.open_run(run, dataset=dataset, root=root)
    other = None if matched is None else fastsitch.open_run(matched, dataset=dataset, root=root)
    for path in plot_figures(chosen, out, figure=figure, metric=metric, matched=other):
        typer.echo(f"{path} and {path.with_suffix('.pdf').name}")


def tables(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="Folder for CSV, LaTeX, PNG and PDF.", show_default="none")] = None,
    split: Annotated[str, typer.Option(help="train or test: the images that errors are means over.")] = "train",
    root: RootOption = None,
    data_dir: DataDirOption = None,
    activations: ActivationsOption = None,
    dataset: DatasetOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Errors of vanilla and matched stitches (EV, ES, SV) as Tables 1 and 2; measured first where they are not yet."""
    chosen = fastsitch.open_run(run, dataset=dataset, root=root)
    if split not in SPLITS:
        raise ConfigError(f"--split {split}: expected {' or '.join(SPLITS)}")
    if out is not None:
        # before anything is measured
        output_folder(out)
    with Progress("errors", "units") as progress:

        def report(step: MeasureReport) -> None:
            progress.update(step.units, step.total, step.unit)

        places = {"root": root, "data_dir": data_dir, "activations": activations}
        fastsitch.measure_errors(chosen, device=device, report=report, **places)
    errors = run_errors(chosen, split)
    typer.echo(tables_text(errors, colour=wants_colour(sys.stdout)))
    for path in [] if out is None else write_tables(errors, out):
        typer.echo(str(path))


def compare(
    run: RunArgument,
    root: RootOption = None,
    dataset: DatasetOption = None,
    debug: DebugOption = False,
) -> None:
    """Set a run beside the published matrices of the same pairs and settings."""
    typer.echo(comparison_text(compare_run(fastsitch.open_run(run, dataset=dataset, root=root))))


def summary(run: Run) -> str:
    """One line per pair and setting: cells of those asked for, accuracies by region, diverged cells."""
    asked = {(own.unit.sender, own.unit.receiver, own.unit.setting): len(run.cells(own)) for own in run.units}
    rows = []
    for sender, receiver, setting in run.pairs():
        accuracy = run.matrix(sender, receiver, "accuracy", setting=setting)
        status = run.matrix(sender, receiver, "status", setting=setting)
        _, network = run.pair_networks(sender, receiver, setting)
        regions = triangle(accuracy)
        finite = accuracy[np.isfinite(accuracy)]
        mean, best = (float(finite.mean()), float(finite.max())) if finite.size else (float("nan"), float("nan"))
        rows.append(
            [
                f"{sender} -> {receiver}",
                setting,
                f"{int((status > 0).sum())}/{asked[sender, receiver, setting]}",
                f"{network.accuracy:.3f}",
                f"{mean:.3f}",
                f"{best:.3f}",
                f"{regions.lower_left:.3f}",
                f"{regions.rest:.3f}",
                str(int((status == 2).sum())),
            ]
        )
    header = ["pair", "setting", "cells", "receiver", "mean", "best", "lower left", "rest", "diverged"]
    return table(header, rows)
