"""Options that several commands share, the groups that help shows them in, and lists typed with commas."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fastsitch.cli import progress_display
from fastsitch.errors import ConfigError, argument
from fastsitch.vocabulary import LOCAL_CLUSTER, ClassToken, Resample, separated

DATA, TRAINING, MATCHING, MACHINE, FILES = "Networks and data", "Training", "Matching", "Machine", "Files"
"""Groups of options, in the order in which help shows them."""


class GroupedCommand(TyperCommand):
    """A command whose help shows its groups of options in one order, whatever that of its parameters."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Sorted by group; within one as they are declared."""
        order = [None, DATA, TRAINING, MATCHING, MACHINE, FILES]
        return sorted(
            super().get_params(ctx), key=lambda parameter: order.index(getattr(parameter, "rich_help_panel", None))
        )


_DATASETS = (
    "fashion-mini, fashion-mnist, cifar10, cifar100, imagefolder:DIR[@SIDE][@COLOUR], npz:FILE or hf:NAME[:CONFIG]."
)

# not Path, for which nothing is the current folder
RootOption = Annotated[
    str | None,
    typer.Option(
        "--root",
        metavar="<path>",
        help="Folder of networks, stores and runs (or FASTSITCH_ROOT).",
        show_default="./fastsitch-data",
        rich_help_panel=FILES,
    ),
]
DataDirOption = Annotated[
    str | None,
    typer.Option(
        "--data-dir",
        metavar="<path>",
        help="Folder with the files of data sets (or FASTSITCH_DATA_DIR).",
        show_default="ROOT/data",
        rich_help_panel=FILES,
    ),
]
DatasetOption = Annotated[
    str | None,
    typer.Option("--dataset", help=_DATASETS, show_default="the one that has the networks", rich_help_panel=DATA),
]
RunDatasetOption = Annotated[
    str | None,
    typer.Option("--dataset", help="Data set of the run, where several have a run of that name.", rich_help_panel=DATA),
]
BackgroundOption = Annotated[
    str | None,
    typer.Option(
        "--background",
        help="What transparent images of a folder show: black, white, grey or #RRGGBB.",
        show_default="black",
        rich_help_panel=DATA,
    ),
]
HoldoutOption = Annotated[
    float | None,
    typer.Option(
        "--holdout",
        help="Share of the images of a folder without split folders that are for the test, such as 0.2.",
        show_default="split folders",
        rich_help_panel=DATA,
    ),
]
TrainImagesOption = Annotated[
    int | None,
    typer.Option(
        "--train-images",
        help="Take so many training images, the same of every class as far as there are.",
        show_default="all",
        rich_help_panel=DATA,
    ),
]
TestImagesOption = Annotated[
    int | None,
    typer.Option("--test-images", help="Take so many test images, likewise.", show_default="all", rich_help_panel=DATA),
]
TrainDatasetOption = Annotated[str, typer.Option("--dataset", help=_DATASETS, rich_help_panel=DATA)]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=MACHINE)]
MemoryOption = Annotated[
    str, typer.Option("--memory", help="auto, or how much to take on the device, such as 8GB.", rich_help_panel=MACHINE)
]
ActivationsOption = Annotated[
    str | None,
    typer.Option(
        "--activations",
        help="Where activation stores lie: a folder or s3://BUCKET/PREFIX (or FASTSITCH_ACTIVATIONS).",
        show_default="ROOT/activations",
        rich_help_panel=FILES,
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Work on a Ray cluster: HOST:PORT, auto for the one on this machine; without an address one is started.",
        show_default="no cluster",
        rich_help_panel=MACHINE,
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what would be done and what it would take; needs neither data nor networks."),
]
ResampleOption = Annotated[
    Resample,
    typer.Option(
        "--resample", help="How sizes that are no multiples of each other are joined.", rich_help_panel=MATCHING
    ),
]
ClassTokenOption = Annotated[
    ClassToken,
    typer.Option(
        "--class-token",
        help="What becomes a receiver's class token: the sender's (else the mean), the mean, or zeros.",
        rich_help_panel=MATCHING,
    ),
]
DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug",
        help="Show the traceback of an error.",
        callback=progress_display.set_debug,
        is_eager=True,
        rich_help_panel=MACHINE,
    ),
]
RunArgument = Annotated[str, typer.Argument(help="Name of the run, as sweep and list show it.")]
OutOption = Annotated[str, typer.Option("--out", metavar="<path>", help="Folder to write to.", rich_help_panel=FILES)]


def with_addresses(arguments: list[str]) -> list[str]:
    """Arguments in which ``--ray`` without an address, last or before another option, asks for a local cluster."""
    following = [*arguments, "-"][1:]
    return [
        f"--ray={LOCAL_CLUSTER}" if typed == "--ray" and after.startswith("-") else typed
        for typed, after in zip(arguments, following, strict=True)
    ]


def names(text: str | None) -> list[str] | None:
    """``"a, b"`` -> ``["a", "b"]``; None stays None."""
    return None if text is None else separated(text)


def whole_numbers(name: str, text: str) -> list[int]:
    """``"1, 2"`` -> ``[1, 2]``; raises ConfigError."""
    try:
        if text.strip() and not separated(text):
            raise ValueError
        return [int(part) for part in separated(text)]
    except ValueError:
        raise ConfigError(f"{argument(name, text)}: expected whole numbers separated by commas") from None


def numbers(name: str, text: str | None) -> list[float] | None:
    """``"0.5, 0.4"`` -> ``[0.5, 0.4]``, None stays None; raises ConfigError."""
    try:
        return None if text is None else [float(part) for part in separated(text)]
    except ValueError:
        raise ConfigError(f"{argument(name, text)}: expected numbers separated by commas") from None
