"""Receivers as graphs beside the same receivers through autograd: what they keep, how long they take, the memory.

    python bench/receivers.py [--networks resnet18,vit,...] [--images 64] [--repeats 5] [--precision auto]
        [--json FILE]

Random weights, images of 64 pixels (32 for the ViT). A pass is that of the stitches into position 0, in micro-batches,
and back; both ways alternate. Kept are bytes per image between the two, beside representations and weights. A step
trains one stitch per position of the network (into itself) on half of the images: of the engine, and of the plain
cascade through autograd, which has the same stitches; they alternate. Its memory is predicted from shapes alone, and
measured as the growth of the process.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from fastsitch import Chain
from fastsitch.benchmark.agreement import across
from fastsitch.benchmark.bench_pair import Images, pair_of
from fastsitch.benchmark.group_sizes import measured_memory, predicted_memory
from fastsitch.benchmark.plain_cascade import PlainCascade
from fastsitch.benchmark.short_training import short_training
from fastsitch.benchmark.timed_engine import Engine
from fastsitch.machine import DTYPES, resolve_precision
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.receivers.graph_segment import GraphSegment, use_graphs
from fastsitch.stitching.cascade import Cascade
from fastsitch.stitching.cells import Unit
from fastsitch.stitching.geometry import Rules

CPU = torch.device("cpu")
NETWORKS = (
    "resnet18",
    "resnet50",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "convnext_tiny",
    "regnet_y_400mf",
    "densenet121",
    "vit",
    "swin_t",
)


def build(name: str) -> Chain:
    """A network with random weights, and running statistics that are not those of a new one."""
    torch.manual_seed(0)
    side = 32 if name == "vit" else 64
    if name == "vit":
        # that of docs/families/vit.py
        model: nn.Module = models.VisionTransformer(
            image_size=32, patch_size=4, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
        )
    else:
        model = models.get_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        # what is 0 in a new network, such as the end of torchvision's ViT
        for parameter in module.parameters(recurse=False):
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return Chain.from_module(model.eval(), torch.zeros(1, 3, side, side))


class Pass:
    """Forward and back through all segments behind position 0."""

    def __init__(self, network: FrozenNetwork, images: int, classes: int = 10) -> None:
        counts = [1] + [0] * (len(network.positions) - 1)
        self.cascade = Cascade(network, counts, images)
        generator = torch.Generator().manual_seed(0)
        spec = network.positions[0].to_rows(network.positions[0].empty(images, network.dtype, CPU))
        self.x = torch.randn(1, *spec.shape, generator=generator).to(network.dtype)
        self.g = torch.randn(1, images, classes, generator=generator)

    def run(self) -> tuple[Tensor, Tensor]:
        logits = self.cascade.forward(lambda j, out: out.copy_(self.x) if j == 0 else None)
        gradients = list(self.cascade.backward(self.g.to(logits.dtype)))
        return logits, gradients[-1][1]


def kept_by_autograd(network: FrozenNetwork, images: int) -> int:
    """Bytes per image that autograd keeps beside weights and representations."""
    total = 0
    x = network.positions[0].empty(images, network.dtype, CPU).normal_()
    for segment, position in zip(network.segments[1:], network.positions[1:], strict=True):
        out = position.empty(images, network.dtype, CPU)
        segment.infer(x, out, images)
        segment.note_cost(x, out)
        total += segment.cost.kept
        x = out
    return total


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def measure(name: str, dtype: torch.dtype, images: int, repeats: int) -> dict[str, Any]:
    chain = build(name)
    today = FrozenNetwork(chain, dtype=dtype, device=CPU)
    start = time.perf_counter()
    graphs = use_graphs(FrozenNetwork(chain, dtype=dtype, device=CPU), chain)
    built = time.perf_counter() - start
    # first, because what other work leaves in the process's heap adds to it
    memory_and_step = step(name, chain, dtype, images // 2, repeats)
    rewritten = [segment for segment in graphs.segments if isinstance(segment, GraphSegment)]
    ways = {"autograd": Pass(today, images), "graph": Pass(graphs, images)}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, each in ways.items():
            found = seconds(each.run)
            if repeat:
                times[way].append(found)
    kept = kept_by_autograd(today, images)
    graph_kept = sum(segment.cost.kept for segment in rewritten)
    medians = {way: statistics.median(found) for way, found in times.items()}
    return {
        "network": name,
        "segments": len(graphs.segments) - 1,
        "as graphs": len(rewritten),
        "build seconds": built,
        "kept by autograd": kept,
        "kept": graph_kept,
        "kept ratio": graph_kept / kept,
        "seconds": times,
        "time ratio": medians["graph"] / medians["autograd"],
        "errors": errors(chain, dtype),
        **memory_and_step,
    }


def step(name: str, chain: Chain, dtype: torch.dtype, images: int, repeats: int) -> dict[str, Any]:
    """A training step of one stitch per position by the engine and by the plain cascade, and its memory."""
    generator = torch.Generator().manual_seed(0)
    given = Images(
        torch.randn(2 * images, *chain.input_shape, generator=generator).contiguous(memory_format=torch.channels_last),
        torch.randint(0, 10, (2 * images,), generator=generator),
    )
    unit = Unit(sender=name, receiver=name, setting="T2T", loss="task", seed=0)
    rules = Rules(resample="area")
    pair = pair_of(chain, chain, given, given, unit, batch_size=images, dtype=dtype, device=CPU, rules=rules)
    cells = across(pair)
    batches = pair.batches(1)
    # libraries make their workspaces
    short_training(pair, cells[-2:], 1)()
    predicted, measured = predicted_memory(pair, cells), measured_memory(pair, cells)
    trainers = {"engine": Engine(pair, cells), "plain cascade": PlainCascade(pair, cells)}
    times: dict[str, list[float]] = {way: [] for way in trainers}
    for repeat in range(repeats + 1):
        for way, trainer in trainers.items():
            found = seconds(lambda trainer=trainer: trainer.run(batches))  # type: ignore[misc]
            if repeat:
                times[way].append(found)
    return {
        "cells": len(cells),
        "step seconds": times,
        "cascade over engine": statistics.median(times["plain cascade"]) / statistics.median(times["engine"]),
        "memory predicted": predicted,
        "memory": measured,
        "memory ratio": predicted / measured if measured else None,
    }


def errors(chain: Chain, dtype: torch.dtype) -> dict[str, float]:
    """Of logits and gradients, relative to fp64 through autograd: of a graph in fp64, and of both ways in ``dtype``."""
    exact = Pass(FrozenNetwork(chain.double(), dtype=torch.float64, device=CPU), 8).run()
    found = {}
    for way, each in (("autograd", dtype), ("graph", dtype), ("graph fp64", torch.float64)):
        network = FrozenNetwork(chain, dtype=each, device=CPU)
        if way != "autograd":
            network = use_graphs(network, chain)
        outputs = Pass(network, 8).run()
        for what, wanted, given in zip(("logits", "gradients"), exact, outputs, strict=True):
            found[f"{way}: {what}"] = float((given.double() - wanted).norm() / wanted.norm())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dtype = DTYPES[resolve_precision(options.precision, CPU)]
    rows = []
    for name in options.networks.split(","):
        row = measure(name, dtype, options.images, options.repeats)
        rows.append(row)
        print(
            f"{name}: {row['as graphs']} of {row['segments']} segments, built in {row['build seconds']:.1f} s, "
            f"kept {row['kept by autograd'] / 1e6:.2f} -> {row['kept'] / 1e6:.2f} MB ({row['kept ratio']:.2f}), "
            f"time {statistics.median(row['seconds']['autograd']):.3f} -> "
            f"{statistics.median(row['seconds']['graph']):.3f} s ({row['time ratio']:.2f}), "
            + ", ".join(f"{key} {value:.1e}" for key, value in row["errors"].items())
            + f"; a step of {row['cells']} stitches: plain cascade {row['cascade over engine']:.2f} of the engine, "
            f"memory {row['memory predicted'] / 1e6:.0f} MB predicted, {(row['memory'] or 0) / 1e6:.0f} measured",
            flush=True,
        )
    if options.json is not None:
        content = {"precision": str(dtype), "images": options.images, "networks": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
