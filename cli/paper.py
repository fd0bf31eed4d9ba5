"""The command that reproduces the published study: paper."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

import fastsitch
from fastsitch.cli.console import Progress, duration, size, table
from fastsitch.cli.options import DataDirOption, DebugOption, DeviceOption, RayOption, RootOption
from fastsitch.paper.estimate import PaperEstimate
from fastsitch.paper.study import SCALES, STAGES, STUDIES
from fastsitch.sweep.config import SETTINGS


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(paper)


def paper(
    study: Annotated[str, typer.Option(help=" or ".join(STUDIES) + ".")] = "small-resnets",
    scale: Annotated[
        str, typer.Option(help=", ".join(SCALES) + ": CIFAR-10 at width 64, or the embedded data and less.")
    ] = "full",
    networks: Annotated[
        str, typer.Option(help="Some of the study's networks, separated by commas.", show_default="those of the scale")
    ] = "",
    stages: Annotated[
        str, typer.Option(help="Some of the stages, separated by commas.", show_default=", ".join(STAGES))
    ] = ",".join(STAGES),
    settings: Annotated[str, typer.Option(help="Some of T2T,T2R,R2T,R2R.")] = ",".join(SETTINGS),
    seeds: Annotated[str, typer.Option(help="Seeds of the stitches; several give means and 95 % intervals.")] = "0",
    recipe: Annotated[
        str | None,
        typer.Option(help="paper, small or published-schedule.", show_default="the scale's"),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Epochs of vanilla stitches; may be fractional.", show_default="the scale's")
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(help="Of matched stitches: exact; or sgd, 30 epochs, the published way.", show_default="exact"),
    ] = None,
    receiver_bn: Annotated[
        str | None,
        typer.Option(
            help="frozen, or batch: vanilla stitches are trained with batch statistics in the receiver.",
            show_default="frozen",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for all results.", show_default="./paper-STUDY-SCALE")
    ] = None,
    memory: Annotated[str, typer.Option(help="auto, or what the study may take on the device, such as 8GB.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    root: RootOption = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = "auto",
    ray: RayOption = None,
    debug: DebugOption = False,
) -> None:
    """The whole published study: networks, stitches, controls, tables, figures. What is there already is kept."""
    options: dict[str, Any] = {
        "study": study,
        "scale": scale,
        "networks": networks,
        "stages": stages,
        "settings": settings,
        "seeds": seeds,
        "recipe": recipe,
        "epochs": epochs,
        "solver": solver,
        "receiver_bn": receiver_bn,
        "root": root,
        "data_dir": data_dir,
        "device": device,
        "memory": memory,
    }
    if dry_run:
        _show(fastsitch.estimate_paper(**options))
        return
    start = time.monotonic()
    with Progress("paper", "") as progress:

        def report(what: str, unit: str, done: float, total: float) -> None:
            progress.restart(what, unit)
            progress.update(done, total)

        folder = out or Path(f"paper-{study}-{scale}")
        files = fastsitch.paper(out=folder, ray=ray, report=report, **options)
    typer.echo(f"{duration(time.monotonic() - start)}; {len(files)} files in {folder}/")


def _show(estimate: PaperEstimate) -> None:
    config = estimate.config
    scale = config.dimensions
    typer.echo(
        f"{config.study}, {config.scale}: {len(config.chosen)} networks of width {scale.width} on {scale.dataset}; "
        f"{estimate.cells:,} cells, "
        + ", ".join(f"{setting} {cells:,}" for setting, cells in estimate.cells_by_setting.items())
    )
    typer.echo("networks: " + ", ".join((*config.chosen, *config.twins)))
    typer.echo("")
    rows = [
        [
            stage.stage,
            str(stage.networks or "–"),
            f"{stage.units:,}" if stage.units else "–",
            f"{stage.cells:,}" if stage.cells else "–",
            size(stage.memory) if stage.memory else "–",
            size(stage.disk) if stage.disk else "–",
            duration(stage.seconds) if stage.seconds else "–",
        ]
        for stage in estimate.stages
    ]
    typer.echo(table(["stage", "networks", "units", "cells", "memory", "disk", "time"], rows))
    typer.echo("memory, disk and time are a model, from the speed of a convolution measured just now; – is little")
    typer.echo(f"source (model): {estimate.source}")
