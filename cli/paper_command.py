"""The command that reproduces the published study: paper."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from fastsitch.cli.options import (
    DATA,
    FILES,
    MATCHING,
    TRAINING,
    DataDirOption,
    DebugOption,
    DeviceOption,
    DryRunOption,
    MemoryOption,
    RayOption,
    RootOption,
)
from fastsitch.cli.progress_display import ProgressDisplay
from fastsitch.cli.text_formats import duration, size, table
from fastsitch.vocabulary import SETTINGS, STAGES, ReceiverBN, ScaleName, Solver, StitchRecipe, StudyName

if TYPE_CHECKING:
    from fastsitch.study.study_config import StudyOptions
    from fastsitch.study.study_estimate import StudyEstimate


def paper(
    study: Annotated[
        StudyName, typer.Option(help="All pairs of 16 small ResNets, or ResNet18 and ResNet34.", rich_help_panel=DATA)
    ] = "small-resnets",
    scale: Annotated[
        ScaleName,
        typer.Option(help="CIFAR-10 at width 64, or the embedded images and narrower.", rich_help_panel=DATA),
    ] = "full",
    networks: Annotated[
        str,
        typer.Option(
            help="Some of the study's networks, separated by commas.",
            show_default="those of the scale",
            rich_help_panel=DATA,
        ),
    ] = "",
    stages: Annotated[
        str,
        typer.Option(
            help="Some of the stages, separated by commas.", show_default=", ".join(STAGES), rich_help_panel=DATA
        ),
    ] = ",".join(STAGES),
    settings: Annotated[str, typer.Option(help="Some of T2T,T2R,R2T,R2R.", rich_help_panel=DATA)] = ",".join(SETTINGS),
    seeds: Annotated[
        str,
        typer.Option(help="Seeds of the stitches; several give means and 95 % intervals.", rich_help_panel=DATA),
    ] = "0",
    recipe: Annotated[
        StitchRecipe | None,
        typer.Option(help="How stitches are trained.", show_default="the scale's", rich_help_panel=TRAINING),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="Epochs of vanilla stitches; may be fractional.", show_default="the scale's", rich_help_panel=TRAINING
        ),
    ] = None,
    receiver_bn: Annotated[
        ReceiverBN | None,
        typer.Option(
            help="What the receiver's BatchNorm normalises by while vanilla stitches are trained.",
            show_default="frozen",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    solver: Annotated[
        Solver | None,
        typer.Option(
            help="Of matched stitches: without training, or 30 epochs, the published way.",
            show_default="exact",
            rich_help_panel=MATCHING,
        ),
    ] = None,
    memory: MemoryOption = "auto",
    device: DeviceOption = "auto",
    ray: RayOption = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="<path>", help="Folder for all results.", show_default="./paper-STUDY-SCALE", rich_help_panel=FILES
        ),
    ] = None,
    root: RootOption = None,
    data_dir: DataDirOption = None,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
) -> None:
    """The whole published study: networks, stitches, controls, tables, figures. What is there already is kept."""
    import fastsitch

    options: StudyOptions = {
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
    }
    if dry_run:
        _show(fastsitch.estimate_paper(root=root, data_dir=data_dir, device=device, memory=memory, **options))
        return
    start = time.monotonic()
    folder = f"paper-{study}-{scale}" if out is None else out
    with ProgressDisplay() as display:
        files = fastsitch.paper(
            out=folder,
            root=root,
            data_dir=data_dir,
            device=device,
            memory=memory,
            ray=ray,
            report=display.report,
            **options,
        )
    typer.echo(f"{duration(time.monotonic() - start)}; {len(files)} files in {folder}/")


def _show(estimate: "StudyEstimate") -> None:
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
    typer.echo("memory, disk and time are predicted, from the speed of a convolution measured just now; – is little")
    typer.echo(f"source (predicted): {estimate.source}")
