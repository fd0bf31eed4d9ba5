"""What is measured: two networks, real images, the sender's representations, all cells of the pair."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.represent import represent
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.data import Dataset, Split, Transform, load_dataset
from fastsitch.identity import torch_generator
from fastsitch.network_names import BLOCKS, NetworkName
from fastsitch.networks.resnet import SmallResNet, initialise
from fastsitch.networks.train_network import fit_network, network_recipe
from fastsitch.receivers.compiled_blocks import compile_blocks
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.vocabulary import DEFAULT_DATASET


@dataclass(frozen=True, kw_only=True)
class BenchPair:
    """One pair of networks, real images, and in ``source`` the sender's representations of them."""

    sender: SmallResNet
    receiver: SmallResNet
    frozen: FrozenNetwork
    source: ResidentSource
    data: Dataset
    unit: Unit
    batch_size: int
    kernel: str

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

    def batches(self, steps: int) -> list[Tensor]:
        """The images of the first steps, as indices: whole epochs one after the other, as a sweep sees them."""
        found: list[Tensor] = []
        for epoch in itertools.count():
            if len(found) >= steps:
                return found[:steps]
            order = ImageOrder(seed=0).epoch(epoch, len(self.source.train)).to(self.device)
            found += [batch for batch in torch.split(order, self.batch_size) if len(batch) == self.batch_size]
        raise AssertionError


@torch.no_grad()
def make_bench_pair(
    sender: str,
    receiver: str,
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
) -> BenchPair:
    """Networks from their seeds, trained for a few steps if asked, on the first of the embedded images."""
    whole = load_dataset(DEFAULT_DATASET, Path("unused"))
    data = Dataset(whole.name, _first(whole.train, images), _first(whole.test, tests), whole.classes).to(device)
    exact = dtype == torch.float64
    chains = {
        name: _network(name, width, data, device, training_steps).to(torch.float64 if exact else torch.float32)
        for name in dict.fromkeys((sender, receiver))
    }
    frozen = FrozenNetwork(chains[receiver], dtype=dtype, device=device)
    provider = FrozenNetwork(chains[sender], dtype=dtype, device=device)
    train, test = (_representations(provider, data, split) for split in (data.train, data.test))
    return BenchPair(
        sender=chains[sender],
        receiver=chains[receiver],
        frozen=compile_blocks(frozen) if compiled else frozen,
        source=ResidentSource.from_tensors(train, test, data.train.labels, data.test.labels),
        data=data,
        unit=Unit(sender=sender, receiver=receiver, setting="T2T", loss="task", seed=0),
        batch_size=batch_size,
        kernel=kernel,
    )


def _first(split: Split, images: int) -> Split:
    return Split(split[:images].pixels, split.labels[:images])


def _network(name: str, width: int, data: Dataset, device: torch.device, steps: int) -> SmallResNet:
    parsed = NetworkName.parse(name)
    chain = SmallResNet(BLOCKS[parsed.architecture], width=width, classes=data.classes, input_shape=data.input_shape)
    initialise(chain, torch_generator("network", name, width, data.classes))
    chain = cast(SmallResNet, chain.to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]
    if steps:
        batch = min(64, len(data.train))
        epochs = max(1, steps * batch // len(data.train))
        recipe = replace(network_recipe("fast", epochs), batch_size=batch, augment=False)
        with torch.enable_grad():
            fit_network(chain, data, Transform(data.normalisation), parsed, recipe, device)
    return chain.eval()


def _representations(network: FrozenNetwork, data: Dataset, split: Split) -> list[Tensor]:
    transform = Transform(data.normalisation)
    passes = [
        represent(network, transform, images, stored=network.dtype, dtype=network.dtype) for images in split.blocks()
    ]
    return [torch.cat(blocks) for blocks in zip(*passes, strict=True)]
