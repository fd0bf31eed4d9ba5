"""What is measured: two networks, real images, the sender's representations, all cells of the pair."""

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.represent import PASS_IMAGES
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.chains.chain import Chain
from fastsitch.chains.layout import elements
from fastsitch.data import Dataset, Split, Transform, load_dataset
from fastsitch.errors import ConfigError, argument
from fastsitch.identity import torch_generator
from fastsitch.machine import available_memory
from fastsitch.network_names import BLOCKS, NetworkName
from fastsitch.networks.resnet import SmallResNet, initialise
from fastsitch.networks.train_network import fit_network, network_recipe
from fastsitch.receivers.compiled_blocks import compile_blocks
from fastsitch.receivers.contract import SegmentMemory
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.receivers.frozen_segments import frozen_copy
from fastsitch.receivers.graph_segment import GraphSegment, segment_costs, use_graphs
from fastsitch.runs.workbench import Networks
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.geometry import DEFAULT_RULES, Geometry, Rules
from fastsitch.vocabulary import DEFAULT_DATASET, Attention

_REPRESENTATIONS_SHARE = 0.1
"""Of the free memory, for images and the sender's representations of them."""


@dataclass(frozen=True, kw_only=True)
class BenchPair:
    """One pair of networks, real images, and in ``source`` the sender's representations of them."""

    sender: Chain
    receiver: Chain
    frozen: FrozenNetwork
    source: ResidentSource
    x: Tensor
    """The training images as the sender takes them (N, C, H, W), fp32 (fp64 for a pair in fp64)."""
    unit: Unit
    batch_size: int
    kernel: str
    rules: Rules = DEFAULT_RULES

    @property
    def dtype(self) -> torch.dtype:
        return self.frozen.dtype

    @property
    def device(self) -> torch.device:
        return self.frozen.device

    @property
    def cells(self) -> list[Cell]:
        """All cells of the pair."""
        return self.cells_of(0)

    def cells_of(self, seed: int) -> list[Cell]:
        """The same cells with other initial stitches."""
        unit = replace(self.unit, seed=seed)
        return [
            Cell(unit, i, j)
            for j, i in itertools.product(range(len(self.frozen.positions)), range(len(self.source.shapes)))
        ]

    @property
    def small(self) -> bool:
        """Whether the receiver is a small ResNet, whose folded form is written by hand."""
        return isinstance(self.receiver, SmallResNet)

    @property
    def attends(self) -> bool:
        """Whether the receiver has attention in torch's fused form."""
        return any(isinstance(segment, GraphSegment) and segment.attends for segment in self.frozen.segments)

    @property
    def segments(self) -> list[SegmentMemory] | None:
        """What the receiver's segments and its head take; None where it follows from shapes."""
        return None if self.small else segment_costs(self.frozen)

    def geometry(self, cell: Cell) -> Geometry:
        """What kind of stitch a cell is."""
        return Geometry.between(self.source.shapes[cell.i], self.frozen.positions[cell.j].rows, self.rules)

    def batches(self, steps: int) -> list[Tensor]:
        """The images of the first steps, as indices: whole epochs one after the other, as a sweep sees them."""
        found: list[Tensor] = []
        for epoch in itertools.count():
            if len(found) >= steps:
                return found[:steps]
            order = ImageOrder(seed=0).epoch(epoch, len(self.source.train)).to(self.device)
            found += [batch for batch in torch.split(order, self.batch_size) if len(batch) == self.batch_size]
        raise AssertionError


class BenchNetworks:
    """The networks of a pair and their images: small ResNets from their seeds, others as they were added.

    ``added`` holds networks of a data set; None: that of the embedded images, where small ResNets need no files.
    """

    def __init__(self, sender: str, receiver: str, added: Networks | None = None) -> None:
        self.sender, self.receiver = sender, receiver
        self.data = load_dataset(DEFAULT_DATASET, Path("unused")) if added is None else added.dataset
        self._added = added

    @property
    def built_in(self) -> bool:
        """Whether both are small ResNets, of any width."""
        return all(NetworkName.parse(name).built_in for name in (self.sender, self.receiver))

    @property
    def cells(self) -> int:
        """Of one unit."""
        return math.prod(self._positions(NetworkName.parse(name)) for name in (self.sender, self.receiver))

    def _positions(self, name: NetworkName) -> int:
        if name.built_in:
            return 1 + sum(BLOCKS[name.architecture])
        assert self._added is not None
        return len(self._added.load(name).chain.positions)

    def load(
        self, name: str, data: Dataset, width: int, steps: int, device: torch.device, *, exact: bool
    ) -> tuple[Chain, Transform]:
        """A copy of a network on a device, in fp32 or ``exact``, in fp64, and what it makes of images.

        One that is built in is trained on ``data`` for so many steps.
        """
        dtype = torch.float64 if exact else torch.float32
        parsed = NetworkName.parse(name)
        if parsed.built_in:
            chain = _small_resnet(parsed, width, data, device, steps).to(dtype)
            return chain, Transform(data.normalisation)
        assert self._added is not None
        network = self._added.load(parsed)
        copied = frozen_copy(network.chain, dtype, device)
        assert isinstance(copied, Chain)
        return copied, network.record.transform

    def fitting_images(self, chain: Chain, dtype: torch.dtype, device: torch.device, most: int, least: int) -> int:
        """As many images, up to ``most``, as a sender's representations of which fit into a share of the memory."""
        channels, height, width = chain.input_shape
        each = sum(elements(position.rows) for position in chain.positions) * dtype.itemsize
        each += channels * height * width * 4
        return max(least, min(most, int(_REPRESENTATIONS_SHARE * available_memory(device)) // each))


@torch.no_grad()
def make_bench_pair(
    networks: BenchNetworks,
    *,
    width: int,
    batch_size: int,
    images: int,
    tests: int,
    dtype: torch.dtype,
    device: torch.device,
    kernel: str,
    compiled: bool = False,
    training_steps: int = 0,
    rules: Rules = DEFAULT_RULES,
    attention: Attention = "fused",
) -> BenchPair:
    """A pair on the first images of its data set, as many as there are and as memory holds, but one batch at least.

    ``width`` and ``training_steps`` are those of small ResNets. Raises ConfigError where there is not one batch, or a
    cell cannot be stitched by the ``rules``.
    """
    whole = networks.data
    exact = dtype == torch.float64
    if len(whole.train) < batch_size:
        raise ConfigError(
            f"{argument('batch_size', batch_size)}: {whole.name} has {len(whole.train)} training images; expected a "
            "batch that they fill"
        )
    data = Dataset(whole.name, _first(whole.train, images), _first(whole.test, tests), whole.classes).to(device)
    loaded = {
        name: networks.load(name, data, width, training_steps, device, exact=exact)
        for name in dict.fromkeys((networks.sender, networks.receiver))
    }
    (sender, transform), (receiver, _) = loaded[networks.sender], loaded[networks.receiver]
    count = networks.fitting_images(sender, dtype, device, images, batch_size)
    train, test = (
        Images(_transformed(transform, split), split.labels)
        for split in (_first(data.train, count), _first(data.test, min(tests, count)))
    )
    return pair_of(
        sender,
        receiver,
        train,
        test,
        Unit(sender=networks.sender, receiver=networks.receiver, setting="T2T", loss="task", seed=0),
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        kernel=kernel,
        compiled=compiled,
        rules=rules,
        attention=attention,
    )


class Images(NamedTuple):
    """Images as a network takes them, fp32 (N, C, H, W), and labels (N,), on one device."""

    x: Tensor
    labels: Tensor


@torch.no_grad()
def pair_of(
    sender: Chain,
    receiver: Chain,
    train: Images,
    test: Images,
    unit: Unit,
    *,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kernel: str = "torch",
    compiled: bool = False,
    rules: Rules = DEFAULT_RULES,
    attention: Attention = "fused",
) -> BenchPair:
    """A pair of two chains; raises ConfigError where a cell cannot be stitched by the ``rules``."""
    provider = FrozenNetwork(sender, dtype=dtype, device=device)
    frozen = use_graphs(FrozenNetwork(receiver, dtype=dtype, device=device), receiver, attention)
    pair = BenchPair(
        sender=sender,
        receiver=receiver,
        frozen=compile_blocks(frozen) if compiled else frozen,
        source=ResidentSource.from_tensors(
            _representations(provider, train.x),
            _representations(provider, test.x),
            train.labels,
            test.labels,
            sender.positions,
        ),
        x=train.x.to(torch.float64 if dtype == torch.float64 else torch.float32),
        unit=unit,
        batch_size=batch_size,
        kernel=kernel,
        rules=rules,
    )
    for cell in pair.cells:
        pair.geometry(cell)
    return pair


def _first(split: Split, images: int) -> Split:
    return split[: min(images, len(split))]


def _small_resnet(name: NetworkName, width: int, data: Dataset, device: torch.device, steps: int) -> SmallResNet:
    chain = SmallResNet(BLOCKS[name.architecture], width=width, classes=data.classes, input_shape=data.input_shape)
    initialise(chain, torch_generator("network", str(name), width, data.classes))
    chain = cast(SmallResNet, chain.to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]
    if steps:
        batch = min(64, len(data.train))
        epochs = max(1, steps * batch // len(data.train))
        recipe = replace(network_recipe("fast", epochs), batch_size=batch, augment=False)
        with torch.enable_grad():
            fit_network(chain, data, Transform(data.normalisation), name, recipe, device)
    return chain.eval()


def _transformed(transform: Transform, split: Split) -> Tensor:
    blocks = [transform.apply(split.images[start : start + PASS_IMAGES]) for start in range(0, len(split), PASS_IMAGES)]
    return torch.cat(blocks)


def _representations(network: FrozenNetwork, x: Tensor) -> list[Tensor]:
    passes = [network.representations(block) for block in torch.split(x, PASS_IMAGES)]
    return [torch.cat(blocks) for blocks in zip(*passes, strict=True)]
