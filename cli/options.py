"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from fastsitch.cli import console
from fastsitch.cluster.connect import LOCAL
from fastsitch.errors import ConfigError

RootOption = Annotated[
    Path | None,
    typer.Option(
        "--root",
        help="Folder of networks, stores and runs (or FASTSITCH_ROOT).",
        show_default="./fastsitch-data",
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Folder with the files of data sets (or FASTSITCH_DATA_DIR).",
        show_default="ROOT/data",
    ),
]
DatasetOption = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="fashion-mini, fashion-mnist, cifar10, cifar100, imagefolder:DIR[@SIDE] or npz:FILE.",
        show_default="the one that has the networks",
    ),
]
TrainDatasetOption = Annotated[
    str,
    typer.Option(
        "--dataset", help="fashion-mini, fashion-mnist, cifar10, cifar100, imagefolder:DIR[@SIDE] or npz:FILE."
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
ActivationsOption = Annotated[
    str | None,
    typer.Option(
        "--activations",
        help="Where activation stores lie: a folder or s3://BUCKET/PREFIX (or FASTSITCH_ACTIVATIONS).",
        show_default="ROOT/activations",
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Work on a Ray cluster: HOST:PORT, auto for the one on this machine; without an address one is started.",
        show_default="no cluster",
    ),
]
DebugOption = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", callback=console.set_debug, is_eager=True),
]


def with_addresses(arguments: list[str]) -> list[str]:
    """Arguments in which ``--ray`` without an address, last or before another option, asks for a local cluster."""
    following = [*arguments, "-"][1:]
    return [
        f"--ray={LOCAL}" if own == "--ray" and after.startswith("-") else own
        for own, after in zip(arguments, following, strict=True)
    ]


def comma_separated(text: str) -> list[str]:
    """``"a, b"`` -> ``["a", "b"]``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(option: str, text: str) -> list[int]:
    """``"1, 2"`` -> ``[1, 2]``; raises ConfigError."""
    try:
        if text.strip() and not comma_separated(text):
            raise ValueError
        return [int(part) for part in comma_separated(text)]
    except ValueError:
        raise ConfigError(f"{option} {text}: expected whole numbers separated by commas") from None


def numbers(option: str, text: str) -> list[float]:
    """``"0.5, 0.4"`` -> ``[0.5, 0.4]``; raises ConfigError."""
    try:
        return [float(part) for part in comma_separated(text)]
    except ValueError:
        raise ConfigError(f"{option} {text}: expected numbers separated by commas") from None
