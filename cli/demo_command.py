"""The command that shows the main job: demo."""

import time
from typing import Annotated

import typer

from fastsitch.cli.options import DATA, FILES, DebugOption, DeviceOption, RootOption
from fastsitch.cli.progress_display import ProgressDisplay
from fastsitch.cli.text_formats import duration


def demo(
    width: Annotated[
        int, typer.Option(help="Channels of the first stage of both networks.", rich_help_panel=DATA)
    ] = 16,
    device: DeviceOption = "auto",
    out: Annotated[
        str, typer.Option(metavar="<path>", help="Folder for matrices and heat maps.", rich_help_panel=FILES)
    ] = "demo",
    root: RootOption = None,
    debug: DebugOption = False,
) -> None:
    """Train two small networks on the embedded images, stitch them, draw the matrices."""
    from fastsitch.cli.run_summary import summary
    from fastsitch.demo import run_demo
    from fastsitch.files import output_folder

    start, folder = time.monotonic(), output_folder(out)
    with ProgressDisplay() as display:
        result = run_demo(
            folder,
            root=folder / "fastsitch-data" if root is None else root,
            width=width,
            device=device,
            report=display.report,
        )
    typer.echo(summary(result.run))
    for line, _ in result.checks:
        typer.echo(line)
    typer.echo(f"{duration(time.monotonic() - start)}; matrices and heat maps in {folder}/")
    if not all(passed for _, passed in result.checks):
        raise typer.Exit(1)
