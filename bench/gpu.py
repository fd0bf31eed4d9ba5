"""Everything that needs CUDA, in one go: make gpu [ARGS="--json FILE --stages kernels,bench"].

First the kernels by themselves (bench/gpu_kernels.py). Then the real thing: train, precompute and sweep on the GPU,
with torch and eager blocks and with Triton and compiled ones, and the same sweep on the CPU from the same networks and
store; the matrices are compared. Then the same sweeps with recorded steps and with plain ones, which have to agree to
the bit, an epoch in torch's sync debug mode, where waiting for the GPU is an error, and the time of a step, plain and
recorded, and by the images in a compiled call. Last `fastsitch bench --peers` at the width of the published study.
Ends with 2 on a machine without CUDA, with 1 when a comparison fails.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import fastsitch
from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.activations.store import ActivationStore
from fastsitch.benchmark.bench_pair import BenchNetworks, make_bench_pair
from fastsitch.benchmark.timed_engine import Engine
from fastsitch.cli.bench_text import sections
from fastsitch.kernels.cuda_graph import record
from fastsitch.machine import configure, versions
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network
from fastsitch.receivers.compiled_blocks import compile_blocks
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.root import Root
from fastsitch.stitching.cascade import Cascade
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import stitch_optimizer, train_step
from fastsitch.stitching.recipe import STITCH_RECIPES
from fastsitch.stitching.recorded_step import WARM_UP, RecordedStep
from fastsitch.stitching.stitch_bank import StitchBank
from fastsitch.timing import median_seconds

MEAN_BOUND, CELL_BOUND = 0.01, 0.06
"""Largest difference of accuracies between the devices: in the mean over cells, and for a single cell. bf16 rounding
differs between them, and two epochs of training amplify it; a wrong stitch is off by far more."""


WAYS = {
    "cpu": {"device": "cpu"},
    "cuda, torch, eager": {"device": "cuda", "kernel": "torch", "compile": "off"},
    "cuda, triton, compiled": {"device": "cuda", "kernel": "triton", "compile": "on"},
}


def sweep(name: str, root: Path) -> tuple[np.ndarray, float]:
    """Accuracies of the 30 cells of R1111 -> R1112, and the seconds they took."""
    start = time.perf_counter()
    run = fastsitch.sweep(
        ["R1111"],
        ["R1112"],
        dataset="fashion-mini",
        run=name.replace(", ", "-"),
        root=root,
        precision="bf16",
        **WAYS[name],
    )
    seconds = time.perf_counter() - start
    (path,) = fastsitch.export_run(run, root / "exported" / run.name)
    with np.load(path, allow_pickle=False) as file:
        return file["accuracy"], seconds


def prepare(root: Path) -> dict[str, Any]:
    """Two networks and the store of one, made on the GPU; they are kept. The accuracies of the networks."""
    records = fastsitch.train("R1111", "R1112", dataset="fashion-mini", width=16, epochs=5, root=root, device="cuda")
    fastsitch.precompute("R1111", dataset="fashion-mini", root=root, device="cuda")
    return {record.name: record.accuracy for record in records}


def end_to_end(root: Path) -> dict[str, Any]:
    """Train and precompute on the GPU, sweep in all three ways, compare with the CPU."""
    accuracies = prepare(root)
    matrices, ways = {}, {}
    for name in WAYS:
        matrices[name], seconds = sweep(name, root)
        difference = matrices[name] - matrices["cpu"]
        mean, largest = float(np.abs(difference.mean())), float(np.abs(difference).max())
        ways[name] = {
            "seconds": seconds,
            "accuracy": matrices[name].tolist(),
            "mean_difference_to_cpu": mean,
            "largest_difference_to_cpu": largest,
            "ok": mean <= MEAN_BOUND and largest <= CELL_BOUND,
        }
    return {
        "network_accuracy": accuracies,
        "ways": ways,
        "ok": all(way["ok"] for way in ways.values()),
    }


RECORDED: dict[str, dict[str, Any]] = {
    "eager": {"compile": "off"},
    "compiled": {"compile": "on"},
    "torch kernel": {"compile": "off", "kernel": "torch"},
    "batch statistics": {"receiver_bn": "batch"},
    "streamed": {"compile": "off", "source": "streamed"},
    "live": {"compile": "off", "source": "live"},
    "autograd": {"receivers": ["vit"]},
}


def recorded(root: Path) -> dict[str, Any]:
    """Sweeps whose steps are replayed beside the same ones launched kernel by kernel: their bits and seconds."""
    prepare(root)
    factory = Path(__file__).parents[1] / "docs" / "families" / "vit.py"
    fastsitch.add("vit", f"{factory}:small", dataset="fashion-mini", root=root)
    fastsitch.train("vit", dataset="fashion-mini", epochs=2, root=root, device="cuda")
    found = {}
    for name, options in RECORDED.items():
        seconds, matrices, recordings = {}, {}, 0
        for way in ("plain", "recorded"):
            with patch_recorder(way == "recorded") as made:
                start = time.perf_counter()
                run = fastsitch.sweep(
                    ["R1111"],
                    options.get("receivers", ["R1112"]),
                    dataset="fashion-mini",
                    run=f"{name.replace(' ', '-')}-{way}",
                    root=root,
                    device="cuda",
                    **{key: value for key, value in options.items() if key != "receivers"},
                )
                torch.cuda.synchronize()
                seconds[way] = time.perf_counter() - start
            recordings = len(made)
            (path,) = fastsitch.export_run(run, root / "exported" / run.name)
            with np.load(path, allow_pickle=False) as file:
                matrices[way] = np.stack([file["accuracy"], file["loss"]])
        found[name] = {
            "seconds": seconds,
            "recordings": recordings,
            "largest_difference": float(np.abs(matrices["plain"] - matrices["recorded"]).max()),
            "ok": bool(np.array_equal(matrices["plain"], matrices["recorded"]) and recordings),
        }
        print(name, found[name], flush=True)
    return {"ways": found, "ok": all(sweep["ok"] for sweep in found.values())}


@contextmanager
def patch_recorder(on: bool) -> Iterator[list[int]]:
    """Steps that are recorded, or never; counts the recordings that were made."""
    made: list[int] = []

    def recorder(device: torch.device) -> Any:
        def count(work: Callable[[], torch.Tensor]) -> Any:
            found = record(work, device)
            made.append(1)
            return found

        return count if on else None

    with patch("fastsitch.stitching.recorded_step._recorder", recorder):
        yield made


def one_epoch(root: Path) -> dict[str, Any]:
    """An epoch in which any synchronisation with the host is an error; then the time of a step, plain and recorded."""
    prepare(root)
    device = torch.device("cuda")
    folder, name = Root.at(root).models("fashion-mini"), NetworkName.parse("R1111")
    store = ActivationStore.open(Root.at(root).store("fashion-mini", name))
    source = ResidentSource.load(store, dtype=torch.bfloat16, device=device)
    receiver = FrozenNetwork(load_network(folder, name).chain, dtype=torch.bfloat16, device=device)
    compile_blocks(receiver)
    unit = Unit(sender="R1111", receiver="R1111", setting="T2T", loss="task", seed=0)
    cells = [Cell(unit, i, j) for j in range(5) for i in range(5)]
    shapes = [position.shape for position in receiver.positions]
    bank = StitchBank(cells, source.shapes, shapes, dtype=torch.bfloat16, device=device, kernel="triton")
    recipe = STITCH_RECIPES["small"]
    cascade = Cascade(receiver, bank.counts, recipe.batch_size)
    optimizer = stitch_optimizer(bank, recipe)
    with torch.no_grad():
        batches = list(source.train.shuffled(ImageOrder(seed=0), 0, recipe.batch_size))
        for batch in batches[:3]:
            train_step(cascade, bank, batch, optimizer)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches:
                train_step(cascade, bank, batch, optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        index = torch.arange(recipe.batch_size, device=device)
        plain = median_step_seconds(lambda: train_step(cascade, bank, source.train.batch(index), optimizer))
        step = RecordedStep(lambda batch: train_step(cascade, bank, batch, optimizer), device)
        for batch in batches[: WARM_UP + 1]:
            step(batch)
        replayed = median_step_seconds(lambda: step(source.train.batch(index)))
    return {"ok": True, "steps": len(batches), "step_seconds": plain, "recorded_step_seconds": replayed}


def median_step_seconds(step: Callable[[], object]) -> float:
    """Of 20 steps in a row, 5 times."""

    def steps() -> None:
        for _ in range(20):
            step()

    return median_seconds(steps, torch.device("cuda")) / 20


def kernels() -> dict[str, Any]:
    """Checks and timings of the kernels, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.json"
        script = Path(__file__).with_name("gpu_kernels.py")
        ended = subprocess.run([sys.executable, script, "--json", out, "--sanitizer"], check=False)
        found = json.loads(out.read_text()) if out.exists() else None
    return {"exit_code": ended.returncode, "ok": ended.returncode == 0, "result": found}


def micro_batches(root: Path) -> dict[str, Any]:
    """A step at the published width by the images per compiled call."""
    device, found = torch.device("cuda"), {}
    configure(device)
    for images in (2048, 1024, 512, 256):
        with patch("fastsitch.receivers.compiled_blocks.micro_batch", lambda device, images=images: images):
            pair = make_bench_pair(
                BenchNetworks("R1111", "R1111"),
                width=64,
                batch_size=256,
                images=2048,
                tests=256,
                dtype=torch.bfloat16,
                device=device,
                kernel="triton",
                compiled=True,
            )
            for seeds in (1, 4):
                cells = [cell for seed in range(seeds) for cell in pair.cells_of(seed)]
                engine, batches = Engine(pair, cells), pair.batches(1)
                engine.run(batches * (WARM_UP + 1))
                name = f"{images} images, {len(cells)} cells"
                found[name] = median_step_seconds(partial(engine.run, batches))
                print(name, found[name], flush=True)
    return {"ok": True, "step_seconds": found}


def bench(root: Path) -> dict[str, Any]:
    """The benchmark at the published width: ceilings, a step in its parts, and other ways to train the same cells."""
    result = fastsitch.bench(
        width=64, batch_size=256, group_sizes=(5, 25, 100), peers=True, tune=True, root=root, device="cuda"
    )
    print("\n\n".join(sections(result)), flush=True)
    return {"ok": True, "result": result.to_dict()}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stages: dict[str, Callable[[], dict[str, Any]]] = {
            "kernels": kernels,
            "end_to_end": lambda: end_to_end(root),
            "recorded": lambda: recorded(root),
            "one_epoch": lambda: one_epoch(root),
            "micro_batches": lambda: micro_batches(root),
            "bench": lambda: bench(root),
        }
        return run(stages)


def run(stages: dict[str, Callable[[], dict[str, Any]]]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("bench/results/gpu.json"))
    parser.add_argument("--stages", default=",".join(stages), help="some of them, separated by commas")
    options = parser.parse_args()
    chosen = options.stages.split(",")
    if unknown := set(chosen) - set(stages):
        parser.error(f"--stages: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(stages)}")
    if not torch.cuda.is_available():
        sys.stderr.write("make gpu: expected a CUDA device, found none; make test covers what can be tested without\n")
        return 2
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "versions": versions()}
    for name in chosen:
        start = time.perf_counter()
        try:
            result[name] = stages[name]()
        except RuntimeError as error:
            # what the other stages found is worth keeping
            result[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        result[name]["wall_seconds"] = time.perf_counter() - start
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    brief = [name for name in ("end_to_end", "recorded", "one_epoch") if name in chosen]
    print(json.dumps({name: result[name] for name in brief}, indent=1))
    return 0 if all(result[name]["ok"] for name in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
