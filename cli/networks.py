"""The command that adds networks: add."""

from pathlib import Path
from typing import Annotated

import typer

import fastsitch
from fastsitch.advice import command
from fastsitch.cli.console import table
from fastsitch.cli.options import (
    DataDirOption,
    DebugOption,
    DeviceOption,
    RootOption,
    TrainDatasetOption,
    comma_separated,
    numbers,
)
from fastsitch.data import DEFAULT_DATASET
from fastsitch.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(add)


def add(
    name: Annotated[str, typer.Argument(help="A new name: letters, digits and _; NAME@3 with the weights of seed 3.")],
    source: Annotated[
        str, typer.Option("--from", help="torchvision:NAME, timm:NAME, or FILE.py:FACTORY, whose code is then run.")
    ],
    weights: Annotated[
        Path | None, typer.Option(help="safetensors, or a state dict; nothing in it is executed.", show_default="none")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="Names or patterns, such as 'layer*.?'.", show_default="the outputs of blocks")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Outputs of the network.", show_default="the data set's")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Of pixels in [0, 1]: one number or three.", show_default="the data set's")
    ] = None,
    std: Annotated[str | None, typer.Option(help="As --mean.", show_default="the data set's")] = None,
    resolution: Annotated[
        str | None, typer.Option(help="SIDE or HEIGHTxWIDTH of its images.", show_default="the data set's")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what the name stands for.")] = False,
    root: RootOption = None,
    dataset: TrainDatasetOption = DEFAULT_DATASET,
    data_dir: DataDirOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Let a name stand for a network of torchvision, timm or your own, with or without weights."""
    definition, record = fastsitch.add(
        name,
        source,
        weights=weights,
        positions=None if positions is None else comma_separated(positions),
        classes=classes,
        mean=None if mean is None else numbers("--mean", mean),
        std=None if std is None else numbers("--std", std),
        resolution=None if resolution is None else _size(resolution),
        dataset=dataset,
        force=force,
        root=root,
        data_dir=data_dir,
        device=device,
    )
    size = "x".join(map(str, definition.input_shape))
    typer.echo(f"{name}: {definition.source.text}, {definition.classes} classes, images {size}, on {dataset}")
    rows = [
        [str(own.index), own.name, "x".join(map(str, own.shape)), own.layout + _prefix(own.prefix_tokens)]
        for own in definition.positions
    ]
    typer.echo(table(["position", "name", "shape", "layout"], rows))
    if record is None:
        line = command("train", name, dataset=dataset, root=root)
        typer.echo(f"no weights yet; train it with\n  {line}")
    else:
        typer.echo(f"test accuracy {record.accuracy:.4f} ({record.recipe['name']})")


def _prefix(tokens: int) -> str:
    return f", {tokens} before the grid" if tokens else ""


def _size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--resolution {text}: expected a side such as 64, or HEIGHTxWIDTH")
    return int(parts[0]), int(parts[-1])
