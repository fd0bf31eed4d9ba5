"""The command that measures: bench."""

import os
from pathlib import Path
from typing import Annotated

import typer

import fastsitch
from fastsitch.benchmark.check import ACCURACY_STEPS, EXACT_STEPS
from fastsitch.benchmark.flops import STUDY_SETTINGS, STUDY_WIDTH
from fastsitch.benchmark.projection import H100_RATE
from fastsitch.benchmark.run import BenchResult
from fastsitch.benchmark.timing import Spread
from fastsitch.cli.console import Progress, duration, table
from fastsitch.cli.options import DebugOption, DeviceOption, RootOption, whole_numbers
from fastsitch.errors import ConfigError
from fastsitch.files import write_json


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(bench)


def bench(
    sender: Annotated[str, typer.Option(help="R1111 ... R2222, ResNet18 or ResNet34.")] = "R1111",
    receiver: Annotated[str, typer.Option(help="The same.")] = "R1111",
    width: Annotated[int, typer.Option(help="Channels of the first stage of both.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 64,
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    kernel: Annotated[str, typer.Option(help="auto, triton or torch.")] = "auto",
    compile_blocks: Annotated[
        str, typer.Option("--compile", help="auto (on with CUDA), on or off: torch.compile of the receiver.")
    ] = "auto",
    group_sizes: Annotated[
        str, typer.Option(help="Cells per batch, separated by commas.", show_default="1, 5, one unit, twice, 4 times")
    ] = "",
    repeats: Annotated[int, typer.Option(help="Rounds; each measures everything once.")] = 5,
    peers: Annotated[bool, typer.Option("--peers", help="Train the same cells in other ways too.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Write ROOT/profile.json, which sweep uses.")] = False,
    json: Annotated[Path | None, typer.Option(help="File for all figures.", show_default="none")] = None,
    root: RootOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Measure this machine: its ceilings, a training step in its parts, the whole study. Needs no networks."""
    if json is not None and json.is_dir():
        raise ConfigError(f"--json {json} is a folder: expected the name of a file")
    if json is not None:
        # said before minutes of measuring, not after
        place = next(parent for parent in json.absolute().parents if parent.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise ConfigError(f"--json {json}: nothing can be written in {place}; expected a folder that can be")
    with Progress("bench", "") as progress:

        def report(what: str, done: int, total: int) -> None:
            progress.restart(f"bench: {what}", "measurements")
            progress.update(done, total)

        result = fastsitch.bench(
            sender=sender,
            receiver=receiver,
            width=width,
            batch_size=batch_size,
            precision=precision,
            kernel=kernel,
            compile=compile_blocks,
            group_sizes=tuple(whole_numbers("--group-sizes", group_sizes)),
            repeats=repeats,
            peers=peers,
            tune=tune,
            root=root,
            device=device,
            report=report,
        )
    typer.echo("\n\n".join(sections(result)))
    if json is not None:
        write_json(json, result.to_dict())
        typer.echo(f"\nall figures: {json}")


def sections(result: BenchResult) -> list[str]:
    """A benchmark as tables for the terminal."""
    sections = [_machine(result), _checks(result), _ceilings(result), _groups(result), _parts(result)]
    if result.peers:
        sections.append(_peers(result))
    sections.append(_projection(result))
    if result.tuning is not None:
        sections.append(
            f"sweeps of width {result.tuning.width}, batch {result.tuning.batch_size}, {result.tuning.precision} will "
            f"use groups of up to {result.tuning.group_size} cells, compile {result.tuning.compile}: {result.profile}"
        )
    return sections


def _machine(result: BenchResult) -> str:
    config = result.config
    return (
        f"{result.machine}, {result.device}, {result.threads} threads, torch {result.versions['torch']}, "
        f"{result.precision}, {result.kernel} kernel, compile {result.compile}\n"
        f"{config.sender} -> {config.receiver}, {result.unit} cells, width {config.width}, batch {config.batch_size}; "
        f"median of {config.repeats} (smallest to largest)\n{result.command}"
    )


def _checks(result: BenchResult) -> str:
    rows = [
        [
            name,
            f"{own.exact_error:.1e}",
            str(own.cells),
            f"{own.our_accuracy:.4f}",
            f"{own.accuracy:.4f}",
            f"{own.largest_difference:.4f}",
        ]
        for name, own in result.agreements.items()
    ]
    head = [
        "checked against",
        f"error, {EXACT_STEPS} steps in fp64",
        "cells",
        f"accuracy, {ACCURACY_STEPS} steps",
        "theirs",
        "largest difference",
    ]
    return table(head, rows)


def _ceilings(result: BenchResult) -> str:
    blocks = [
        [
            block.name,
            str(block.samples),
            f"{block.flops / 1e9:.1f}",
            _spread(block.forward, 1e9),
            _spread(block.gradient, 1e9),
        ]
        for block in result.ceiling.blocks
    ]
    convolutions = table(["convolutions of", "samples", "GFLOP", "forward, GFLOP/s", "gradient, GFLOP/s"], blocks)
    speeds = [[name, _spread(speed, 1e9)] for name, speed in result.bandwidths.items()]
    whole = f"all of them, forward and gradient: {_spread(result.ceiling.rate, 1e9)} GFLOP/s"
    return "\n".join([convolutions, whole, "", table(["bytes", "GB/s"], speeds)])


def _groups(result: BenchResult) -> str:
    rows = [
        [
            str(own.group_size),
            str(own.cells),
            _spread(own.seconds, 1e-3),
            f"{own.rate.median:.0f}",
            f"{own.cost.median * 1e6:.1f}",
            f"{own.flops_rate.median / 1e9:.1f}",
            f"{100 * own.fraction.median:.1f} %",
            _spread(own.over_bare),
        ]
        for own in result.groups
    ]
    head = [
        "group size",
        "cells",
        "step, ms",
        "images x cells/s",
        "us per image and cell",
        "GFLOP/s",
        "of the ceiling",
        "step over bare convolutions",
    ]
    return table(head, rows)


def _parts(result: BenchResult) -> str:
    names = list(result.groups[0].parts)
    rows = []
    for own in result.groups:
        total = sum(part.median for part in own.parts.values())
        shares = [f"{1e3 * part.median:.1f} ({100 * part.median / total:.0f} %)" for part in own.parts.values()]
        rows.append([str(own.group_size), *shares])
    return table(["group size: ms", *names], rows)


def _peers(result: BenchResult) -> str:
    rows = [
        [own.name, str(own.steps), _spread(own.seconds, 1e-3), f"{own.rate.median:.0f}", _spread(own.times_ours)]
        for own in result.peers
    ]
    return table(["all cells", "steps", "step, ms", "images x cells/s", "times ours"], rows)


def _projection(result: BenchResult) -> str:
    own = result.projection
    head = ["the study: 256 pairs, 50,000 images, 4 epochs", "T2T", f"{STUDY_SETTINGS} settings"]
    here = f"here: {100 * own.fraction:.0f} % of {own.ceiling.rate.median / 1e9:.0f} GFLOP/s at width {STUDY_WIDTH}"
    modelled = f"model, not measured: an H100 at {H100_RATE / 1e12:.0f} TFLOP/s"
    return table(
        head,
        [
            [here, duration(own.seconds), duration(own.seconds_all_settings)],
            [modelled, duration(own.h100_seconds), duration(own.h100_seconds_all_settings)],
        ],
    )


def _spread(value: Spread, unit: float = 1.0) -> str:
    """Median (smallest to largest), with three digits."""
    numbers = [number / unit for number in (value.median, value.min, value.max)]
    digits = 0 if numbers[0] >= 100 else 1 if numbers[0] >= 10 else 2
    median, low, high = (f"{number:.{digits}f}" for number in numbers)
    return f"{median} ({low} to {high})"
