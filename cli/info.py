"""The commands that look around: list, doctor."""

import shutil
from pathlib import Path
from typing import Any

import torch
import typer

from fastsitch import inventory
from fastsitch.cli.console import size, table
from fastsitch.cli.options import DebugOption, DeviceOption, RootOption
from fastsitch.machine import (
    available_memory,
    native_bf16,
    processor,
    resolve_device,
    resolve_kernel,
    resolve_precision,
    versions,
)
from fastsitch.root import Root


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("list")(list_root)
    app.command()(doctor)


def list_root(root: RootOption = None, debug: DebugOption = False) -> None:
    """Show networks, activation stores and runs."""
    place = Root.at(root)
    networks = [
        [
            entry.record.name,
            entry.record.dataset,
            str(entry.record.width),
            "x".join(map(str, entry.record.input_shape[1:])),
            f"{entry.record.accuracy:.4f}",
            _recipe(entry.record.recipe),
        ]
        if entry.record is not None
        else [entry.path.stem, entry.path.parent.name, "", "", "unusable", entry.problem]
        for entry in inventory.networks(place)
    ]
    networks += [
        [name, folder, "", "", "", f"not trained, from {source}"] for name, folder, source in inventory.added(place)
    ]
    stores = [
        [entry.path.name, entry.store.identity.dataset, entry.store.identity.dtype, size(entry.store.bytes)]
        if entry.store is not None
        else [entry.path.name, entry.path.parent.name, "unusable", entry.problem]
        for entry in inventory.stores(place)
    ]
    runs = [
        [
            entry.run.name,
            entry.run.config.dataset,
            f"{entry.done}/{entry.total} units",
            entry.run.config.recipe.name,
            f"{','.join(entry.run.config.senders)} -> {','.join(entry.run.config.receivers)}",
        ]
        if entry.run is not None
        else [entry.path.name, entry.path.parent.name, "unusable", "", entry.problem]
        for entry in inventory.runs(place)
    ]
    typer.echo(f"root {place.path}")
    for title, header, rows in (
        ("networks", ["network", "data set", "width", "input", "accuracy", "recipe"], networks),
        ("stores", ["network", "data set", "dtype", "size"], stores),
        ("runs", ["run", "data set", "done", "recipe", "pairs"], runs),
    ):
        typer.echo("")
        elsewhere = title == "stores" and not isinstance(place.stores, Path)
        typer.echo(f"{title}: {f'in {place.stores}, not listed' if elsewhere else len(rows) or 'none'}")
        if rows:
            typer.echo(table(header, rows))


def _recipe(recipe: dict[str, Any]) -> str:
    return f"weights of {recipe['weights']}" if "weights" in recipe else f"{recipe['name']}, {recipe['epochs']} epochs"


def doctor(root: RootOption = None, device: DeviceOption = "auto", debug: DebugOption = False) -> None:
    """Say what this machine will use: device, precision, kernels, threads, versions, disk."""
    place = Root.at(root)
    chosen = resolve_device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else processor()
    bf16 = "native" if native_bf16(chosen) else "not native"
    existing = next(path for path in (place.path.absolute(), *place.path.absolute().parents) if path.exists())
    rows = [
        ["device", f"{chosen.type}: {name}"],
        ["precision", f"{resolve_precision('auto', chosen)} (bf16 is {bf16} here)"],
        ["kernel", resolve_kernel("auto", chosen)],
        ["threads", str(torch.get_num_threads())],
        ["memory", f"{size(available_memory(chosen))} free"],
        ["disk", f"{size(shutil.disk_usage(existing).free)} free for {place.path}"],
        *([name, version] for name, version in versions().items()),
    ]
    typer.echo(table(["this machine", "uses"], rows))
