"""Matrices as NumPy files with a JSON sidecar, readable without fastsitch."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsitch.files import output_folder, write_json, write_npz
from fastsitch.runs.output_source import MATRICES, require_replaceable, source_of
from fastsitch.runs.run import Run
from fastsitch.runs.run_record import known_accuracy
from fastsitch.runs.sweep_config import SweepConfig
from fastsitch.stitching.cells import Unit
from fastsitch.stitching.matching import RIDGE
from fastsitch.vocabulary import Setting


def export_run(run: Run, out: str | os.PathLike[str]) -> list[Path]:
    """Write the matrices of a run as NumPy files, each with a JSON file that says how it was made.

    Arrays are float64 with rows = sender positions and columns = receiver positions (NaN where a cell is not done, was
    not asked for or diverged); ``status`` is int8: 0 not run, 1 done, 2 diverged. With several seeds the mean,
    ``*_by_seed`` with the seeds as leading axis, and ``*_interval``: half the width of the mean's 95 % interval
    (Student's t over seeds).

    Args:
        run: the run, finished or not.
        out: folder for ``SENDER--RECEIVER.SETTING.npz`` and ``.json``.

    Returns:
        Paths of the npz files, one for every pair and setting.

    Raises:
        ConfigError: ``out`` is a file, or has files of another run under these names.
        RunError: a file of the run is damaged.
    """
    folder, source = output_folder(out), source_of(MATRICES, run)
    units = [
        Unit(sender=sender, receiver=receiver, setting=setting, loss=run.config.loss, seed=0)
        for sender, receiver, setting in run.pairs()
    ]
    for unit in units:
        for suffix in ("npz", "json"):
            require_replaceable(folder / f"{unit.pair}.{suffix}", source)
    paths = []
    for unit in units:
        sender, receiver, setting = unit.sender, unit.receiver, unit.setting
        path = folder / f"{unit.pair}.npz"
        write_npz(path, _arrays(run, sender, receiver, setting), source)
        write_json(path.with_suffix(".json"), _sidecar(run, sender, receiver, setting))
        paths.append(path)
    return paths


def _arrays(run: Run, sender: str, receiver: str, setting: Setting) -> dict[str, NDArray[Any]]:
    first, last = run.pair_networks(sender, receiver, setting)
    arrays: dict[str, NDArray[Any]] = {
        "sender_positions": np.array([name for name, _ in first.positions]),
        "receiver_positions": np.array([name for name, _ in last.positions]),
    }
    for metric in run.metrics:
        dtype = np.int8 if metric == "status" else np.float64
        arrays[metric] = run.matrix(sender, receiver, metric, setting=setting).astype(dtype)
        if len(run.config.seeds) > 1:
            arrays[f"{metric}_by_seed"] = run.matrix_by_seed(sender, receiver, metric, setting=setting).astype(dtype)
            if metric != "status":
                arrays[f"{metric}_interval"] = run.interval(sender, receiver, metric, setting=setting)
    return arrays


def _sidecar(run: Run, sender: str, receiver: str, setting: Setting) -> dict[str, Any]:
    first, last = run.pair_networks(sender, receiver, setting)
    config = run.config
    return {
        "run": run.name,
        "dataset": config.dataset,
        "data_hash": run.data_hash,
        "sender": {"name": sender, "trained": setting[0] == "T", **_network(first)},
        "receiver": {"name": receiver, "trained": setting[-1] == "T", **_network(last)},
        "setting": setting,
        "loss": config.loss,
        "init": config.init,
        "receiver_bn": config.receiver_bn,
        "rules": asdict(config.rules),
        **({"matching": _matching(config)} if config.matches else {}),
        "seeds": list(config.seeds),
        "recipe": asdict(config.recipe),
        "order": {"block": config.block, "window": config.window},
        "resolved": run.resolved.to_dict(),
        "versions": run.versions,
        **({"continued": list(run.record.continued)} if run.record.continued else {}),
    }


def _matching(config: SweepConfig) -> dict[str, Any]:
    return {"solver": config.solver, **({"ridge": RIDGE} if config.solves else {})}


def _network(network: Any) -> dict[str, Any]:
    known = {"accuracy": known_accuracy(network.accuracy), "width": network.width, "weights_hash": network.weights_hash}
    other = {"transform": network.transform, "weights": network.weights}
    return {**known, **{key: value for key, value in other.items() if value is not None}}
