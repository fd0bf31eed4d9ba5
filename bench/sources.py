"""The same training from the resident, the streamed and the live source, and how much memory streaming takes.

Trains whole epochs of the cells R1111 -> R1111 on the embedded images, alternating between the sources, with networks
and stores made in a temporary folder. What is timed is ``train_group``: epochs with their reading, then the test pass.

    .venv/bin/python bench/sources.py --json bench/results/sources.json
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.live_source import LiveSource, LiveSplit
from fastsitch.activations.precompute import ensure_store
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.activations.source import Source
from fastsitch.activations.store import ActivationStore
from fastsitch.activations.store_manifest import StoreIdentity
from fastsitch.activations.store_writer import writing
from fastsitch.activations.streamed_source import StreamedSource
from fastsitch.data import Dataset, Split, load_dataset
from fastsitch.machine import DTYPES, configure, processor, resolve_device, resolve_precision, versions
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network
from fastsitch.networks.resnet import SmallResNet
from fastsitch.networks.train_network import network_recipe, train_network
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.root import Root
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import train_group
from fastsitch.stitching.recipe import TrainingRecipe
from fastsitch.timing import seconds

NAME = NetworkName.parse("R1111")
UNIT = Unit(sender="R1111", receiver="R1111", setting="T2T", loss="task", seed=0)


def training(epochs: int) -> TrainingRecipe:
    return TrainingRecipe(name="small", epochs=epochs, batch_size=64, lr=0.01, momentum=0.9, weight_decay=0.01)


def train(source: Source, receiver: FrozenNetwork, epochs: int) -> float:
    """Seconds of training and evaluating all cells."""
    cells = [Cell(UNIT, i, j) for j in range(len(receiver.positions)) for i in range(len(source.shapes))]
    with torch.no_grad():
        return seconds(
            lambda: train_group(receiver, source, cells, training(epochs), ImageOrder(seed=0)), receiver.device
        )


def speeds(options: argparse.Namespace, folder: Path, device: torch.device) -> dict:
    dtype = DTYPES[resolve_precision("auto", device)]
    whole = load_dataset("fashion-mini", folder)
    few = Split(whole.train.images[: options.images], whole.train.labels[: options.images])
    dataset = Dataset(whole.name, few, whole.test, whole.classes)
    root = Root.at(folder)
    train_network(root, dataset, NAME, width=options.width, recipe=network_recipe("fast", 1), device=device)
    network = load_network(root.models(dataset.name), NAME)
    store, _ = ensure_store(folder / "store" / "R1111", dataset, network, device=device)
    receiver = FrozenNetwork(network.chain, dtype=dtype, device=device)
    sender = FrozenNetwork(network.chain, dtype=DTYPES[store.identity.compute], device=device)
    live = [
        LiveSplit(sender, network.record.transform, split, stored=torch.bfloat16, dtype=dtype)
        for split in (dataset.train, dataset.test)
    ]
    every: dict[str, Source] = {
        "resident": ResidentSource.load(store, dtype=dtype, device=device),
        "streamed": StreamedSource(store, dtype=dtype, device=device),
        "live": LiveSource(*live),
    }
    sources = {name: every[name] for name in ("resident", *options.sources)}
    times: dict[str, list[float]] = {name: [] for name in sources}
    for round_number in range(options.repeats + 1):
        for name, source in sources.items():
            took = train(source, receiver, options.epochs)
            # the first round warms up
            if round_number:
                times[name].append(took)
            print(f"round {round_number}: {name} {took:.2f} s", file=sys.stderr, flush=True)
    return {
        "store_bytes": store.bytes,
        "seconds": {name: spread(values) for name, values in times.items()},
        "ratio_to_resident": {
            name: spread([a / b for a, b in zip(times[name], times["resident"], strict=True)])
            for name in sources
            if name != "resident"
        },
    }


def peak(folder: Path, times: int) -> dict[str, int]:
    """Peak memory of a process that streams the embedded images, repeated, through a network of width 2."""
    line = [sys.executable, __file__, "--peak", str(times), "--folder", str(folder)]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


def repeated_store(folder: Path, times: int) -> None:
    """The embedded images, as an untrained network of width 2 represents them, so many times over."""
    dataset = load_dataset("fashion-mini", folder)
    chain = SmallResNet((1, 1, 1, 1), width=2, classes=10, input_shape=dataset.input_shape)
    sender = FrozenNetwork(chain, dtype=torch.bfloat16, device=torch.device("cpu"))
    identity = StoreIdentity(
        network="R1111",
        dataset=dataset.name,
        weights="",
        data="",
        normalisation={},
        dtype="bf16",
        compute="bf16",
        compress="none",
    )
    # whole blocks, so that every repetition begins with a chunk
    splits = {"train": dataset.train.images[: 39 * 256], "test": dataset.test.images[: 7 * 256]}
    sizes = {name: times * len(images) for name, images in splits.items()}
    with torch.no_grad(), writing(folder / f"times-{times}" / "R1111", identity, chain.positions, sizes) as writer:
        for name, images in splits.items():
            for first in range(0, len(images), 256):
                block = sender.representations(dataset.normalisation.apply(images[first : first + 256]))
                for start in range(first, sizes[name], len(images)):
                    for index, x in enumerate(block):
                        writer.write(name, index, start, x.permute(0, 2, 3, 1))
            numbers = torch.arange(sizes[name])
            writer.write_samples(name, numbers % 10, numbers)


def stream_once(folder: Path, times: int) -> None:
    """In a process of its own: one epoch and the test pass; prints the size of the store and the peak memory."""
    store = ActivationStore.open(folder / f"times-{times}" / "R1111")
    source = StreamedSource(store, dtype=torch.bfloat16, device=torch.device("cpu"))
    for batches in (source.train.shuffled(ImageOrder(seed=0), 0, 64), source.test.in_order(128)):
        for batch in batches:
            for shape in source.shapes:
                batch.operand(shape, 1, "torch")
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"store_bytes": store.bytes, "peak_bytes": kilobytes * 1024}))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--repeats", type=int, default=5)
    beside = ("streamed", "live")
    parser.add_argument("--sources", nargs="+", choices=beside, default=beside, help="timed beside the resident one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        stream_once(options.folder, options.peak)
        return
    device = resolve_device(options.device)
    configure(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        memory = {}
        for times in (1, 10):
            repeated_store(folder, times)
            memory[f"{times}x"] = peak(folder, times)
            print(f"{times}x: {memory[f'{times}x']}", file=sys.stderr, flush=True)
        measured = speeds(options, folder / "speed", device)
    result = {
        "machine": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "precision": resolve_precision("auto", device),
        "versions": versions(),
        "pair": "R1111--R1111",
        "width": options.width,
        "batch_size": 64,
        "images": options.images,
        "epochs": options.epochs,
        "n": options.repeats,
        **measured,
        "streaming_memory": memory,
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
