"""Predict what a study would take, stage by stage, from names alone."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fastsitch.machine import DTYPES, resolve_device, resolve_precision
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import read_record
from fastsitch.networks.network_shape import network_shape
from fastsitch.networks.train_network import network_recipe
from fastsitch.planning.source_choice import STORED_ITEMSIZE, elements
from fastsitch.planning.sweep_estimate import SweepEstimate, convolution_rate, data_size, estimate_sweep
from fastsitch.root import Root
from fastsitch.runs.sweep_config import SweepConfig
from fastsitch.study.study_config import StudyConfig
from fastsitch.vocabulary import Setting

_BACKWARD = 2
"""Cost of a network's backward pass, as a multiple of its forward pass."""

_TRAINING_OVERHEAD = 2.0
"""Time of training a network, as a multiple of its convolutions' time: BatchNorm, augmentation and optimizer add."""


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """Work and predicted cost of one stage. Stages that only read results cost next to nothing."""

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
class StudyEstimate:
    """A study before it runs. Bytes and seconds are predicted, not measured."""

    config: StudyConfig
    stages: list[StageEstimate]
    cells_by_setting: dict[Setting, int]
    """Vanilla stitches by setting, without the classical baseline."""
    source: str
    """The source that the first sweep would draw from, and why."""

    @property
    def cells(self) -> int:
        return sum(self.cells_by_setting.values())


def estimate_study(root: Root, config: StudyConfig, device: str = "auto", memory: str = "auto") -> StudyEstimate:
    """Units, cells, memory, disk and time of every stage; needs neither data nor networks."""

    def estimate(configs: Iterable[SweepConfig]) -> list[SweepEstimate]:
        width = config.dimensions.width
        return [estimate_sweep(root, sweep, device, memory, width=width) for sweep in configs]

    vanilla, twins = estimate(config.sweeps()), estimate(config.baselines())
    matched = estimate(map(config.matched, config.sweeps()))
    estimates = {
        "train": _training(root, config, device),
        "precompute": _stores(root, config, vanilla),
        "sweep": _sweeps("sweep", [*vanilla, *twins]),
        "matched": _sweeps("matched", matched),
        # like matching: the statistics of the training images once more, and a pass over the test images
        "tables": replace(_sweeps("tables", matched), disk=0),
    }
    cells = {setting: 0 for setting in config.settings}
    for sweep in vanilla:
        for unit in sweep.units:
            cells[unit.unit.setting] += unit.cells
    return StudyEstimate(
        config=config,
        stages=[estimates.get(stage, StageEstimate(stage=stage)) for stage in config.stages],
        cells_by_setting=cells,
        source=vanilla[0].source,
    )


def runs_live(root: Root, config: StudyConfig, device: str, memory: str) -> bool:
    """Whether the sweeps would run their senders live instead of storing representations."""
    first = estimate_sweep(root, config.sweeps()[0], device, memory, width=config.dimensions.width)
    return first.source.startswith("live")


def _training(root: Root, config: StudyConfig, device: str) -> StageEstimate:
    """Training of the networks that are not trained yet."""
    scale, torch_device = config.dimensions, resolve_device(device)
    folder = root.models(scale.dataset)
    names = [
        name for name in map(NetworkName.parse, (*config.chosen, *config.twins)) if read_record(folder, name) is None
    ]
    data, recipe = data_size(root, scale.dataset), network_recipe(scale.training)
    forward = sum(sum(network_shape(root, scale.dataset, name, width=scale.width, data=data).flops) for name in names)
    precision = resolve_precision("auto" if recipe.mixed_precision else "fp32", torch_device)
    flops = (1 + _BACKWARD) * forward * recipe.epochs * data.train
    seconds = flops / convolution_rate(torch_device, DTYPES[precision]) * _TRAINING_OVERHEAD
    return StageEstimate(stage="train", networks=len(names), seconds=seconds)


def _stores(root: Root, config: StudyConfig, vanilla: list[SweepEstimate]) -> StageEstimate:
    """Storing of the representations that are missing; nothing where the sweep runs its senders live."""
    if vanilla[0].source.startswith("live"):
        return StageEstimate(stage="precompute")
    dataset = config.dimensions.dataset
    positions = {str(name): shapes for sweep in vanilla for name, shapes in sweep.positions.items()}
    wanted = (*config.chosen, *config.controls())
    names = [name for name in wanted if not root.store(dataset, NetworkName.parse(name)).exists()]
    images = vanilla[0].data.train + vanilla[0].data.test
    disk = sum(elements([shape for _, shape in positions[name]]) * images * STORED_ITEMSIZE for name in names)
    return StageEstimate(stage="precompute", networks=len(names), disk=disk)


def _sweeps(stage: str, sweeps: list[SweepEstimate]) -> StageEstimate:
    return StageEstimate(
        stage=stage,
        units=sum(len(sweep.units) for sweep in sweeps),
        cells=sum(sweep.cells for sweep in sweeps),
        memory=max((sweep.memory for sweep in sweeps), default=0),
        disk=4 * sum(unit.parameters for sweep in sweeps for unit in sweep.units),
        seconds=sum(sweep.seconds for sweep in sweeps),
    )
