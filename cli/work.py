"""The commands that compute: train, precompute, sweep, demo."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

import fastsitch
from fastsitch.activations.store import ActivationStore
from fastsitch.cli.console import Progress, duration, size
from fastsitch.cli.estimates import show_estimate
from fastsitch.cli.options import (
    ActivationsOption,
    DataDirOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    RayOption,
    RootOption,
    TrainDatasetOption,
    comma_separated,
    whole_numbers,
)
from fastsitch.cli.results import summary
from fastsitch.data import DEFAULT_DATASET
from fastsitch.demo import run_demo
from fastsitch.errors import ConfigError
from fastsitch.networks.checkpoint import NetworkRecord
from fastsitch.networks.names import NetworkName
from fastsitch.networks.training import TrainReport
from fastsitch.sweep.config import checked_run_name
from fastsitch.sweep.execute import SweepReport


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (train, precompute, sweep, demo):
        app.command()(command)


def train(
    networks: Annotated[
        list[str], typer.Argument(help="R1111 ... R2222, ResNet18, ResNet34 or added; R1111@3 is seed 3.")
    ],
    width: Annotated[int, typer.Option(help="Channels of the first stage; of small ResNets only.")] = 64,
    epochs: Annotated[int | None, typer.Option(help="Epochs of training.", show_default="the recipe's")] = None,
    seed: Annotated[int, typer.Option(help="Seed of networks named without one.")] = 0,
    recipe: Annotated[str, typer.Option(help="fast or published.")] = "fast",
    resolution: Annotated[
        int | None,
        typer.Option(help="Side to which images are resized, a multiple of 8.", show_default="as they are"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train again what was trained otherwise.")] = False,
    root: RootOption = None,
    dataset: TrainDatasetOption = DEFAULT_DATASET,
    data_dir: DataDirOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Train networks and save them."""
    with Progress("training", "steps") as progress:
        last: dict[NetworkName, float] = {}

        def report(name: NetworkName, step: TrainReport) -> None:
            if step.loss is not None:
                last[name] = step.loss
            loss = f", loss {last[name]:.3f}" if name in last else ""
            progress.restart(f"training {name}", "steps")
            progress.update(step.step, step.steps, loss.lstrip(", "))

        def finished(record: NetworkRecord) -> None:
            progress.clear()
            typer.echo(
                f"{record.name}: test accuracy {record.accuracy:.4f}, width {record.width}, "
                f"{record.recipe['epochs']} epochs on {record.dataset}"
            )

        fastsitch.train(
            *networks,
            dataset=dataset,
            width=width,
            epochs=epochs,
            seed=seed,
            recipe=recipe,
            resolution=resolution,
            force=force,
            root=root,
            data_dir=data_dir,
            device=device,
            report=report,
            finished=finished,
        )


def precompute(
    networks: Annotated[list[str], typer.Argument(help="Trained networks, or controls such as R1111-random@0.")],
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    compress: Annotated[str, typer.Option(help="none or zstd.")] = "none",
    force: Annotated[bool, typer.Option("--force", help="Replace stores that are stale or damaged.")] = False,
    root: RootOption = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    activations: ActivationsOption = None,
    device: DeviceOption = "auto",
    ray: RayOption = None,
    debug: DebugOption = False,
) -> None:
    """Run each network once and store its representations at every position."""
    with Progress("precompute", "images") as progress:

        def report(name: NetworkName, done: int, total: int) -> None:
            progress.restart(f"precompute {name}", "images")
            progress.update(done, total)

        def finished(name: NetworkName, store: ActivationStore, made: bool) -> None:
            progress.clear()
            state = "made" if made else "up to date"
            typer.echo(f"{name}: {len(store.positions)} positions, {size(store.bytes)}, {state}: {store.path}")

        fastsitch.precompute(
            *networks,
            dataset=dataset,
            dtype=dtype,
            compress=compress,
            force=force,
            root=root,
            data_dir=data_dir,
            activations=activations,
            device=device,
            ray=ray,
            report=report,
            finished=finished,
        )


def sweep(
    senders: Annotated[str, typer.Option(help="Networks to take representations from, separated by commas.")],
    receivers: Annotated[str, typer.Option(help="Networks to stitch into, separated by commas.")],
    settings: Annotated[str, typer.Option(help="Some of T2T,T2R,R2T,R2R; R networks are random controls.")] = "T2T",
    recipe: Annotated[
        str | None,
        typer.Option(help="paper, small or published-schedule.", show_default="small for fashion-mini, else paper"),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Epochs; may be fractional.", show_default="the recipe's; 30 with --solver sgd"),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="the recipe's")] = None,
    optimizer: Annotated[
        str, typer.Option(help="sgd, or preconditioned: SGD in whitened inputs, for --init matched.")
    ] = "sgd",
    batch_size: Annotated[int | None, typer.Option(help="Images per step.", show_default="the recipe's")] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Train only between these positions: names or patterns, 'stem,layer*.0'.", show_default="all"
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the stitches and the order of images.")] = "0",
    run: Annotated[str | None, typer.Option(help="Name of the run.", show_default="from the configuration")] = None,
    group_size: Annotated[str, typer.Option(help="auto, or the largest number of cells per batch.")] = "auto",
    memory: Annotated[str, typer.Option(help="auto, or what the sweep may take on the device, such as 8GB.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    kernel: Annotated[str, typer.Option(help="auto, triton or torch.")] = "auto",
    compile_blocks: Annotated[
        str, typer.Option("--compile", help="auto (on with CUDA), on or off: torch.compile of the receiver.")
    ] = "auto",
    source: Annotated[
        str,
        typer.Option(help="auto, resident (in memory), streamed (read while in use) or live (the sender runs again)."),
    ] = "auto",
    loss: Annotated[str, typer.Option(help="task, or match: least squares to what the receiver expects.")] = "task",
    solver: Annotated[
        str, typer.Option(help="Of --loss match: exact, without training; or sgd: trained, the published way.")
    ] = "exact",
    init: Annotated[str, typer.Option(help="default, or matched: training starts at the matched stitch.")] = "default",
    receiver_bn: Annotated[
        str,
        typer.Option(help="frozen, or batch: the receiver's BatchNorm uses batch statistics per stitch in training."),
    ] = "frozen",
    resample: Annotated[
        str, typer.Option(help="none, or how sizes that are no multiples of each other are joined: area or bilinear.")
    ] = "none",
    class_token: Annotated[
        str,
        typer.Option(help="A receiver's class token comes from the sender's (else the mean), mean or zero."),
    ] = "sender",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    root: RootOption = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    activations: ActivationsOption = None,
    device: DeviceOption = "auto",
    ray: RayOption = None,
    debug: DebugOption = False,
) -> None:
    """Train the stitches between all pairs; a run that exists is continued."""
    if precision not in ("auto", "bf16", "fp32"):
        raise ConfigError(f"--precision {precision}: expected auto, bf16 or fp32")
    pairs = (comma_separated(senders), comma_separated(receivers))
    options: dict[str, Any] = {
        "settings": comma_separated(settings),
        "seeds": whole_numbers("--seeds", seeds),
        "positions": positions,
        "recipe": recipe,
        "epochs": epochs,
        "lr": lr,
        "optimizer": optimizer,
        "batch_size": batch_size,
        "group_size": group_size,
        "precision": precision,
        "kernel": kernel,
        "compile": compile_blocks,
        "source": source,
        "loss": loss,
        "solver": solver,
        "init": init,
        "receiver_bn": receiver_bn,
        "resample": resample,
        "class_token": class_token,
    }
    config = fastsitch.configure_sweep(*pairs, dataset=dataset, root=root, **options)
    name = checked_run_name(config.default_run_name if run is None else run)
    typer.echo(f"run {name} on {config.dataset}")
    if dry_run:
        show_estimate(
            fastsitch.estimate(
                *pairs,
                dataset=config.dataset,
                root=root,
                data_dir=data_dir,
                activations=activations,
                device=device,
                memory=memory,
                **options,
            )
        )
        return
    start = time.monotonic()
    with Progress("sweep", "cells") as progress:

        def report(step: SweepReport) -> None:
            progress.update(step.cells, step.total, step.unit)

        result = fastsitch.sweep(
            *pairs,
            dataset=config.dataset,
            run=name,
            root=root,
            data_dir=data_dir,
            activations=activations,
            device=device,
            memory=memory,
            ray=ray,
            report=report,
            **options,
        )
    typer.echo(summary(result))
    typer.echo(f"{duration(time.monotonic() - start)}; results in {result.path}")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for matrices and heat maps.")] = Path("demo"),
    width: Annotated[int, typer.Option(help="Channels of the first stage of both networks.")] = 16,
    root: RootOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """The main job on the embedded images: train two networks, stitch them, draw the matrices."""
    start = time.monotonic()
    with Progress("demo", "") as progress:

        def report(what: str, unit: str, done: float, total: float) -> None:
            progress.restart(what, unit)
            progress.update(done, total)

        result = run_demo(out, root=root or out / "fastsitch-data", width=width, device=device, report=report)
    typer.echo(summary(result.run))
    for line, _ in result.checks:
        typer.echo(line)
    typer.echo(f"{duration(time.monotonic() - start)}; matrices and heat maps in {out}/")
    if not all(passed for _, passed in result.checks):
        raise typer.Exit(1)
