"""The command that shows what each sender position knows of the image."""

from pathlib import Path
from typing import Annotated

import typer

import fastsitch
from fastsitch.cli.console import Progress
from fastsitch.cli.options import (
    ActivationsOption,
    DataDirOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    RootOption,
    comma_separated,
    whole_numbers,
)
from fastsitch.cli.results import RunArgument
from fastsitch.sweep.execute import SweepReport


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(images)


def images(
    run: RunArgument,
    senders: Annotated[str | None, typer.Option(help="Some of the run's senders.", show_default="all")] = None,
    receivers: Annotated[str | None, typer.Option(help="Some of the run's receivers.", show_default="all")] = None,
    settings: Annotated[str | None, typer.Option(help="Some of the run's settings.", show_default="all")] = None,
    images: Annotated[str | None, typer.Option(help="Indices of test images, such as 3,17,42.")] = None,
    count: Annotated[int | None, typer.Option(help="Test images to draw.", show_default="4")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the drawn images.", show_default="0")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to.", show_default="images, in the run")] = None,
    memory: Annotated[str, typer.Option(help="auto, or what training may take on the device, such as 8GB.")] = "auto",
    root: RootOption = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    activations: ActivationsOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Stitch every sender position into the image and draw what it generates beside the actual image, PNG and PDF."""
    with Progress("images", "cells") as progress:

        def report(step: SweepReport) -> None:
            progress.update(step.cells, step.total, step.unit)

        paths = fastsitch.images(
            run,
            senders=None if senders is None else comma_separated(senders),
            receivers=None if receivers is None else comma_separated(receivers),
            settings=None if settings is None else comma_separated(settings),
            images=None if images is None else whole_numbers("--images", images),
            count=count,
            seed=seed,
            out=out,
            root=root,
            dataset=dataset,
            data_dir=data_dir,
            activations=activations,
            device=device,
            memory=memory,
            report=report,
        )
    for path in paths:
        typer.echo(f"{path} and {path.with_suffix('.pdf').name}")
