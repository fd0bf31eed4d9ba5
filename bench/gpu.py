"""Everything that needs CUDA, in one go: make gpu [ARGS="--json FILE"].

Trains two networks on the embedded images on the GPU, precomputes, sweeps there and on the CPU from the same networks
and stores, and compares the matrices. Ends with 2 on a machine without CUDA, with 1 when a comparison fails.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastsitch
from fastsitch.machine import versions

MEAN_BOUND, CELL_BOUND = 0.01, 0.06
"""Largest difference of accuracies between the devices: in the mean over cells, and for a single cell. bf16 rounding
differs between them, and two epochs of training amplify it; a wrong stitch is off by far more."""


def sweep_on(device: str, root: Path) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    run = fastsitch.sweep(
        ["R1111"], ["R1112"], dataset="fashion-mini", run=f"gpu-{device}", root=root, device=device, precision="bf16"
    )
    return run.matrix("R1111", "R1112"), time.perf_counter() - start


def compare_devices(root: Path) -> dict[str, Any]:
    """Accuracies of all 30 cells of R1111 -> R1112 on both devices."""
    records = fastsitch.train("R1111", "R1112", dataset="fashion-mini", width=16, epochs=5, root=root, device="cuda")
    fastsitch.precompute("R1111", dataset="fashion-mini", root=root, device="cuda")
    cuda, cuda_seconds = sweep_on("cuda", root)
    cpu, cpu_seconds = sweep_on("cpu", root)
    difference = cuda - cpu
    mean, largest = float(np.abs(difference.mean())), float(np.abs(difference).max())
    return {
        "network_accuracy": {record.name: record.accuracy for record in records},
        "seconds": {"cuda": cuda_seconds, "cpu": cpu_seconds},
        "accuracy": {"cuda": cuda.tolist(), "cpu": cpu.tolist()},
        "mean_difference": mean,
        "largest_difference": largest,
        "ok": mean <= MEAN_BOUND and largest <= CELL_BOUND,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("bench/results/gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("make gpu: expected a CUDA device, found none; make test covers what can be tested without\n")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "device": torch.cuda.get_device_name(),
            "versions": versions(),
            "end_to_end": compare_devices(Path(folder)),
        }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if result["end_to_end"]["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
