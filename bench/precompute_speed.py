"""Precompute beside its two halves: the forward pass alone, writing alone, one after the other, and overlapped.

The four ways alternate, on one network and the same images, in a folder that is removed again. Times include opening
the finished store, which checks every checksum:

    .venv/bin/python bench/precompute_speed.py R2222 --width 16 --json bench/results/precompute.json
    .venv/bin/python bench/precompute_speed.py R1111 --width 64 --images 3000
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from fastsitch.activations.precompute import Block, ensure_store, forward_block, store_identity
from fastsitch.activations.store import ActivationStore
from fastsitch.activations.store_writer import writing
from fastsitch.data import Dataset, Split, load_dataset
from fastsitch.machine import DTYPES, configure, processor, resolve_device, versions
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import Network, load_network
from fastsitch.networks.train_network import network_recipe, train_network
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.root import Root

DTYPE = "bf16"


class _NothingWritten(Exception):
    """Leaves a store unfinished."""


class Ways:
    """The same store, made in several ways; each method returns the seconds it took."""

    def __init__(self, folder: Path, dataset: Dataset, network: Network, device: torch.device) -> None:
        self.folder, self.dataset, self.network, self.device = folder, dataset, network, device
        self.identity = store_identity(dataset, network, dtype=DTYPE, compress="none", device=device)
        self.frozen = FrozenNetwork(network.chain, dtype=DTYPES[self.identity.compute], device=device)
        self.sizes = {"train": len(dataset.train), "test": len(dataset.test)}
        self.bytes = 0

    def forward(self) -> float:
        return self._make(write=False)

    def write(self) -> float:
        """Every block of the right size, with the values of the first images."""
        return self._make(forward=False)

    def in_turn(self) -> float:
        return self._make()

    def overlapped(self) -> float:
        path = self.folder / "activations" / "bench" / "overlapped"
        start = time.perf_counter()
        store, _ = ensure_store(path, self.dataset, self.network, dtype=DTYPE, device=self.device)
        took = time.perf_counter() - start
        self.bytes = store.bytes
        shutil.rmtree(path)
        return took

    def _make(self, *, forward: bool = True, write: bool = True) -> float:
        path = self.folder / "activations" / "bench" / "store"
        blocks: dict[int, Block] = {}
        took = 0.0
        with (
            suppress(_NothingWritten),
            writing(path, self.identity, self.network.chain.positions, self.sizes) as writer,
        ):
            for name, split in (("train", self.dataset.train), ("test", self.dataset.test)):
                for first in range(0, len(split), writer.block_images):
                    images = split.images[first : first + writer.block_images]
                    if not forward and len(images) not in blocks:
                        blocks[len(images)] = self._block(images)
                    start = time.perf_counter()
                    block = self._block(images) if forward else blocks[len(images)]
                    if write:
                        block.write(writer, name, first)
                    took += time.perf_counter() - start
                writer.write_samples(name, split.labels, torch.arange(len(split)))
            if not write:
                raise _NothingWritten
            start = time.perf_counter()
        if not write:
            return took
        # as ensure_store does, which reads every checksum
        ActivationStore.open(path)
        took += time.perf_counter() - start
        shutil.rmtree(path)
        return took

    def _block(self, images: torch.Tensor) -> Block:
        block = forward_block(self.frozen, self.network, images, DTYPES[DTYPE])
        if block.copied is not None:
            block.copied.synchronize()
        return block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", nargs="?", default="R2222")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--images", type=int, default=10_000, help="training images; a fifth as many test images")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's folder for such things")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    device = resolve_device(options.device)
    configure(device)
    whole = load_dataset("fashion-mini", Path("unused"))
    dataset = replace(
        whole,
        train=Split(whole.train.images[: options.images], whole.train.labels[: options.images]),
        test=Split(whole.test.images[: options.images // 5], whole.test.labels[: options.images // 5]),
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Root.at(Path(folder) / "root")
        # one short epoch: the time does not depend on the weights
        few = replace(dataset, train=Split(dataset.train.images[:256], dataset.train.labels[:256]))
        name = NetworkName.parse(options.network)
        train_network(root, few, name, width=options.width, recipe=network_recipe("fast", 1), device=device)
        trained = load_network(root.models(few.name), name)
        network = Network(replace(trained.record, data_hash=dataset.hash), trained.chain)
        ways = Ways(Path(folder), dataset, network, device)
        ways.overlapped()
        times: dict[str, list[float]] = {"forward": [], "write": [], "in_turn": [], "overlapped": []}
        for _ in range(options.repeats):
            for way, taken in times.items():
                taken.append(getattr(ways, way)())
    slower = [max(pair) for pair in zip(times["forward"], times["write"], strict=True)]
    result = {
        "machine": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "network": options.network,
        "width": options.width,
        "images": sum(ways.sizes.values()),
        "bytes": ways.bytes,
        "n": options.repeats,
        "seconds": {way: spread(taken) for way, taken in times.items()},
        "overlapped_over_in_turn": spread([a / b for a, b in zip(times["overlapped"], times["in_turn"], strict=True)]),
        "overlapped_over_slower_half": spread([a / b for a, b in zip(times["overlapped"], slower, strict=True)]),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
