"""What BatchNorm in the receiver does to vanilla and to matched stitches: two questions about the published study.

Beside each other, for runs of the same pairs: vanilla stitches in a frozen receiver; vanilla stitches trained with
batch statistics; matched stitches in a frozen receiver; and matched stitches in a receiver with the running statistics
that training vanilla stitches with batch statistics left behind, which is how Figure 5 came about.

    fastsitch paper --scale small --root ROOT --out OUT
    fastsitch paper --scale small --root ROOT --out OUT-batch --receiver-bn batch --settings T2T,T2R \\
        --stages train,precompute,sweep
    .venv/bin/python bench/receiver_bn.py --root ROOT --dataset fashion-mini:5000 --frozen RUN --batch RUN \\
        --matched RUN --json FILE

Means are over the cells of a pair, then over pairs; intervals resample pairs.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastsitch
from fastsitch.analysis.bootstrap import mean_estimate
from fastsitch.analysis.leftover_statistics import Pair, leftover_accuracy
from fastsitch.files import write_json
from fastsitch.identity import numpy_generator
from fastsitch.machine import configure, resolve_device
from fastsitch.root import Root
from fastsitch.runs.run import Run

Matrices = dict[Pair, NDArray[np.float64]]

REGIONS = {
    "all cells": np.s_[:, :],
    "last sender position": np.s_[-1:, :],
    "last sender position, first receiver position": np.s_[-1:, :1],
}


def accuracies(run: Run, pairs: list[Pair]) -> Matrices:
    return {
        (sender, receiver, setting, seed): run.matrix(sender, receiver, "accuracy", setting=setting, seed=seed)
        for sender, receiver, setting, seed in pairs
    }


def summary(matrices: Matrices, setting: str) -> dict[str, Any]:
    """Means of each region over its finite cells, then over the pairs of a setting."""
    chosen = [matrix for pair, matrix in matrices.items() if pair[2] == setting]
    found = {}
    for region, cells in REGIONS.items():
        means = np.array([np.nanmean(matrix[cells]) for matrix in chosen])
        estimate = mean_estimate(means, numpy_generator("receiver-bn", setting, region))
        found[region] = {"mean": estimate.value, "low": estimate.low, "high": estimate.high, "pairs": len(means)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    for run, what in (
        ("frozen", "vanilla stitches, receiver frozen"),
        ("batch", "vanilla stitches, --receiver-bn batch"),
        ("matched", "--loss match"),
    ):
        parser.add_argument(f"--{run}", required=True, help=f"name of the run: {what}")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()

    device = resolve_device(options.device)
    configure(device)
    frozen, batch, matched = (
        fastsitch.open_run(name, root=options.root, dataset=options.dataset)
        for name in (options.frozen, options.batch, options.matched)
    )
    leftover = leftover_accuracy(
        Root.at(options.root),
        batch,
        matched,
        device=device,
        report=lambda progress: print(progress.note, file=sys.stderr),
    )
    pairs = list(leftover)
    ways = {
        "vanilla, frozen": accuracies(frozen, pairs),
        "vanilla, batch statistics": accuracies(batch, pairs),
        "matched, frozen": accuracies(matched, pairs),
        "matched, statistics left over": leftover,
    }
    settings = list(dict.fromkeys(pair[2] for pair in pairs))
    result = {setting: {way: summary(matrices, setting) for way, matrices in ways.items()} for setting in settings}
    matrices = {
        way: {
            " ".join(map(str, pair)): np.where(np.isfinite(matrix), matrix, None).tolist()
            for pair, matrix in by_pair.items()
        }
        for way, by_pair in ways.items()
    }
    write_json(options.json, {"recipe": frozen.config.to_dict()["recipe"], "summary": result, "matrices": matrices})
    for setting, each in result.items():
        for way, regions in each.items():
            for region, mean in regions.items():
                print(f"{setting}  {way:30} {region:46} {mean['mean']:.3f} ({mean['low']:.3f} to {mean['high']:.3f})")


if __name__ == "__main__":
    main()
