"""What a sweep would take, from names alone: nothing is loaded, trained or written."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from fastsitch.data import SIZES, DatasetSize, dataset_size
from fastsitch.errors import ConfigError
from fastsitch.files import free_space
from fastsitch.machine import DTYPES, available_memory, resolve_device, resolve_precision
from fastsitch.networks.names import NetworkName
from fastsitch.networks.planned import PlannedNetwork, planned_network
from fastsitch.root import Root
from fastsitch.stitching.geometry import Geometry, Operand, Shape
from fastsitch.stitching.schedule import training_steps
from fastsitch.sweep.choose_source import choose_source, source_costs
from fastsitch.sweep.config import SweepConfig
from fastsitch.sweep.memory import StepKind, group_memory, matching_memory, memory_budget, statistics_bytes
from fastsitch.sweep.plan import PlannedUnit, plan_units, planned_cells, require_positions, split_groups
from fastsitch.sweep.resolve import resolve

ASSUMED_WIDTH = 64
"""Width of a network that is not trained yet: that of the published study."""

Geometries = Mapping[tuple[int, int], Geometry]
"""Of the cells (i, j) of a unit."""

_STEP_OVERHEAD = 1.4
"""Time of a training step over that of its convolutions: a round figure above the 1 / 0.75 of a profile on a CPU."""


@dataclass(frozen=True)
class UnitEstimate:
    """One unit: its cells by kind of stitch, trainable parameters, and FLOPs of training and evaluation."""

    planned: PlannedUnit
    kinds: dict[str, int]
    parameters: int
    groups: int
    flops: float
    exact_flops: float
    """Of matching exactly, or of measuring the error after training, in fp64; what several units share is counted in
    the first."""
    results: int
    """Bytes of the stitches, and of their running statistics where they have any."""

    @property
    def cells(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class SweepEstimate:
    """A sweep before it runs. Bytes and seconds are predictions of a model, not measurements."""

    config: SweepConfig
    data: DatasetSize
    positions: dict[NetworkName, list[tuple[str, Shape]]]
    assumed: list[NetworkName]
    """Networks that are not trained yet, whose width is assumed."""
    units: list[UnitEstimate]
    device: str
    precision: str
    group_size: int
    source: str
    """The source that ``auto`` would choose now, or the one asked for, and why."""
    memory: int
    """Peak bytes: what the source holds of one sender, and one training step."""
    available: int
    """Bytes of memory free on the device now."""
    disk: int
    """Bytes of the activation stores that will be made, and of the results."""
    free_disk: int
    """Bytes free on the root's disk now."""
    seconds: float
    """At the rate of convolution measured just now."""

    @property
    def cells(self) -> int:
        return sum(unit.cells for unit in self.units)


def estimate_sweep(
    root: Root, config: SweepConfig, device: str = "auto", memory: str = "auto", *, width: int = ASSUMED_WIDTH
) -> SweepEstimate:
    """Units, cells, shapes, stitches, parameters, memory, time and disk of a sweep.

    Networks that are not trained yet are taken to have ``width`` channels in their first stage.
    """
    torch_device = resolve_device(device)
    precision = resolve_precision(config.precision, torch_device)
    dtype = DTYPES[precision]
    data = data_size(root, config.dataset)
    if config.trains and data.train < config.recipe.batch_size:
        raise ConfigError(
            f"{data.train} training images are fewer than one batch of {config.recipe.batch_size} images: "
            f"use --batch-size {data.train} or less"
        )
    units = plan_units(config)
    size = (data.height, data.width)
    networks = {
        name: planned_network(root, config.dataset, name, width=width, size=size)
        for name in dict.fromkeys(name for planned in units for name in (planned.sender, planned.receiver))
    }
    positions = {name: own.positions for name, own in networks.items()}
    require_positions(config, positions)
    shapes = {name: [shape for _, shape in own] for name, own in positions.items()}
    costs = source_costs(
        root,
        config,
        shapes,
        images=(data.train, data.test),
        pixels=3 * data.height * data.width,
        itemsize=dtype.itemsize,
    )
    budget = memory_budget(memory, available_memory(torch_device), torch_device.type)
    free_disk = free_space(root.disk)
    source = choose_source(config, costs, available=budget, free_disk=free_disk)
    resolved = resolve(root.path, config, positions, source, torch_device, memory=memory, budget=budget)
    group_size = resolved.group_size
    kind = StepKind.of(
        torch_device,
        precision,
        resolved.kernel,
        resolved.compile,
        config.recipe.batch_size,
        config.receiver_bn,
        regresses=config.regresses,
        rules=config.rules,
    )
    estimates: list[UnitEstimate] = []
    step_memory = 0
    counted: set[tuple[NetworkName, ...]] = set()
    for planned in units:
        sender, receiver = shapes[planned.sender], shapes[planned.receiver]
        cells = planned_cells(config, planned, positions)
        geometries = {
            (cell.i, cell.j): Geometry.between(sender[cell.i], receiver[cell.j], config.rules) for cell in cells
        }
        groups = split_groups(cells, group_size)
        held = 0
        if config.solves:
            held = matching_memory(
                sender, receiver, preconditioned=config.preconditions, rules=config.rules, cells=geometries
            )
        step_memory = max(
            step_memory, group_memory([(cell.i, cell.j) for cell in groups[0]], sender, receiver, kind) + held
        )
        exact = 0.0
        if config.regresses:
            exact = _direct_flops(geometries, data.train)
        if config.solves:
            shared = [(planned.sender,), (planned.sender, planned.receiver)]
            parts = zip(shared, _matching_flops(geometries, data.train), strict=True)
            exact = sum(flops for key, flops in parts if key not in counted)
            counted.update(shared)
        unit = _unit(planned, networks, geometries, len(groups), config, data, exact)
        if source.name == "live":
            trained = _trained_images(config, data)
            live = len(groups) * (trained + data.test) * sum(networks[planned.sender].flops)
            if config.regresses:
                live += len(groups) * trained * sum(networks[planned.receiver].flops)
            unit = replace(unit, flops=unit.flops + live)
        estimates.append(unit)
    return SweepEstimate(
        config=config,
        data=data,
        positions=positions,
        assumed=[name for name, own in networks.items() if name.built_in and not own.trained],
        units=estimates,
        device=torch_device.type,
        precision=precision,
        group_size=group_size,
        source=source.reason,
        memory=source.memory + step_memory,
        available=available_memory(torch_device),
        disk=(0 if source.name == "live" else costs.missing) + sum(unit.results for unit in estimates),
        free_disk=free_disk,
        seconds=sum(unit.flops for unit in estimates) / convolution_rate(torch_device, dtype) * _STEP_OVERHEAD
        + (sum(unit.exact_flops for unit in estimates) / product_rate(torch_device) if config.matches else 0.0),
    )


def _unit(
    planned: PlannedUnit,
    networks: Mapping[NetworkName, PlannedNetwork],
    geometries: Geometries,
    groups: int,
    config: SweepConfig,
    data: DatasetSize,
    exact_flops: float,
) -> UnitEstimate:
    kinds: Counter[str] = Counter()
    parameters, flops = 0, 0.0
    _, *blocks = networks[planned.receiver].flops
    trained = _trained_images(config, data)
    for (_, j), geometry in geometries.items():
        behind = sum(blocks[j:]) + networks[planned.receiver].head
        kinds[geometry.kind] += 1
        parameters += geometry.parameters
        stitch = 2 * geometry.rows * geometry.features * geometry.receiver[0]
        # forward and activation gradient of the receiver; forward and weight gradient of the stitch
        flops += (trained * 2 + data.test) * stitch + ((0 if config.regresses else trained * 2) + data.test) * behind
        if config.preconditions:
            flops += trained / config.recipe.batch_size * 2.0 * geometry.features**2 * geometry.receiver[0]
    results = 4 * parameters
    if config.receiver_bn == "batch":
        results += statistics_bytes(list(geometries), [shape for _, shape in networks[planned.receiver].positions])
    return UnitEstimate(planned, dict(kinds), parameters, groups, flops, exact_flops, results)


def _trained_images(config: SweepConfig, data: DatasetSize) -> int:
    """Images that a cell is trained on, over all epochs."""
    recipe = config.recipe
    steps = training_steps(recipe.epochs, data.train // recipe.batch_size)
    return steps * recipe.batch_size if config.trains else 0


def _matching_flops(geometries: Geometries, images: int) -> tuple[float, float]:
    """FLOPs of the sender's own statistics, half of them saved by symmetry, and of those of the pair."""
    own: dict[tuple[int, Operand], float] = {}
    pair = 0.0
    for (i, _), geometry in geometries.items():
        rows = float(images * geometry.rows)
        own[i, geometry.operand] = rows * geometry.features**2
        pair += 2 * rows * geometry.features * geometry.receiver[0]
    return sum(own.values()), pair


def _direct_flops(geometries: Geometries, images: int) -> float:
    """FLOPs of comparing the stitches of a pair with the expected representation."""
    return sum(2.0 * images * own.rows * own.features * own.receiver[0] for own in geometries.values())


def data_size(root: Root, name: str) -> DatasetSize:
    """Known for the named data sets; counted for files that are there; otherwise a guess, marked so."""
    return dataset_size(name, root.data_dir) or replace(SIZES["cifar10"], assumed=True)


def convolution_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a 3x3 convolution of 64 channels on 32x32 images, measured now; the median of 5."""
    images = 1024 if device.type == "cuda" else 64
    x = torch.randn(images, 64, 32, 32, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    return 2.0 * images * 32 * 32 * 64 * 64 * 9 / _median_seconds(lambda: F.conv2d(x, w, padding=1), device)


def product_rate(device: torch.device) -> float:
    """FLOP/s of X'X in fp64 for X of 1024 x 256, measured now; the median of 5."""
    a = torch.randn(1024, 256, dtype=torch.float64, device=device)
    return 2.0 * 1024 * 256 * 256 / _median_seconds(lambda: a.T @ a, device)


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of 5 calls, after one that warms up."""
    times = []
    with torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]
