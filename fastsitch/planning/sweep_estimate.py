"""What a sweep would take: nothing is trained or written, and no network loaded but receivers that were added."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F

from fastsitch.data import SIZES, DatasetSize, dataset_size
from fastsitch.data.dataset_name import DatasetName
from fastsitch.errors import argument
from fastsitch.files import free_space
from fastsitch.machine import DTYPES, available_memory, resolve_device, resolve_precision
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network, namesake, read_record
from fastsitch.networks.find_network import models_folder
from fastsitch.networks.network_shape import NetworkShape, network_shape
from fastsitch.networks.require_receivers import require_receivers
from fastsitch.planning.group_memory import group_memory, matching_memory, memory_budget, statistics_bytes
from fastsitch.planning.resolve_auto import Segments, resolve, step_kind
from fastsitch.planning.source_choice import SourceChoice, SourceCosts, choose_source, source_costs
from fastsitch.receivers.graph_segment import segment_costs, use_graphs
from fastsitch.receivers.working_precision import working_network
from fastsitch.root import Root
from fastsitch.runs.run_record import Resolved
from fastsitch.runs.sweep_config import SweepConfig
from fastsitch.runs.sweep_plan import Geometries, Positions, SweepPlan
from fastsitch.stitching.cells import Unit, split_groups
from fastsitch.stitching.geometry import Operand
from fastsitch.stitching.stitch_schedule import training_steps
from fastsitch.timing import median_seconds
from fastsitch.vocabulary import Attention, SourceName

ASSUMED_WIDTH = 64
"""Width of a network that is not trained yet: that of the published study."""

_STEP_OVERHEAD = 1.4
"""Time of a training step over that of its convolutions: a round figure above the 1 / 0.75 of a profile on a CPU."""


@dataclass(frozen=True)
class UnitEstimate:
    """One unit: its cells by kind of stitch, trainable parameters, and FLOPs of training and evaluation."""

    unit: Unit
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
class SenderEstimate:
    """What decides between storing a sender's representations and computing them again; predicted."""

    name: NetworkName
    image: int
    """Bytes of one image, stored, at all positions that the sweep asks for."""
    flops: float
    """Of computing them."""
    source: SourceName

    @property
    def intensity(self) -> float:
        """FLOPs per stored byte."""
        return self.flops / self.image


@dataclass(frozen=True)
class SweepEstimate:
    """A sweep before it runs. Bytes and seconds are predicted, not measured."""

    config: SweepConfig
    data: DatasetSize
    positions: Positions
    assumed: list[NetworkName]
    """Networks that are not trained yet, whose width is assumed."""
    units: list[UnitEstimate]
    device: str
    precision: str
    group_size: int
    source: str
    """The source that ``auto`` would choose now, or the one asked for, and why."""
    senders: list[SenderEstimate]
    flops_rate: float
    """FLOP/s of a convolution, measured just now."""
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
    dtype = DTYPES[resolve_precision(config.precision, torch_device)]
    data = data_size(root, config.dataset)
    config.require_one_batch(data.train)
    require_receivers(root, config.dataset, config.receivers)
    networks = {name: network_shape(root, config.dataset, name, width=width, data=data) for name in config.networks}
    plan = SweepPlan(config, {name: network.positions for name, network in networks.items()})
    plan.require_stitches()
    images, pixels = (data.train, data.test), 3 * data.height * data.width
    costs = source_costs(root, plan, images=images, pixels=pixels, itemsize=dtype.itemsize)
    budget = memory_budget(memory, available_memory(torch_device), torch_device.type)
    free_disk = free_space(root.disk)
    source = choose_source(config, costs, available=budget, free_disk=free_disk)
    segments = cache(partial(_segments, root, plan, dtype, torch_device))
    resolved = resolve(root.path, plan, source, torch_device, memory=memory, budget=budget, segments=segments)
    units = _UnitEstimates(plan, networks, data, resolved).all()
    flops_rate = convolution_rate(torch_device, dtype)
    return SweepEstimate(
        config=config,
        data=data,
        positions=plan.positions,
        assumed=[name for name, network in networks.items() if name.built_in and not network.trained],
        units=units,
        device=torch_device.type,
        precision=resolved.precision,
        group_size=resolved.group_size,
        source=source.reason,
        senders=[
            SenderEstimate(name, sender.image, sum(networks[name].flops), source.senders[name])
            for name, sender in costs.senders.items()
        ],
        flops_rate=flops_rate,
        memory=source.memory + _step_memory(plan, resolved, torch_device, segments(resolved.attention)),
        available=available_memory(torch_device),
        disk=_stores(costs, source) + sum(unit.results for unit in units),
        free_disk=free_disk,
        seconds=sum(unit.flops for unit in units) / flops_rate * _STEP_OVERHEAD
        + (sum(unit.exact_flops for unit in units) / product_rate(torch_device) if config.matches else 0.0),
    )


def _stores(costs: SourceCosts, source: SourceChoice) -> int:
    """Bytes of the stores that will be made."""
    made = sum(sender.missing for name, sender in costs.senders.items() if source.senders[name] != "live")
    return made + (costs.expected if source.name != "live" else 0)


def _segments(root: Root, plan: SweepPlan, dtype: torch.dtype, device: torch.device, attention: Attention) -> Segments:
    """What a step takes for the segments of receivers that are no small ResNets, where their weights are there."""
    config = plan.config
    if config.loss != "task" or config.receiver_bn != "frozen":
        return {}
    found = {}
    for name in dict.fromkeys(unit.receiver_network for unit in plan.units):
        folder = models_folder(root, config.dataset, name)
        if not name.built_in and (namesake(folder, name) if name.random else read_record(folder, name)) is not None:
            chain = load_network(folder, name).chain
            remedy = f"use {argument('precision', 'fp32')}"
            network = working_network(chain, str(name), remedy, dtype=dtype, device=device)
            found[name] = segment_costs(use_graphs(network, chain, attention))
    return found


def _step_memory(plan: SweepPlan, resolved: Resolved, device: torch.device, segments: Segments) -> int:
    """Predicted bytes of the largest training step, with what matching holds beside it."""
    config = plan.config
    step = step_kind(config, device, resolved.precision, resolved.kernel, resolved.compile)
    largest = 0
    for unit in plan.units:
        sender, receiver = plan.shapes[unit.sender_network], plan.shapes[unit.receiver_network]
        geometries = plan.geometries(unit)
        first = split_groups(plan.cells(unit), resolved.group_size)[0]
        costs = segments.get(unit.receiver_network)
        needed = group_memory([(cell.i, cell.j) for cell in first], sender, receiver, step, costs)
        if config.solves:
            needed += matching_memory(
                sender, receiver, preconditioned=config.preconditions, rules=config.rules, cells=geometries
            )
        largest = max(largest, needed)
    return largest


class _UnitEstimates:
    """What every unit of a plan takes; what several units share is counted in the first of them."""

    def __init__(
        self,
        plan: SweepPlan,
        networks: Mapping[NetworkName, NetworkShape],
        data: DatasetSize,
        resolved: Resolved,
    ) -> None:
        self._plan = plan
        self._config = plan.config
        self._networks = networks
        self._data = data
        self._group_size = resolved.group_size
        self._resolved = resolved
        self._trained = _trained_images(plan.config, data)
        self._counted: set[tuple[NetworkName, ...]] = set()

    def all(self) -> list[UnitEstimate]:
        return [self._unit(unit) for unit in self._plan.units]

    def _unit(self, unit: Unit) -> UnitEstimate:
        config, geometries = self._config, self._plan.geometries(unit)
        receiver = self._networks[unit.receiver_network]
        groups = len(split_groups(self._plan.cells(unit), self._group_size))
        parameters = sum(geometry.parameters for geometry in geometries.values())
        results = 4 * parameters
        if config.receiver_bn == "batch":
            results += statistics_bytes(list(geometries), [shape for _, shape in receiver.positions])
        live = self._resolved.source_of(unit.sender_network) == "live"
        return UnitEstimate(
            unit,
            dict(Counter(geometry.kind for geometry in geometries.values())),
            parameters,
            groups,
            self._training_flops(geometries, receiver) + (self._live_flops(unit) * groups if live else 0.0),
            self._exact_flops(unit, geometries),
            results,
        )

    def _training_flops(self, geometries: Geometries, receiver: NetworkShape) -> float:
        """Of all cells of a unit: training, and evaluation on the test images."""
        config, trained, tested = self._config, self._trained, self._data.test
        _, *blocks = receiver.flops
        flops = 0.0
        for (_, j), geometry in geometries.items():
            behind = sum(blocks[j:]) + receiver.head_flops
            stitch = 2 * geometry.rows * geometry.features * geometry.receiver[0]
            # forward and activation gradient of the receiver; forward and weight gradient of the stitch
            flops += (trained * 2 + tested) * stitch + ((0 if config.regresses else trained * 2) + tested) * behind
            if config.preconditions:
                flops += trained / config.recipe.batch_size * 2.0 * geometry.features**2 * geometry.receiver[0]
        return flops

    def _live_flops(self, unit: Unit) -> float:
        """Of running the sender again for one group, and the receiver where its representations are trained on."""
        flops = (self._trained + self._data.test) * sum(self._networks[unit.sender_network].flops)
        if self._config.regresses:
            flops += self._trained * sum(self._networks[unit.receiver_network].flops)
        return flops

    def _exact_flops(self, unit: Unit, geometries: Geometries) -> float:
        """Of matching exactly, or of measuring the errors after training."""
        if self._config.regresses:
            return _comparing_flops(geometries, self._data.train)
        if not self._config.solves:
            return 0.0
        shared = [(unit.sender_network,), (unit.sender_network, unit.receiver_network)]
        flops = zip(shared, _matching_flops(geometries, self._data.train), strict=True)
        exact = sum(each for key, each in flops if key not in self._counted)
        self._counted.update(shared)
        return exact


def _trained_images(config: SweepConfig, data: DatasetSize) -> int:
    """Images that a cell is trained on, over all epochs."""
    recipe = config.recipe
    steps = training_steps(recipe.epochs, data.train // recipe.batch_size)
    return steps * recipe.batch_size if config.trains else 0


def _matching_flops(geometries: Geometries, images: int) -> tuple[float, float]:
    """FLOPs of the sender's own statistics, half of them saved by symmetry, and of those of the pair."""
    sender: dict[tuple[int, Operand], float] = {}
    pair = 0.0
    for (i, _), geometry in geometries.items():
        rows = float(images * geometry.rows)
        sender[i, geometry.operand] = rows * geometry.features**2
        pair += 2 * rows * geometry.features * geometry.receiver[0]
    return sum(sender.values()), pair


def _comparing_flops(geometries: Geometries, images: int) -> float:
    """FLOPs of comparing the stitches of a pair with the expected representation."""
    return sum(2.0 * images * g.rows * g.features * g.receiver[0] for g in geometries.values())


def data_size(root: Root, name: str) -> DatasetSize:
    """Known for the named data sets; counted for files that are there; otherwise a guess, marked so."""
    guess = DatasetName.parse(name).subset.applied(replace(SIZES["cifar10"], assumed=True))
    return dataset_size(name, root.data_dir) or guess


@cache
@torch.no_grad()
def convolution_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a 3x3 convolution of 64 channels on 32x32 images: the median of 5, measured once per process."""
    images = 1024 if device.type == "cuda" else 64
    x = torch.randn(images, 64, 32, 32, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    return 2.0 * images * 32 * 32 * 64 * 64 * 9 / median_seconds(lambda: F.conv2d(x, w, padding=1), device)


@cache
@torch.no_grad()
def product_rate(device: torch.device) -> float:
    """FLOP/s of X'X in fp64 for X of 1024 x 256: the median of 5, measured once per process."""
    a = torch.randn(1024, 256, dtype=torch.float64, device=device)
    return 2.0 * 1024 * 256 * 256 / median_seconds(lambda: a.T @ a, device)
