"""The command that measures this machine: bench."""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fastsitch.cli.options import (
    DATA,
    FILES,
    MACHINE,
    ClassTokenOption,
    DataDirOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    ResampleOption,
    RootOption,
    whole_numbers,
)
from fastsitch.cli.progress_display import ProgressDisplay
from fastsitch.errors import ConfigError, argument
from fastsitch.vocabulary import Compile, Kernel, Precision


def bench(
    sender: Annotated[
        str,
        typer.Option(help="R1111 ... R2222, ResNet18, ResNet34, or a network that was added.", rich_help_panel=DATA),
    ] = "R1111",
    receiver: Annotated[str, typer.Option(help="The same for the receiver.", rich_help_panel=DATA)] = "R1111",
    dataset: DatasetOption = None,
    width: Annotated[
        int, typer.Option(help="Channels of the first stage of small ResNets.", rich_help_panel=DATA)
    ] = 16,
    batch_size: Annotated[int, typer.Option(help="Images per step.", rich_help_panel=DATA)] = 64,
    group_sizes: Annotated[
        str,
        typer.Option(
            help="Cells per batch, separated by commas.",
            show_default="1, 5, one unit, twice, 4 times",
            rich_help_panel=DATA,
        ),
    ] = "",
    resample: ResampleOption = "none",
    class_token: ClassTokenOption = "sender",
    peers: Annotated[
        bool, typer.Option("--peers", help="Train the same cells in other ways too.", rich_help_panel=DATA)
    ] = False,
    repeats: Annotated[int, typer.Option(help="Rounds; each measures everything once.", rich_help_panel=MACHINE)] = 5,
    precision: Annotated[
        Precision, typer.Option(help="Numbers in which networks and stitches compute.", rich_help_panel=MACHINE)
    ] = "auto",
    kernel: Annotated[
        Kernel, typer.Option(help="Implementation of the stitch operator.", rich_help_panel=MACHINE)
    ] = "auto",
    compile_blocks: Annotated[
        Compile,
        typer.Option("--compile", help="torch.compile of the receiver; auto: with CUDA.", rich_help_panel=MACHINE),
    ] = "auto",
    device: DeviceOption = "auto",
    tune: Annotated[
        bool, typer.Option("--tune", help="Write ROOT/profile.json, which sweep uses.", rich_help_panel=FILES)
    ] = False,
    json: Annotated[
        str | None,
        typer.Option(metavar="<path>", help="File for all figures.", show_default="none", rich_help_panel=FILES),
    ] = None,
    root: RootOption = None,
    data_dir: DataDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure this machine: its ceilings, a training step in its parts, its memory, the whole study.

    R1111 ... R2222 need no networks: they are made and briefly trained on embedded images.
    """
    import fastsitch
    from fastsitch.cli.bench_text import sections
    from fastsitch.files import write_json

    # said before minutes of measuring, not after
    file = None if json is None else _writable(json)
    with ProgressDisplay() as display:
        result = fastsitch.bench(
            sender=sender,
            receiver=receiver,
            dataset=dataset,
            width=width,
            batch_size=batch_size,
            precision=precision,
            kernel=kernel,
            compile=compile_blocks,
            group_sizes=tuple(whole_numbers("group_sizes", group_sizes)),
            resample=resample,
            class_token=class_token,
            repeats=repeats,
            peers=peers,
            tune=tune,
            root=root,
            data_dir=data_dir,
            device=device,
            report=display.report,
        )
    typer.echo("\n\n".join(sections(result)))
    if file is not None:
        write_json(file, result.to_dict())
        typer.echo(f"\nall figures: {file}")


def _writable(given: str) -> Path:
    """The file that is to be written; raises ConfigError where it cannot be."""
    from fastsitch.files import output_path, require_regular

    file = output_path("json", given, "file")
    if file.is_dir():
        raise ConfigError(f"{argument('json', file)} is a folder: expected the name of a file")
    require_regular(file)
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{argument('json', file)}: cannot write in {folder}; expected a folder that can be written")
    try:
        # what looks as if it could be written may not be, such as a name in /proc
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{argument('json', file)}: cannot write in {folder} ({error.strerror})") from None
    return file
