"""The sweep's engine beside the same cells trained one by one with plain frozen modules.

Trains every cell of one pair in both ways from the same initial stitches on the same images in the same order, and
compares the accuracies; then times a few steps of each, alternating. Networks and stores of the demo are used:

    make demo
    .venv/bin/python bench/one_by_one.py --root demo/fastsitch-data --json bench/results/one_by_one.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.activations.order import ImageOrder
from fastsitch.activations.resident import ResidentSource
from fastsitch.activations.store import ActivationStore
from fastsitch.machine import DTYPES, processor, resolve_device, resolve_precision, versions
from fastsitch.networks.checkpoint import load_network
from fastsitch.networks.frozen import FrozenNetwork
from fastsitch.networks.names import NetworkName
from fastsitch.networks.resnet import SmallResNet
from fastsitch.root import Root
from fastsitch.stitching.bank import StitchBank, initial_stitch
from fastsitch.stitching.cascade import Cascade
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import TrainingRecipe, train_group, train_step
from fastsitch.stitching.geometry import Geometry
from fastsitch.stitching.schedule import stitch_schedule
from fastsitch.sweep.config import STITCH_RECIPES

DATASET = "fashion-mini"


class PlainCell:
    """One stitch as anyone would train it: nn.Conv2d, the receiver's own modules, autocast, torch.optim.SGD."""

    def __init__(self, cell: Cell, sender: SmallResNet, receiver: SmallResNet, source: ResidentSource, mixed: bool):
        self.geometry = Geometry.between(sender.positions[cell.i].shape, receiver.positions[cell.j].shape)
        self.cell, self.receiver, self.source, self.mixed = cell, receiver, source, mixed
        weight, bias = initial_stitch(cell, self.geometry)
        self.conv = nn.Conv2d(weight.shape[1], weight.shape[0], self.geometry.down, stride=self.geometry.down)
        self.conv.weight.data.copy_(weight)
        self.conv.bias.data.copy_(bias)
        self.conv = self.conv.to(source.train.labels.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.conv.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
        shapes = source.shapes
        self.place = [k for k, shape in enumerate(shapes) if shape == shapes[cell.i]].index(cell.i)

    def logits(self, representations: dict, index: Tensor) -> Tensor:
        x = representations[self.geometry.sender][self.place].index_select(0, index).permute(0, 3, 1, 2)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.mixed):
            if self.geometry.up > 1:
                x = F.interpolate(x, scale_factor=self.geometry.up, mode="nearest")
            return self.receiver.tail(self.conv(x), self.cell.j).float()

    def step(self, index: Tensor, rate: float) -> None:
        loss = F.cross_entropy(self.logits(self.source.train._stacks, index), self.source.train.labels[index])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()

    @torch.no_grad()
    def accuracy(self) -> float:
        indices = torch.arange(len(self.source.test), device=self.source.test.labels.device).split(500)
        logits = torch.cat([self.logits(self.source.test._stacks, index) for index in indices])
        return (logits.argmax(-1) == self.source.test.labels).double().mean().item()


def batches(recipe: TrainingRecipe, order: ImageOrder, images: int) -> list[Tensor]:
    size = recipe.batch_size
    return [
        part
        for epoch in range(recipe.epochs)
        for part in order.epoch(epoch, images)[: images // size * size].split(size)
    ]


def seconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--pair", nargs=2, default=["R1111", "R1112"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=10, help="steps per timing")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    device = resolve_device(options.device)
    precision = resolve_precision("auto", device)
    dtype = DTYPES[precision]
    root = Root.at(options.root)
    sender_name, receiver_name = map(NetworkName.parse, options.pair)
    sender = load_network(root.models(DATASET), sender_name).chain.to(device)
    receiver = load_network(root.models(DATASET), receiver_name).chain.to(device)
    receiver.requires_grad_(False)
    receiver.to(memory_format=torch.channels_last)
    source = ResidentSource.load(ActivationStore.open(root.store(DATASET, sender_name)), dtype=dtype, device=device)
    recipe, order = STITCH_RECIPES["small"], ImageOrder(seed=0)
    unit = Unit(sender=options.pair[0], receiver=options.pair[1], setting="T2T", loss="task", seed=0)
    cells = [Cell(unit, i, j) for j in range(len(receiver.positions)) for i in range(len(sender.positions))]
    frozen = FrozenNetwork(receiver, dtype=dtype, device=device)
    mixed = precision == "bf16"

    with torch.no_grad():
        together: dict = {}
        batched_seconds = seconds(lambda: together.update(train_group(frozen, source, cells, recipe, order)), device)
    sequence = [index.to(device) for index in batches(recipe, order, len(source.train))]
    schedule = stitch_schedule(
        recipe.name, peak=recipe.lr, epochs=recipe.epochs, steps_per_epoch=len(sequence) // recipe.epochs
    )
    alone: dict[Cell, float] = {}

    def train_alone() -> None:
        for cell in cells:
            plain = PlainCell(cell, sender, receiver, source, mixed)
            for step, index in enumerate(sequence):
                plain.step(index, schedule.rate(step))
            alone[cell] = plain.accuracy()

    alone_seconds = seconds(train_alone, device)
    differences = np.array([together[cell].accuracy - alone[cell] for cell in cells])

    bank = StitchBank(cells, source.shapes, [p.shape for p in receiver.positions], dtype=dtype, device=device)
    cascade = Cascade(frozen, bank.counts, recipe.batch_size)
    optimizer = torch.optim.SGD([bank.parameters], lr=0.001, momentum=0.9, weight_decay=0.01)
    plains = [PlainCell(cell, sender, receiver, source, mixed) for cell in cells]
    few = sequence[: options.steps]

    @torch.no_grad()
    def run_batched() -> None:
        for index in few:
            train_step(cascade, bank, source.train.batch(index), optimizer)

    def run_alone() -> None:
        for plain in plains:
            for index in few:
                plain.step(index, 0.001)

    run_batched(), run_alone()
    times = [(seconds(run_batched, device), seconds(run_alone, device)) for _ in range(options.repeats)]
    samples = len(cells) * recipe.batch_size * len(few)
    batched, one_by_one = ([samples / pair[way] for pair in times] for way in (0, 1))
    ratios = [other / own for own, other in times]
    result = {
        "machine": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": versions(),
        "pair": f"{options.pair[0]}--{options.pair[1]}",
        "width": sender.positions[0].shape[0],
        "cells": len(cells),
        "batch_size": recipe.batch_size,
        "n": options.repeats,
        "cells_x_images_per_second": {"batched": spread(batched), "one_by_one": spread(one_by_one)},
        "ratio": spread(ratios),
        "whole_training_seconds": {"batched": batched_seconds, "one_by_one": alone_seconds},
        "accuracy": {
            "mean_batched": float(np.mean([together[cell].accuracy for cell in cells])),
            "mean_one_by_one": float(np.mean([alone[cell] for cell in cells])),
            "mean_difference": float(differences.mean()),
            "standard_deviation_of_differences": float(differences.std(ddof=1)),
            "largest_difference": float(np.abs(differences).max()),
        },
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
