"""The commands that make networks and their stores: train, add, precompute."""

from typing import TYPE_CHECKING, Annotated

import typer

from fastsitch.cli.options import (
    DATA,
    FILES,
    TRAINING,
    ActivationsOption,
    BackgroundOption,
    DataDirOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    HoldoutOption,
    RayOption,
    RootOption,
    TestImagesOption,
    TrainDatasetOption,
    TrainImagesOption,
    names,
    numbers,
)
from fastsitch.cli.progress_display import ProgressDisplay
from fastsitch.cli.text_formats import counted, size, table
from fastsitch.errors import ConfigError, argument, printable
from fastsitch.vocabulary import DEFAULT_DATASET, Compression, HeadChoice, NetworkRecipe, StoredDtype

if TYPE_CHECKING:
    from fastsitch.networks.checkpoint import NetworkRecord


def train(
    networks: Annotated[
        list[str], typer.Argument(help="R1111 ... R2222, ResNet18, ResNet34 or added; R1111@3 is seed 3.")
    ],
    width: Annotated[
        int, typer.Option(help="Channels of the first stage; of small ResNets only.", rich_help_panel=DATA)
    ] = 64,
    resolution: Annotated[
        int | None,
        typer.Option(
            help="Side to which images are resized, a multiple of 8.",
            show_default="as they are",
            rich_help_panel=DATA,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of networks named without one.", rich_help_panel=DATA)] = 0,
    dataset: TrainDatasetOption = DEFAULT_DATASET,
    background: BackgroundOption = None,
    holdout: HoldoutOption = None,
    train_images: TrainImagesOption = None,
    test_images: TestImagesOption = None,
    recipe: Annotated[
        NetworkRecipe,
        typer.Option(help="A one-cycle schedule, or the published recipe of 40 epochs.", rich_help_panel=TRAINING),
    ] = "fast",
    epochs: Annotated[
        int | None,
        typer.Option(help="Epochs of training.", show_default="the recipe's", rich_help_panel=TRAINING),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Train again a network that was trained with other options.", rich_help_panel=TRAINING
        ),
    ] = False,
    device: DeviceOption = "auto",
    root: RootOption = None,
    data_dir: DataDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Train networks and save them."""
    import fastsitch
    from fastsitch.data.dataset_name import with_options

    named = with_options(
        dataset, background=background, holdout=holdout, train_images=train_images, test_images=test_images
    )
    with ProgressDisplay() as display:
        records = fastsitch.train(
            *networks,
            dataset=named,
            width=width,
            epochs=epochs,
            seed=seed,
            recipe=recipe,
            resolution=resolution,
            force=force,
            root=root,
            data_dir=data_dir,
            device=device,
            report=display.report,
        )
    for record in records:
        typer.echo(
            f"{record.name}: test accuracy {record.accuracy:.4f}, width {record.width}, "
            f"{counted(record.recipe['epochs'], 'epoch')} on {record.dataset}"
        )


def add(
    name: Annotated[str, typer.Argument(help="A new name: letters, digits and _; NAME@3 with the weights of seed 3.")],
    source: Annotated[
        str,
        typer.Option(
            "--from",
            help="torchvision:NAME, timm:NAME, hf:TYPE, or FILE.py:FACTORY, whose code is then run; with --pretrained "
            "also torchvision:NAME@WEIGHTS, timm:hf-hub:ORG/MODEL[@REVISION], timm:local-dir:PATH, "
            "hf:ORG/MODEL[@REVISION] and hf:PATH.",
            rich_help_panel=DATA,
        ),
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="<path>",
            help="safetensors or a checkpoint, an index of shards, or a folder; nothing in it is executed.",
            show_default="none",
            rich_help_panel=DATA,
        ),
    ] = None,
    pretrained: Annotated[
        bool,
        typer.Option(
            "--pretrained",
            help="With the weights, the image size and the preprocessing that its library publishes.",
            rich_help_panel=DATA,
        ),
    ] = False,
    classes_from: Annotated[
        str | None,
        typer.Option(
            metavar="<path>",
            help="Lines of CLASS,OUTPUT: which output of a pretrained network stands for a class.",
            show_default="matched by name",
            rich_help_panel=DATA,
        ),
    ] = None,
    weights_key: Annotated[
        str | None,
        typer.Option(
            help="Which weights of a checkpoint that has several, such as state_dict_ema or teacher.backbone.",
            show_default="those that fit",
            rich_help_panel=DATA,
        ),
    ] = None,
    head: Annotated[
        HeadChoice | None,
        typer.Option(
            help="In the place of its last layer: new: the same, untrained; probe: a linear probe on its features, "
            "fitted to the data set; none: nothing, for a sender alone.",
            show_default="that of the weights",
            rich_help_panel=DATA,
        ),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Where to cut it: names or patterns, such as 'layer*.?'.",
            show_default="the outputs of blocks",
            rich_help_panel=DATA,
        ),
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            help="POSITION=KIND, where the layout that is found is wrong: map, map-last, vector, tokens:ROWSxCOLUMNS, "
            "or tokens:1+ROWSxCOLUMNS behind a class token; may be repeated.",
            show_default="as found",
            rich_help_panel=DATA,
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(help="Outputs of the network.", show_default="the data set's", rich_help_panel=DATA),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            help="Mean of pixels in [0, 1]: one number or three.", show_default="the data set's", rich_help_panel=DATA
        ),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(
            help="Standard deviation of pixels in [0, 1]: one number or three.",
            show_default="the data set's",
            rich_help_panel=DATA,
        ),
    ] = None,
    resolution: Annotated[
        str | None,
        typer.Option(help="SIDE or HEIGHTxWIDTH of its images.", show_default="the data set's", rich_help_panel=DATA),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            help="3, or 1: the network sees images in grey.", show_default="as it takes them", rich_help_panel=DATA
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Name or index of the logits, where it returns several tensors.",
            show_default="logits, out, or the first of (B, classes)",
            rich_help_panel=DATA,
        ),
    ] = None,
    dataset: TrainDatasetOption = DEFAULT_DATASET,
    background: BackgroundOption = None,
    holdout: HoldoutOption = None,
    train_images: TrainImagesOption = None,
    test_images: TestImagesOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the network that has the name.", rich_help_panel=DATA)
    ] = False,
    device: DeviceOption = "auto",
    root: RootOption = None,
    data_dir: DataDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Register a torchvision, timm or custom network under a name, with or without weights."""
    import fastsitch
    from fastsitch.data.dataset_name import with_options
    from fastsitch.suggested_command import command

    dataset = with_options(
        dataset, background=background, holdout=holdout, train_images=train_images, test_images=test_images
    )
    definition, record = fastsitch.add(
        name,
        source,
        weights=weights,
        pretrained=pretrained,
        classes_from=classes_from,
        weights_key=weights_key,
        head=head,
        positions=names(positions),
        layouts=_layouts(layout or []),
        classes=classes,
        mean=numbers("mean", mean),
        std=numbers("std", std),
        resolution=_resolution(resolution),
        channels=channels,
        output=output,
        dataset=dataset,
        force=force,
        root=root,
        data_dir=data_dir,
        device=device,
    )
    shape = "x".join(map(str, definition.input_shape))
    source = printable(definition.source.text)
    typer.echo(f"{name}: {source}, {definition.classes} classes, images {shape}, on {printable(dataset)}")
    rows = [
        [
            str(position.index),
            position.name,
            "x".join(map(str, position.shape)),
            position.layout + (f", {position.prefix_tokens} before the grid" if position.prefix_tokens else ""),
        ]
        for position in definition.positions
    ]
    typer.echo(table(["position", "name", "shape", "layout"], rows))
    if record is None:
        typer.echo(f"no weights yet; train it with\n  {command('train', name, dataset=dataset, root=root)}")
    else:
        typer.echo(_result(record))


def precompute(
    networks: Annotated[list[str], typer.Argument(help="Trained networks, or controls such as R1111-random@0.")],
    dataset: DatasetOption = None,
    background: BackgroundOption = None,
    holdout: HoldoutOption = None,
    train_images: TrainImagesOption = None,
    test_images: TestImagesOption = None,
    dtype: Annotated[StoredDtype, typer.Option(help="How numbers are stored.", rich_help_panel=FILES)] = "bf16",
    compress: Annotated[Compression, typer.Option(help="How stores are compressed.", rich_help_panel=FILES)] = "none",
    positions: Annotated[
        str | None,
        typer.Option(
            help="Store only these positions: names or patterns, 'stem,layer*.0'.",
            show_default="all",
            rich_help_panel=DATA,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace stores that are stale or damaged.", rich_help_panel=FILES)
    ] = False,
    device: DeviceOption = "auto",
    ray: RayOption = None,
    root: RootOption = None,
    data_dir: DataDirOption = None,
    activations: ActivationsOption = None,
    debug: DebugOption = False,
) -> None:
    """Run each network once and store its representations."""
    import fastsitch
    from fastsitch.data.dataset_name import with_options

    named = with_options(
        dataset, background=background, holdout=holdout, train_images=train_images, test_images=test_images
    )
    with ProgressDisplay() as display:
        stores = fastsitch.precompute(
            *networks,
            dataset=named,
            dtype=dtype,
            compress=compress,
            positions=positions,
            force=force,
            root=root,
            data_dir=data_dir,
            activations=activations,
            device=device,
            ray=ray,
            report=display.report,
        )
    for store in stores:
        stored, count = len(store.positions), store.position_count
        positions_text = counted(stored, "position") if stored == count else f"{stored} of {count} positions"
        typer.echo(f"{store.identity.network}: {positions_text}, {size(store.bytes)}: {store.path}")


def _result(record: "NetworkRecord") -> str:
    """How good an added network is; one without classifier cannot say."""
    if record.accuracy is None:
        return "no classifier: a sender only"
    text = f"test accuracy {record.accuracy:.4f} ({record.recipe['name']})"
    probe = record.recipe.get("probe")
    if probe is None:
        return text
    return (
        f"{text}, by a linear probe: strength {probe['strength']:g}, {probe['train_accuracy']:.4f} on "
        f"{counted(probe['images'], 'training image')}"
    )


def _layouts(texts: list[str]) -> dict[str, str]:
    """``["block=tokens:2x8"]`` -> ``{"block": "tokens:2x8"}``; raises ConfigError."""
    for text in texts:
        if "=" not in text:
            raise ConfigError(
                f"{argument('layouts', text, option='--layout')}: expected POSITION=KIND, such as blocks.0=tokens:2x8"
            )
    return dict((position, kind) for position, _, kind in (text.rpartition("=") for text in texts))


def _resolution(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"{argument('resolution', text)}: expected a side such as 64, or HEIGHTxWIDTH")
    return int(parts[0]), int(parts[-1])
