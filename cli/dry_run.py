"""The text of ``sweep --dry-run``."""

from collections import Counter

import typer

from fastsitch.chains.layout import shape_text
from fastsitch.cli.text_formats import counted, duration, size, table
from fastsitch.network_names import NetworkName
from fastsitch.planning.sweep_estimate import SweepEstimate

_MOST_UNITS = 40


def show_estimate(estimate: SweepEstimate) -> None:
    """Print units, cells, shapes, kinds of stitches, parameters, and predicted memory, disk and time."""
    data = estimate.data
    guess = " (assumed: the files are not there)" if data.assumed else ""
    typer.echo(
        f"{counted(len(estimate.units), 'unit')}, {counted(estimate.cells, 'cell')}, {data.train} + {data.test} images "
        f"{f'{data.height}x{data.width}' if data.height else 'of several sizes'}{guess}"
    )
    recipe = estimate.config.recipe
    epochs = counted(recipe.epochs, "epoch")
    how = f"recipe {recipe.name}: {epochs}, batch {recipe.batch_size}, peak learning rate {recipe.lr}"
    if estimate.config.regresses:
        how += ", on the squared error to the expected representation"
    elif estimate.config.loss == "match":
        how = "matched stitches, exact, without training"
    elif estimate.config.init == "matched":
        how += ", from the matched stitches"
    typer.echo(
        f"{how}; groups of up to {counted(estimate.group_size, 'cell')}, {estimate.precision} on {estimate.device}"
    )
    typer.echo("")
    typer.echo(
        table(
            ["network", "positions", "shapes (C x H x W)"],
            [_shapes(name, estimate) for name in estimate.positions],
        )
    )
    typer.echo("")
    rows = [
        [
            unit.unit.name,
            str(unit.cells),
            str(unit.groups),
            f"{unit.parameters:,}",
            ", ".join(f"{count} {kind}" for kind, count in unit.kinds.items()),
        ]
        for unit in estimate.units[:_MOST_UNITS]
    ]
    typer.echo(table(["unit", "cells", "groups", "parameters", "stitches"], rows))
    if len(estimate.units) > _MOST_UNITS:
        typer.echo(f"... and {len(estimate.units) - _MOST_UNITS} more units")
    kinds: Counter[str] = Counter()
    for unit in estimate.units:
        kinds.update(unit.kinds)
    typer.echo("")
    typer.echo("stitches by kind: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    typer.echo("")
    typer.echo(
        table(
            ["sender", "stored per image", "FLOPs to compute it", "FLOPs per byte", "source (predicted)"],
            [
                [str(sender.name), size(sender.image), f"{sender.flops:.2e}", f"{sender.intensity:,.0f}", sender.source]
                for sender in estimate.senders
            ],
        )
    )
    typer.echo(
        f"source (predicted): {estimate.source}; this machine computes {estimate.flops_rate / 1e9:,.0f} GFLOP/s: what "
        "costs more FLOPs per byte than it does while it reads one is stored"
    )
    fits = "fits" if estimate.memory <= estimate.available else "does NOT fit"
    typer.echo(
        f"memory (predicted): {size(estimate.memory)}, the source and one training step; "
        f"{fits} into the {size(estimate.available)} that are free"
    )
    fit = "fit" if estimate.disk <= estimate.free_disk else "do NOT fit"
    typer.echo(
        f"disk (predicted): {size(estimate.disk)}, stores that will be made and results; "
        f"they {fit} into the {size(estimate.free_disk)} that are free"
    )
    typer.echo(f"time (predicted): {duration(estimate.seconds)}, from the speed of a convolution measured just now")


def _shapes(name: NetworkName, estimate: SweepEstimate) -> list[str]:
    shapes = Counter(shape for _, shape in estimate.positions[name])
    text = ", ".join(f"{count} of {shape_text(shape)}" for shape, count in shapes.items())
    if name in estimate.assumed:
        text += f" (not trained: width {estimate.positions[name][0][1][0]} assumed)"
    return [str(name), str(len(estimate.positions[name])), text]
