"""What a study would take, stage by stage, from names alone."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fastsitch.machine import DTYPES, resolve_device, resolve_precision
from fastsitch.networks.checkpoint import read_record
from fastsitch.networks.names import NetworkName
from fastsitch.networks.planned import planned_network
from fastsitch.networks.training import network_recipe
from fastsitch.paper.study import PaperConfig
from fastsitch.root import Root
from fastsitch.sweep.choose_source import STORED_ITEMSIZE, elements
from fastsitch.sweep.config import SweepConfig
from fastsitch.sweep.estimate import SweepEstimate, convolution_rate, data_size, estimate_sweep

_BACKWARD = 2
"""Cost of a network's backward pass over its forward pass."""

_TRAINING_OVERHEAD = 2.0
"""Time of training a network over that of its convolutions: BatchNorm in training mode, augmentation, optimizer."""


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """One stage: how much of what, and what a model predicts. Stages that only read results cost next to nothing."""

    stage: str
    networks: int = 0
    units: int = 0
    cells: int = 0
    memory: int = 0
    """Peak bytes."""
    disk: int = 0
    """Bytes."""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PaperEstimate:
    """A study before it runs. Bytes and seconds are predictions of a model, not measurements."""

    config: PaperConfig
    stages: list[StageEstimate]
    cells_by_setting: dict[str, int]
    """Vanilla stitches, the classical baseline not counted."""
    source: str
    """Why the first sweep would draw from which source."""

    @property
    def cells(self) -> int:
        return sum(self.cells_by_setting.values())


def estimate_study(root: Root, config: PaperConfig, device: str = "auto", memory: str = "auto") -> PaperEstimate:
    """Units, cells, memory, disk and time of every stage; needs neither data nor networks."""

    def estimate(configs: Iterable[SweepConfig]) -> list[SweepEstimate]:
        width = config.dimensions.width
        return [estimate_sweep(root, own, device, memory, width=width) for own in configs]

    vanilla, twins = estimate(config.sweeps()), estimate(config.baselines())
    matched = estimate(map(config.matched, config.sweeps()))
    found = {
        "train": _training(root, config, device),
        "precompute": _stores(root, config, vanilla),
        "sweep": _sweeps("sweep", [*vanilla, *twins]),
        "matched": _sweeps("matched", matched),
        # the statistics of the training images once more, those of the test images beside them
        "tables": replace(_sweeps("tables", matched), disk=0),
    }
    cells = {setting: 0 for setting in config.settings}
    for own in vanilla:
        for unit in own.units:
            cells[unit.planned.unit.setting] += unit.cells
    return PaperEstimate(
        config=config,
        stages=[found.get(stage, StageEstimate(stage=stage)) for stage in config.stages],
        cells_by_setting=cells,
        source=vanilla[0].source,
    )


def runs_live(root: Root, config: PaperConfig, device: str, memory: str) -> bool:
    """Whether the sweeps would run their senders again instead of storing representations."""
    first = estimate_sweep(root, config.sweeps()[0], device, memory, width=config.dimensions.width)
    return first.source.startswith("live")


def _training(root: Root, config: PaperConfig, device: str) -> StageEstimate:
    """Of the networks that are not trained yet."""
    scale, torch_device = config.dimensions, resolve_device(device)
    folder = root.models(scale.dataset)
    names = [
        name for name in map(NetworkName.parse, (*config.chosen, *config.twins)) if read_record(folder, name) is None
    ]
    data, recipe = data_size(root, scale.dataset), network_recipe(scale.training)
    size = (data.height, data.width)
    forward = 0.0
    for name in names:
        forward += sum(planned_network(root, scale.dataset, name, width=scale.width, size=size).flops)
    precision = resolve_precision("auto" if recipe.mixed_precision else "fp32", torch_device)
    flops = (1 + _BACKWARD) * forward * recipe.epochs * data.train
    seconds = flops / convolution_rate(torch_device, DTYPES[precision]) * _TRAINING_OVERHEAD
    return StageEstimate(stage="train", networks=len(names), seconds=seconds)


def _stores(root: Root, config: PaperConfig, vanilla: list[SweepEstimate]) -> StageEstimate:
    """Of the representations that are not stored yet; none where the sweep runs its senders live."""
    if vanilla[0].source.startswith("live"):
        return StageEstimate(stage="precompute")
    dataset = config.dimensions.dataset
    positions = {str(name): own for sweep in vanilla for name, own in sweep.positions.items()}
    wanted = (*config.chosen, *config.controls())
    names = [name for name in wanted if not root.store(dataset, NetworkName.parse(name)).exists()]
    images = vanilla[0].data.train + vanilla[0].data.test
    disk = sum(elements([shape for _, shape in positions[name]]) * images * STORED_ITEMSIZE for name in names)
    return StageEstimate(stage="precompute", networks=len(names), disk=disk)


def _sweeps(stage: str, sweeps: list[SweepEstimate]) -> StageEstimate:
    return StageEstimate(
        stage=stage,
        units=sum(len(own.units) for own in sweeps),
        cells=sum(own.cells for own in sweeps),
        memory=max((own.memory for own in sweeps), default=0),
        disk=4 * sum(unit.parameters for own in sweeps for unit in own.units),
        seconds=sum(own.seconds for own in sweeps),
    )
