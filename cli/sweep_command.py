"""The command that trains stitches: sweep."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from fastsitch.cli.options import (
    DATA,
    FILES,
    MACHINE,
    MATCHING,
    TRAINING,
    ActivationsOption,
    BackgroundOption,
    ClassTokenOption,
    DataDirOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    DryRunOption,
    HoldoutOption,
    MemoryOption,
    RayOption,
    ResampleOption,
    RootOption,
    TestImagesOption,
    TrainImagesOption,
    whole_numbers,
)
from fastsitch.cli.progress_display import ProgressDisplay
from fastsitch.cli.text_formats import duration
from fastsitch.vocabulary import (
    Compile,
    Init,
    Kernel,
    Loss,
    Optimizer,
    Precision,
    ReceiverBN,
    Solver,
    SourceName,
    StitchRecipe,
)

if TYPE_CHECKING:
    from fastsitch.runs.sweep_config import SweepOptions


def sweep(
    senders: Annotated[
        str, typer.Option(help="Networks to take representations from, separated by commas.", rich_help_panel=DATA)
    ],
    receivers: Annotated[str, typer.Option(help="Networks to stitch into, separated by commas.", rich_help_panel=DATA)],
    settings: Annotated[
        str,
        typer.Option(
            help="Some of T2T,T2R,R2T,R2R: trained or randomly initialised sender, then receiver.", rich_help_panel=DATA
        ),
    ] = "T2T",
    positions: Annotated[
        str | None,
        typer.Option(
            help="Train only between these positions: names or patterns, 'stem,layer*.0'.",
            show_default="all",
            rich_help_panel=DATA,
        ),
    ] = None,
    dataset: DatasetOption = None,
    background: BackgroundOption = None,
    holdout: HoldoutOption = None,
    train_images: TrainImagesOption = None,
    test_images: TestImagesOption = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds of the stitches and of the order of images.", rich_help_panel=DATA)
    ] = "0",
    recipe: Annotated[
        StitchRecipe | None,
        typer.Option(
            help="How stitches are trained; networks have recipes of their own, see train.",
            show_default="small for fashion-mini, else paper",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="Epochs; may be fractional.",
            show_default="the recipe's; 30 with --solver sgd",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate.", show_default="the recipe's", rich_help_panel=TRAINING),
    ] = None,
    optimizer: Annotated[
        Optimizer,
        typer.Option(
            help="Plain SGD, or SGD in whitened inputs, which needs --init matched.", rich_help_panel=TRAINING
        ),
    ] = "sgd",
    batch_size: Annotated[
        int | None, typer.Option(help="Images per step.", show_default="the recipe's", rich_help_panel=TRAINING)
    ] = None,
    receiver_bn: Annotated[
        ReceiverBN,
        typer.Option(
            help="What the receiver's BatchNorm normalises by in training: its running statistics, or those of each "
            "stitch's batch.",
            rich_help_panel=TRAINING,
        ),
    ] = "frozen",
    loss: Annotated[
        Loss,
        typer.Option(
            help="The task's loss, or least squares to what the receiver expects (matched stitches).",
            rich_help_panel=MATCHING,
        ),
    ] = "task",
    solver: Annotated[
        Solver,
        typer.Option(
            help="How matched stitches are found: exactly, without training, or by SGD, the published way.",
            rich_help_panel=MATCHING,
        ),
    ] = "exact",
    init: Annotated[
        Init, typer.Option(help="Where training starts: a random or the matched stitch.", rich_help_panel=MATCHING)
    ] = "default",
    resample: ResampleOption = "none",
    class_token: ClassTokenOption = "sender",
    memory: MemoryOption = "auto",
    group_size: Annotated[
        str, typer.Option(help="auto, or the largest number of cells per batch.", rich_help_panel=MACHINE)
    ] = "auto",
    source: Annotated[
        SourceName,
        typer.Option(
            help="Representations held in memory, read from the store while in use, or computed again.",
            rich_help_panel=MACHINE,
        ),
    ] = "auto",
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
    ray: RayOption = None,
    run: Annotated[
        str | None,
        typer.Option(help="Name of the run.", show_default="from the configuration", rich_help_panel=FILES),
    ] = None,
    root: RootOption = None,
    data_dir: DataDirOption = None,
    activations: ActivationsOption = None,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
) -> None:
    """Train the stitches between all pairs; the same command resumes a run that was interrupted."""
    import fastsitch
    from fastsitch.cli.dry_run import show_estimate
    from fastsitch.cli.run_summary import summary
    from fastsitch.data.dataset_name import with_options
    from fastsitch.planning.group_memory import memory_budget
    from fastsitch.runs.sweep_config import checked_run_name

    options: SweepOptions = {
        "settings": settings,
        "seeds": whole_numbers("seeds", seeds),
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
    dataset = with_options(
        dataset, background=background, holdout=holdout, train_images=train_images, test_images=test_images
    )
    config = fastsitch.configure_sweep(senders, receivers, dataset=dataset, root=root, **options)
    name = checked_run_name(config.default_run_name if run is None else run)
    # what is wrong is said before anything else; how much is free does not matter to that
    memory_budget(memory, 1 << 40, "cpu")
    typer.echo(f"run {name} on {config.dataset}")
    if dry_run:
        show_estimate(
            fastsitch.estimate(
                senders,
                receivers,
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
    with ProgressDisplay() as display:
        result = fastsitch.sweep(
            senders,
            receivers,
            dataset=config.dataset,
            run=name,
            root=root,
            data_dir=data_dir,
            activations=activations,
            device=device,
            memory=memory,
            ray=ray,
            report=display.report,
            **options,
        )
    typer.echo(summary(result))
    typer.echo(f"{duration(time.monotonic() - start)}; results in {result.path}")
