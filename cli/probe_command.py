"""The command that asks what can be read from a network at every position: probe."""

import math
from typing import Annotated

import typer

from fastsitch.cli.options import (
    FILES,
    ActivationsOption,
    BackgroundOption,
    DataDirOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    HoldoutOption,
    RootOption,
    TestImagesOption,
    TrainImagesOption,
)
from fastsitch.cli.progress_display import ProgressDisplay
from fastsitch.cli.text_formats import table


def probe(
    networks: Annotated[list[str], typer.Argument(help="Trained networks, or controls such as R1111-random@0.")],
    dataset: DatasetOption = None,
    background: BackgroundOption = None,
    holdout: HoldoutOption = None,
    train_images: TrainImagesOption = None,
    test_images: TestImagesOption = None,
    device: DeviceOption = "auto",
    json: Annotated[
        str | None,
        typer.Option(metavar="<path>", help="File to write to.", show_default="none", rich_help_panel=FILES),
    ] = None,
    root: RootOption = None,
    data_dir: DataDirOption = None,
    activations: ActivationsOption = None,
    debug: DebugOption = False,
) -> None:
    """Fit a linear probe at every position: what can be read there of the labels."""
    import fastsitch
    from fastsitch.data.dataset_name import with_options

    named = with_options(
        dataset, background=background, holdout=holdout, train_images=train_images, test_images=test_images
    )
    with ProgressDisplay() as display:
        found = fastsitch.probe(
            *networks,
            dataset=named,
            json=json,
            root=root,
            data_dir=data_dir,
            activations=activations,
            device=device,
            report=display.report,
        )
    for network in found:
        own = "no classifier of its own" if math.isnan(network.accuracy) else f"test accuracy {network.accuracy:.4f}"
        source = f"from {network.store}" if network.store else "run once"
        typer.echo(f"{network.network} on {network.dataset}: {own}, {source}")
        rows = [
            [
                str(each.index),
                each.position,
                str(each.features),
                f"{each.strength:g}",
                f"{each.train_accuracy:.4f}",
                f"{each.test_accuracy:.4f}",
            ]
            for each in network.positions
        ]
        typer.echo(table(["position", "name", "features", "strength", "train", "test"], rows))
    if json is not None:
        typer.echo(json)
