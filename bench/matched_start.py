"""Does a matched start pay? One epoch from it beside four from the default start, and beside the published way.

From the matched start stitches are trained by the preconditioned optimizer, for comparison also by plain SGD.

Parts, each kept in the JSON file as soon as it is there and skipped when it is there already:
    fashion-mini seed 0, 1, 2   R1111 -> R1112, all cells: statistics, solution and one epoch, against four epochs
    fashion-mnist seed 0        the same on 20,000 images, tested on 10,000
    half an epoch, three quarters of an epoch
                                statistics, solution and so much of an epoch, fashion-mini, each seed
    published (--published)     every cell alone: the sender run on each batch, gradients of all frozen weights, bf16
                                autocast, four epochs; saved cell by cell; before every 10 cells the matched start
                                again, with three quarters of an epoch and with one

    .venv/bin/python bench/matched_start.py --root bench-data --json bench/results/matched_start.json --published

Seeds are those of networks, stitches and order of images. Training and evaluation are timed apart.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsitch
from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.ordered_split import ResidentSplitInOrder, StoredSplitInOrder
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.activations.store import ActivationStore
from fastsitch.data import Dataset, Split, load_dataset
from fastsitch.files import write_json
from fastsitch.machine import DTYPES, configure, processor, resolve_device, resolve_kernel, resolve_precision, versions
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network
from fastsitch.progress import Progress
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.root import Root
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import evaluate_matched, train_group
from fastsitch.stitching.geometry import Geometry
from fastsitch.stitching.matching import Matched, match
from fastsitch.stitching.moments import SenderMoments, pair_moments
from fastsitch.stitching.recipe import PEAK_RATES, TrainingRecipe
from fastsitch.stitching.stitch_bank import initial_stitch
from fastsitch.stitching.stitch_schedule import stitch_schedule

PAIR = ("R1111", "R1112")
EPOCHS = 4
BETWEEN = 10
"""Cells of the published way between two measurements of the matched start."""

SHORT = {"half an epoch": 0.5, "three quarters of an epoch": 0.75}
"""Parts of the file: epochs from the matched start."""

BESIDE = {"three_quarters": 0.75, "one_epoch": 1}
"""Epochs from the matched start beside the published way."""

BARS = {"time_share_at_most": 0.4, "times_sooner_at_least": 16}
Json = dict[str, Any]


class Study:
    """One pair on one data set: networks trained, stores made, all in memory."""

    def __init__(self, root: Root, dataset: str, seed: int, width: int, device: torch.device) -> None:
        names = [f"{name}@{seed}" for name in PAIR]
        say(f"networks and stores of {dataset}, seed {seed}")
        options = {"dataset": dataset, "root": root.path, "device": str(device)}
        fastsitch.train(*names, width=width, **options)
        fastsitch.precompute(*names, **options)
        self.device, self.seed = device, seed
        self.precision = resolve_precision("auto", device)
        self.dtype = DTYPES[self.precision]
        self.kernel = resolve_kernel("auto", device)
        self.data: Dataset = load_dataset(dataset, root.data_dir)
        self.networks = [load_network(root.models(dataset), NetworkName.parse(name)) for name in names]
        stores = [ActivationStore.open(root.store(dataset, NetworkName.parse(name))) for name in names]
        self.source = ResidentSource.load(stores[0], dtype=self.dtype, device=device)
        self.expected = stores[1]
        self.receiver = FrozenNetwork(self.networks[1].chain, dtype=self.dtype, device=device)
        unit = Unit(sender=names[0], receiver=names[1], setting="T2T", loss="task", seed=seed)
        positions = [range(len(network.chain.positions)) for network in self.networks]
        self.cells = [Cell(unit, i, j) for i in positions[0] for j in positions[1]]

    def recipe(self, epochs: float, optimizer: str = "sgd") -> TrainingRecipe:
        lr = PEAK_RATES[optimizer]
        recipe = TrainingRecipe(name="paper", epochs=epochs, batch_size=64, lr=lr, momentum=0.9, weight_decay=0.01)
        return replace(recipe, optimizer=optimizer)

    @torch.no_grad()
    def matching(self) -> tuple[dict[Cell, Matched], Json]:
        """The matched stitches, and the seconds for statistics and solution."""
        expected = StoredSplitInOrder(self.expected, dtype=self.dtype, device=self.device)
        moments, statistics_seconds = self.timed(
            lambda: pair_moments(SenderMoments(ResidentSplitInOrder(self.source)), expected)
        )
        matched, solve_seconds = self.timed(lambda: match(moments))
        times = {"statistics_seconds": statistics_seconds, "solve_seconds": solve_seconds}
        return {cell: matched[cell.i, cell.j] for cell in self.cells}, times

    @torch.no_grad()
    def train(self, epochs: float, init: dict[Cell, Matched] | None, optimizer: str = "sgd") -> Json:
        """Train all cells in one batch; the last step's report ends the training, what follows is evaluation."""
        marks = []

        def mark_end(progress: Progress) -> None:
            if progress.done == progress.total:
                self.synchronize()
                marks.append(time.perf_counter())

        start = time.perf_counter()
        order = ImageOrder(seed=self.seed)
        recipe = self.recipe(epochs, optimizer)
        results, total = self.timed(
            lambda: train_group(
                self.receiver, self.source, self.cells, recipe, order, kernel=self.kernel, init=init, report=mark_end
            )
        )
        training = marks[-1] - start
        return {"training_seconds": training, "evaluation_seconds": total - training, **self.accuracies(results)}

    def from_matched(self, optimizer: str = "preconditioned", epochs: float = 1) -> Json:
        """Statistics, solution and so many epochs."""
        matched, times = self.matching()
        trained = self.train(epochs, matched, optimizer)
        seconds = sum(times.values()) + trained["training_seconds"]
        return {**times, **trained, "seconds": seconds}

    @torch.no_grad()
    def before_training(self) -> float:
        matched, _ = self.matching()
        results = evaluate_matched(self.receiver, self.source, matched, images=128, kernel=self.kernel)
        return float(self.accuracies(results)["mean_accuracy"])

    def accuracies(self, results: dict[Cell, CellResult]) -> Json:
        values = {f"{cell.i},{cell.j}": results[cell].accuracy for cell in self.cells}
        return {"mean_accuracy": float(np.mean(list(values.values()))), "accuracy": values}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        self.synchronize()
        start = time.perf_counter()
        result = work()
        self.synchronize()
        return result, time.perf_counter() - start


def compare(study: Study) -> Json:
    say("  matched start, one epoch")
    matched = study.from_matched()
    plain = study.from_matched("sgd")
    say(f"  plain SGD {plain['mean_accuracy']:.4f} after {plain['seconds']:.1f} s; preconditioned")
    say(f"  {matched['mean_accuracy']:.4f} after {matched['seconds']:.1f} s; default start, {EPOCHS} epochs")
    default = study.train(EPOCHS, None)
    say(f"  {default['mean_accuracy']:.4f} after {default['training_seconds']:.1f} s")
    share = matched["seconds"] / default["training_seconds"]
    matching = matched["statistics_seconds"] + matched["solve_seconds"]
    advantage = matched["mean_accuracy"] - default["mean_accuracy"]
    return {
        "from_matched": matched,
        "from_matched_by_sgd": plain,
        "from_default": default,
        "accuracy_before_training": study.before_training(),
        "accuracy_advantage": advantage,
        "time_share": share,
        "matching_over_one_epoch": matching / (default["training_seconds"] / EPOCHS),
        "bars": {
            "at_least_as_accurate": advantage >= 0,
            "time_share": share <= BARS["time_share_at_most"],
            "matching_below_one_epoch": matching < default["training_seconds"] / EPOCHS,
        },
    }


class PublishedCell:
    """One stitch as the study trained it, both networks in eval mode; their weights keep requiring gradients."""

    def __init__(self, study: Study, cell: Cell) -> None:
        self.cell, self.study, self.device = cell, study, study.device
        self.sender, self.receiver = (network.chain.to(study.device) for network in study.networks)
        for chain in (self.sender, self.receiver):
            chain.eval().requires_grad_(True)
        self.geometry = Geometry.between(*(c.positions[p].shape for c, p in self._ends()))
        weight, bias = initial_stitch(cell, self.geometry)
        self.conv = nn.Conv2d(weight.shape[1], weight.shape[0], self.geometry.down, stride=self.geometry.down)
        self.conv.load_state_dict({"weight": weight, "bias": bias})
        self.conv.to(study.device)
        self.optimizer = torch.optim.SGD(self.conv.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)

    def _ends(self) -> list[tuple[Any, int]]:
        return [(self.sender, self.cell.i), (self.receiver, self.cell.j)]

    def logits(self, images: Tensor) -> Tensor:
        # as a data loader's tensors lie in memory; apply gives channels-last, which would be faster
        x = self.study.networks[0].record.normalisation.apply(images.to(self.device)).contiguous()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.study.precision == "bf16"):
            for segment in self.sender.segments[: self.cell.i + 1]:
                x = segment(x)
            if self.geometry.up > 1:
                x = F.interpolate(x, scale_factor=self.geometry.up, mode="nearest")
            return self.receiver.tail(self.conv(x), self.cell.j).float()

    @torch.enable_grad()
    def train(self) -> None:
        data, recipe = self.study.data.train, self.study.recipe(EPOCHS)
        per_epoch = len(data) // recipe.batch_size
        schedule = stitch_schedule(recipe.name, peak=recipe.lr, epochs=EPOCHS, steps_per_epoch=per_epoch)
        order, step = ImageOrder(seed=self.study.seed), 0
        for epoch in range(EPOCHS):
            for index in order.epoch(epoch, len(data))[: per_epoch * recipe.batch_size].split(recipe.batch_size):
                loss = F.cross_entropy(self.logits(data.images[index]), data.labels[index].to(self.device))
                for module in (self.conv, self.sender, self.receiver):
                    module.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.param_groups[0]["lr"] = schedule.rate(step)
                self.optimizer.step()
                step += 1

    @torch.no_grad()
    def accuracy(self) -> float:
        data = self.study.data.test
        logits = torch.cat([self.logits(images) for images in data.images.split(500)])
        return (logits.argmax(-1) == data.labels.to(self.device)).double().mean().item()


def published(study: Study, part: Json, save: Callable[[], None]) -> None:
    """All cells one by one, and between them the matched way; ``part`` holds what an earlier run has done."""
    cells, matched = part.setdefault("cells", {}), part.setdefault("from_matched", [])
    for number, cell in enumerate(study.cells):
        key = f"{cell.i},{cell.j}"
        if len(matched) * BETWEEN <= number:
            results = {name: study.from_matched(epochs=epochs) for name, epochs in BESIDE.items()}
            matched.append(results)
            save()
            for name, result in results.items():
                say(f"  matched start, {name}: {result['mean_accuracy']:.4f} after {result['seconds']:.1f} s")
        if key not in cells:
            plain = PublishedCell(study, cell)
            _, training = study.timed(plain.train)
            accuracy, evaluation = study.timed(plain.accuracy)
            for network in study.networks:
                network.chain.requires_grad_(False)
            cells[key] = {"accuracy": accuracy, "training_seconds": training, "evaluation_seconds": evaluation}
            save()
            say(f"  published way, {number + 1} of {len(study.cells)}: ({key}) {accuracy:.4f} after {training:.1f} s")
    seconds = sum(cell["training_seconds"] for cell in cells.values())
    accuracy = float(np.mean([cell["accuracy"] for cell in cells.values()]))
    part |= {"seconds": seconds, "mean_accuracy": accuracy}
    say(f"  {accuracy:.4f} after {seconds:.1f} s")
    for name in BESIDE:
        spreads = {key: spread([results[name][key] for results in matched]) for key in ("seconds", "mean_accuracy")}
        ratio = seconds / spreads["seconds"]["median"]
        reached = spreads["mean_accuracy"]["min"] >= accuracy
        bars = {"as_accurate": reached, "times_sooner": ratio >= BARS["times_sooner_at_least"]}
        part[name] = {"matched": spreads, "times_sooner": ratio, "bars": bars}
        say(f"  {name}: {spreads['mean_accuracy']['median']:.4f}, {ratio:.1f} times sooner")


def mini(root: Root, images: int | None) -> str:
    """fashion-mini, or the first of its images as a data set of their own."""
    if images is None:
        return "fashion-mini"
    data = load_dataset("fashion-mini", root.data_dir)
    return save_npz(root.path / f"fashion-mini-{images}.npz", data.train, data.test, images, len(data.test))


def mnist(root: Root, images: int) -> str:
    data = load_dataset("fashion-mnist", root.data_dir)
    return save_npz(root.path / f"fashion-mnist-{images}.npz", data.train, data.test, images, 10_000)


def save_npz(path: Path, train: Split, test: Split, trained: int, tested: int) -> str:
    """Grey and 28x28, as they came."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"x_train": train.images[:trained, 2:30, 2:30, 0], "x_test": test.images[:tested, 2:30, 2:30, 0]}
        arrays |= {"y_train": train.labels[:trained], "y_test": test.labels[:tested]}
        np.savez(path, **{name: values.numpy() for name, values in arrays.items()})
    return f"npz:{path.resolve()}"


def summary(parts: Json) -> Json:
    """Over the comparisons so far."""
    done = [part for part in parts.values() if "from_default" in part]
    figures = ("accuracy_advantage", "time_share", "matching_over_one_epoch")
    return {"n": len(done)} | {name: spread([part[name] for part in done]) for name in figures if done}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="results; parts that it has are skipped")
    parser.add_argument(
        "--root", type=Path, help="networks and stores are kept here; default: a folder that is removed"
    )
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train-images", type=int, help="of fashion-mini; default: all 10,000")
    parser.add_argument("--images", type=int, default=20_000, help="of fashion-mnist; 0 leaves that part out")
    parser.add_argument(
        "--published", action="store_true", help="the published way too, seed 0: about 17 min on 2 cores"
    )
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()

    device = resolve_device(options.device)
    configure(device)
    measured = {
        "machine": processor() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "pair": "--".join(PAIR),
        "width": options.width,
        "train_images": options.train_images,
        "images": options.images,
    }
    result: Json = json.loads(options.json.read_text()) if options.json.exists() else {**measured, "parts": {}}
    different = [key for key, value in measured.items() if result[key] != value]
    if different:
        sys.exit(f"{options.json} was made with other {', '.join(different)}: use another --json FILE")
    parts = result["parts"]

    def save() -> None:
        result["summary"] = summary(parts)
        write_json(options.json, result)

    with tempfile.TemporaryDirectory() as folder:
        root = Root.at(options.root or folder)
        for seed in map(int, options.seeds.split(",")):
            if (name := f"fashion-mini seed {seed}") not in parts:
                parts[name] = compare(Study(root, mini(root, options.train_images), seed, options.width, device))
                save()
        if options.images and (name := "fashion-mnist seed 0") not in parts:
            parts[name] = compare(Study(root, mnist(root, options.images), 0, options.width, device))
            save()
        for (name, epochs), seed in itertools.product(SHORT.items(), options.seeds.split(",")):
            if seed not in (part := parts.setdefault(name, {})):
                study = Study(root, mini(root, options.train_images), int(seed), options.width, device)
                part[seed] = study.from_matched(epochs=epochs)
                say(f"  {name}: {part[seed]['mean_accuracy']:.4f} after {part[seed]['seconds']:.1f} s")
                save()
        if options.published and "mean_accuracy" not in parts.setdefault("published", {}):
            study = Study(root, mini(root, options.train_images), 0, options.width, device)
            published(study, parts["published"], save)
            save()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
