"""The table at the end of a sweep."""

import numpy as np

from fastsitch.analysis.triangle import triangle
from fastsitch.cli.text_formats import table
from fastsitch.runs.run import Run
from fastsitch.vocabulary import Status


def summary(run: Run) -> str:
    """One line per pair and setting: cells of those asked for, accuracies by region, diverged cells."""
    asked = {(unit.sender, unit.receiver, unit.setting): len(run.cells(unit)) for unit in run.units}
    rows = []
    for sender, receiver, setting in run.pairs():
        accuracy = run.matrix(sender, receiver, "accuracy", setting=setting)
        status = run.matrix(sender, receiver, "status", setting=setting)
        _, network = run.pair_networks(sender, receiver, setting)
        regions = triangle(accuracy)
        finite = accuracy[np.isfinite(accuracy)]
        mean, best = (float(finite.mean()), float(finite.max())) if finite.size else (float("nan"), float("nan"))
        rows.append(
            [
                f"{sender} -> {receiver}",
                setting,
                f"{int((status != Status.NOT_RUN).sum())}/{asked[sender, receiver, setting]}",
                f"{network.accuracy:.3f}",
                f"{mean:.3f}",
                f"{best:.3f}",
                f"{regions.lower_left:.3f}",
                f"{regions.rest:.3f}",
                str(int((status == Status.DIVERGED).sum())),
            ]
        )
    header = ["pair", "setting", "cells", "receiver", "mean", "best", "lower left", "rest", "diverged"]
    return table(header, rows)
