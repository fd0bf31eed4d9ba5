"""The commands that look around: list, doctor."""

from typing import Any

import typer

from fastsitch.cli.options import DebugOption, RootOption
from fastsitch.cli.text_formats import counted, size, table


def list_root(root: RootOption = None, debug: DebugOption = False) -> None:
    """Show networks, activation stores and runs."""
    from fastsitch.errors import ConfigError, argument, printable
    from fastsitch.root import Root
    from fastsitch.runs import inventory

    here = Root.at(root)
    if root is not None and not here.path.exists():
        raise ConfigError(f"{argument('root', root)}: there is no such folder")
    networks = [
        [
            entry.record.name,
            entry.record.dataset,
            str(entry.record.width),
            "x".join(map(str, entry.record.input_shape[1:])),
            "none" if entry.record.accuracy is None else f"{entry.record.accuracy:.4f}",
            _recipe(entry.record.recipe),
        ]
        if entry.record is not None
        else [entry.path.stem, entry.dataset, "", "", "unusable", entry.problem]
        for entry in inventory.networks(here)
    ]
    networks += [
        [name, dataset, "", "", "", f"not trained, from {source}"] for name, dataset, source in inventory.added(here)
    ]
    stores = [
        [entry.path.name, entry.store.identity.dataset, entry.store.identity.dtype, size(entry.store.bytes)]
        if entry.store is not None
        else [entry.path.name, entry.dataset, "unusable", entry.problem]
        for entry in inventory.stores(here)
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
        else [entry.path.name, entry.dataset, "unusable", "", entry.problem]
        for entry in inventory.runs(here)
    ]
    typer.echo(f"root {printable(str(here.path))}")
    for title, header, rows in (
        ("networks", ["network", "data set", "width", "input", "accuracy", "recipe"], networks),
        ("stores", ["network", "data set", "dtype", "size"], stores),
        ("runs", ["run", "data set", "done", "recipe", "pairs"], runs),
    ):
        typer.echo("")
        elsewhere = title == "stores" and not here.stores.listable
        typer.echo(f"{title}: {f'in {here.stores}, not listed' if elsewhere else len(rows) or 'none'}")
        if rows:
            typer.echo(table(header, rows))


def _recipe(recipe: dict[str, Any]) -> str:
    return (
        f"weights of {recipe['weights']}" + (", linear probe" if "probe" in recipe else "")
        if "weights" in recipe
        else f"{recipe['name']}, {counted(recipe['epochs'], 'epoch')}"
    )
