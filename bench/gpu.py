"""Everything that needs CUDA, in one go: make gpu [ARGS="--json FILE --stages kernels,bench"].

First the kernels by themselves (bench/gpu_kernels.py). Then the real thing: train, precompute and sweep on the GPU,
with torch and eager blocks and with Triton and compiled ones, and the same sweep on the CPU from the same networks and
store; the matrices are compared. Then an epoch in torch's sync debug mode, where waiting for the GPU is an error, and
a step as a CUDA graph beside the plain one. Last `fastsitch bench --peers` at the width of the published study. Ends
with 2 on a machine without CUDA, with 1 when a comparison fails.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastsitch
from fastsitch.activations.order import ImageOrder
from fastsitch.activations.resident import ResidentSource
from fastsitch.activations.store import ActivationStore
from fastsitch.cli.bench import sections
from fastsitch.machine import versions
from fastsitch.networks.checkpoint import load_network
from fastsitch.networks.compiled import compile_blocks
from fastsitch.networks.frozen import FrozenNetwork
from fastsitch.networks.names import NetworkName
from fastsitch.root import Root
from fastsitch.stitching.bank import StitchBank
from fastsitch.stitching.cascade import Cascade
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import stitch_optimizer, train_step
from fastsitch.sweep.config import STITCH_RECIPES

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


def end_to_end(root: Path) -> dict[str, Any]:
    """Train and precompute on the GPU, sweep in all three ways, compare with the CPU."""
    records = fastsitch.train("R1111", "R1112", dataset="fashion-mini", width=16, epochs=5, root=root, device="cuda")
    fastsitch.precompute("R1111", dataset="fashion-mini", root=root, device="cuda")
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
        "network_accuracy": {record.name: record.accuracy for record in records},
        "ways": ways,
        "ok": all(way["ok"] for way in ways.values()),
    }


def one_epoch(root: Path) -> dict[str, Any]:
    """An epoch in which any synchronisation with the host is an error; then the step as a CUDA graph, timed."""
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
        eager = median_seconds(lambda: train_step(cascade, bank, source.train.batch(index), optimizer))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            train_step(cascade, bank, source.train.batch(index), optimizer)
        graphed = median_seconds(graph.replay)
    return {"ok": True, "steps": len(batches), "step_seconds": eager, "graphed_step_seconds": graphed}


def median_seconds(work: Callable[[], object]) -> float:
    """Of 20 calls in a row, 5 times."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 20)
    return sorted(times)[2]


def kernels() -> dict[str, Any]:
    """The kernels' own checks and timings, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.json"
        script = Path(__file__).with_name("gpu_kernels.py")
        ended = subprocess.run([sys.executable, script, "--json", out, "--sanitizer"], check=False)
        found = json.loads(out.read_text()) if out.exists() else None
    return {"exit_code": ended.returncode, "ok": ended.returncode == 0, "result": found}


def bench(root: Path) -> dict[str, Any]:
    """The benchmark at the published width: ceilings, a step in its parts, and other ways to train the same cells."""
    result = fastsitch.bench(
        width=64, batch_size=256, group_sizes=(5, 25, 100), repeats=3, peers=True, root=root, device="cuda"
    )
    print("\n\n".join(sections(result)), flush=True)
    return {"ok": True, "result": result.to_dict()}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stages: dict[str, Callable[[], dict[str, Any]]] = {
            "kernels": kernels,
            "end_to_end": lambda: end_to_end(root),
            # in the folder of end_to_end
            "one_epoch": lambda: one_epoch(root),
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
    brief = [name for name in ("end_to_end", "one_epoch") if name in chosen]
    print(json.dumps({name: result[name] for name in brief}, indent=1))
    return 0 if all(result[name]["ok"] for name in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
