"""The commands that hand results out: export, plot, tables, images, compare."""

import sys
from typing import Annotated

import typer

from fastsitch.cli.options import (
    DATA,
    FILES,
    ActivationsOption,
    DataDirOption,
    DebugOption,
    DeviceOption,
    MemoryOption,
    OutOption,
    RootOption,
    RunArgument,
    RunDatasetOption,
    names,
    whole_numbers,
)
from fastsitch.cli.progress_display import ProgressDisplay
from fastsitch.vocabulary import FigureKind, Metric, SplitName


def export(
    run: RunArgument,
    out: OutOption,
    dataset: RunDatasetOption = None,
    root: RootOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the matrices of a run as NumPy files, each with a JSON file that says how it was made."""
    import fastsitch

    for path in fastsitch.export_run(fastsitch.open_run(run, dataset=dataset, root=root), out):
        typer.echo(str(path))


def plot(
    run: RunArgument,
    out: OutOption,
    metric: Annotated[Metric, typer.Option(help="What the colours show.", rich_help_panel=DATA)] = "accuracy",
    figure: Annotated[
        FigureKind,
        typer.Option(
            help="A heat map for each pair, a pair's settings side by side, both ways of two networks, or all pairs on "
            "one page.",
            rich_help_panel=DATA,
        ),
    ] = "pairs",
    matched: Annotated[
        str | None,
        typer.Option(
            help="A run with --loss match: its matrices beside those of RUN.",
            show_default="none",
            rich_help_panel=DATA,
        ),
    ] = None,
    dataset: RunDatasetOption = None,
    root: RootOption = None,
    debug: DebugOption = False,
) -> None:
    """Draw the matrices of a run as annotated heat maps, PNG and PDF."""
    import fastsitch
    from fastsitch.errors import argument
    from fastsitch.runs.sweep_config import checked_run_name

    chosen = fastsitch.open_run(run, dataset=dataset, root=root)
    if matched is not None:
        checked_run_name(matched, argument("matched", matched))
    other = None if matched is None else fastsitch.open_run(matched, dataset=dataset, root=root)
    for path in fastsitch.plot_figures(chosen, out, figure=figure, metric=metric, matched=other):
        typer.echo(f"{path} and {path.with_suffix('.pdf').name}")


def tables(
    run: RunArgument,
    split: Annotated[
        SplitName, typer.Option(help="The images that errors are means over.", rich_help_panel=DATA)
    ] = "train",
    dataset: RunDatasetOption = None,
    device: DeviceOption = "auto",
    out: Annotated[
        str | None,
        typer.Option(
            metavar="<path>", help="Folder for CSV, LaTeX, PNG and PDF.", show_default="none", rich_help_panel=FILES
        ),
    ] = None,
    root: RootOption = None,
    data_dir: DataDirOption = None,
    activations: ActivationsOption = None,
    debug: DebugOption = False,
) -> None:
    """Errors of vanilla and matched stitches (EV, ES, SV) as Tables 1 and 2; what is missing is measured first."""
    import fastsitch
    from fastsitch.analysis.stitch_error_files import read_run_errors
    from fastsitch.files import output_folder
    from fastsitch.report.table_formats import require_tables_replaceable, tables_text, wants_colour, write_tables
    from fastsitch.runs.output_source import source_of

    chosen = fastsitch.open_run(run, dataset=dataset, root=root)
    source = source_of(f"errors on {split} images", chosen)
    if out is not None:
        # before anything is measured
        require_tables_replaceable(output_folder(out), source)
    with ProgressDisplay() as display:
        fastsitch.measure_errors(
            chosen, root=root, data_dir=data_dir, activations=activations, device=device, report=display.report
        )
    errors = read_run_errors(chosen, split)
    typer.echo(tables_text(errors, colour=wants_colour(sys.stdout)))
    for path in [] if out is None else write_tables(errors, out, source):
        typer.echo(str(path))


def images(
    run: RunArgument,
    senders: Annotated[
        str | None, typer.Option(help="Some of the run's senders.", show_default="all", rich_help_panel=DATA)
    ] = None,
    receivers: Annotated[
        str | None, typer.Option(help="Some of the run's receivers.", show_default="all", rich_help_panel=DATA)
    ] = None,
    settings: Annotated[
        str | None, typer.Option(help="Some of the run's settings.", show_default="all", rich_help_panel=DATA)
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Indices of test images, such as 3,17,42.", rich_help_panel=DATA)
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Test images to draw.", show_default="4", rich_help_panel=DATA)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the drawn images.", show_default="0", rich_help_panel=DATA)
    ] = None,
    dataset: RunDatasetOption = None,
    memory: MemoryOption = "auto",
    device: DeviceOption = "auto",
    out: Annotated[
        str | None,
        typer.Option(
            metavar="<path>", help="Folder to write to.", show_default="images, in the run", rich_help_panel=FILES
        ),
    ] = None,
    root: RootOption = None,
    data_dir: DataDirOption = None,
    activations: ActivationsOption = None,
    debug: DebugOption = False,
) -> None:
    """Stitch every sender position into the image and draw what it generates beside the actual image, PNG and PDF."""
    import fastsitch

    with ProgressDisplay() as display:
        paths = fastsitch.images(
            run,
            senders=names(senders),
            receivers=names(receivers),
            settings=names(settings),
            images=None if images is None else whole_numbers("images", images),
            count=count,
            seed=seed,
            out=out,
            root=root,
            dataset=dataset,
            data_dir=data_dir,
            activations=activations,
            device=device,
            memory=memory,
            report=display.report,
        )
    for path in paths:
        typer.echo(f"{path} and {path.with_suffix('.pdf').name}")


def compare(
    run: RunArgument,
    dataset: RunDatasetOption = None,
    root: RootOption = None,
    debug: DebugOption = False,
) -> None:
    """Set a run beside the published matrices of the same pairs and settings."""
    import fastsitch
    from fastsitch.report.comparison import comparison_text

    typer.echo(comparison_text(fastsitch.compare_run(fastsitch.open_run(run, dataset=dataset, root=root))))
