"""A run on disk: its configuration, what ``auto`` chose, and one pair of files per finished unit."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastsitch.errors import RunError
from fastsitch.files import write_json
from fastsitch.identity import stable_hash
from fastsitch.machine import versions
from fastsitch.networks.layout import Shape
from fastsitch.networks.names import NetworkName
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import CellResult
from fastsitch.sweep.config import SweepConfig
from fastsitch.sweep.interval import half_width
from fastsitch.sweep.plan import PlannedUnit, networks_of, plan_units, planned_cells
from fastsitch.sweep.unit_files import MATCHED, UnitFiles

_FORMAT = 1

METRICS = ("accuracy", "accuracy_ratio", "accuracy_drop", "loss", "train_loss", "status")
"""What :meth:`Run.matrix` knows of every run; see :attr:`Run.metrics`."""


@dataclass(frozen=True, kw_only=True)
class NetworkInput:
    """What a run records of a network it uses."""

    weights_hash: str
    width: int
    accuracy: float
    positions: tuple[tuple[str, Shape], ...]
    """Name and shape of every position: (C, H, W) for maps."""
    transform: dict[str, Any] | None = None
    """Mean, std and resolution of its inputs, where they are not those of the data set."""

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "NetworkInput":
        positions = tuple((name, tuple(shape)) for name, shape in content["positions"])
        return cls(**{**content, "positions": positions})


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What ``auto`` chose when the run began; frozen into it."""

    device: str
    precision: str
    kernel: str
    compile: str
    group_size: int
    source: str


class Run:
    """A sweep's results, finished or not."""

    def __init__(
        self,
        path: Path,
        config: SweepConfig,
        resolved: Resolved,
        networks: Mapping[NetworkName, NetworkInput],
        data_hash: str,
        provenance: dict[str, str],
    ) -> None:
        self.path = path
        self.config = config
        self.resolved = resolved
        self.networks = networks
        self.data_hash = data_hash
        self.versions = provenance
        self._files = UnitFiles(path, matches=config.matches)

    def __repr__(self) -> str:
        pairs = f"{','.join(self.config.senders)} -> {','.join(self.config.receivers)}"
        return f"<Run {self.name}: {pairs}, {','.join(self.config.settings)} on {self.config.dataset}>"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def metrics(self) -> tuple[str, ...]:
        """What :meth:`matrix` knows of this run: METRICS, and ``matched_error`` where matched stitches are computed."""
        return (*METRICS, MATCHED) if self.config.matches else METRICS

    @classmethod
    def create(
        cls,
        path: Path,
        config: SweepConfig,
        resolved: Resolved,
        networks: Mapping[NetworkName, NetworkInput],
        data_hash: str,
    ) -> "Run":
        """Write ``run.json`` of a new run."""
        run = cls(path, config, resolved, networks, data_hash, versions())
        write_json(
            path / "run.json",
            {
                "format": _FORMAT,
                "config": config.to_dict(),
                "resolved": asdict(resolved),
                "networks": {str(name): asdict(network) for name, network in networks.items()},
                "data_hash": data_hash,
                "versions": run.versions,
            },
        )
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open an existing run; raises RunError when there is none or its file is damaged."""
        file = path / "run.json"
        if not file.is_file():
            known = sorted(entry.parent.name for entry in path.parent.glob("*/run.json"))
            raise RunError(f"no run {path.name!r} in {path.parent}: found {', '.join(known) or 'none'}")
        try:
            content = json.loads(file.read_text())
            if content["format"] != _FORMAT:
                raise RunError(f"{file} has format {content['format']}, expected {_FORMAT}: start a new run with --run")
            return cls(
                path,
                SweepConfig.from_dict(content["config"]),
                Resolved(**content["resolved"]),
                {
                    NetworkName.parse(name): NetworkInput.from_dict(network)
                    for name, network in content["networks"].items()
                },
                content["data_hash"],
                content["versions"],
            )
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, RunError):
                raise
            raise RunError(f"{file} is damaged ({error}): start a new run with another --run name") from None

    def require(self, config: SweepConfig, networks: Mapping[NetworkName, NetworkInput], data_hash: str) -> None:
        """Raise RunError naming what differs when this run is not the one described."""
        differing = _differences(asdict(self.config), asdict(config))
        if differing:
            raise RunError(
                f"run {self.name!r} has another configuration: {'; '.join(differing)}; use another --run name"
            )
        if self.data_hash != data_hash:
            raise RunError(f"the data set has changed since run {self.name!r} began; use another --run name")
        changed = [str(name) for name, network in networks.items() if self.networks.get(name) != network]
        if changed:
            raise RunError(
                f"{', '.join(changed)} was trained again since run {self.name!r} began; use another --run name"
            )

    @cached_property
    def units(self) -> list[PlannedUnit]:
        """All units of the run, done or not."""
        return plan_units(self.config)

    def cells(self, planned: PlannedUnit) -> list[Cell]:
        """The cells of a unit that the run asks for, by receiver position."""
        return planned_cells(self.config, planned, {name: own.positions for name, own in self.networks.items()})

    def done(self, unit: Unit) -> bool:
        """Whether a unit's results are saved."""
        return self._files.done(unit)

    def save(
        self,
        unit: Unit,
        results: Mapping[Cell, CellResult],
        store_hash: str,
        receiver_store_hash: str | None = None,
    ) -> None:
        """Save a unit: stitches first, then the matrices, whose presence says that the unit is done.

        ``results`` are of all cells that the run asks for; all others are NaN, with status 0. The receiver's store
        counts where matched stitches were computed from it.
        """
        planned = PlannedUnit(unit, *networks_of(unit))
        assert set(results) == set(self.cells(planned))
        sender, receiver = (self.networks[name].positions for name in (planned.sender, planned.receiver))
        shape = (len(sender), len(receiver))
        self._files.save(unit, shape, results, store_hash, receiver_store_hash)

    def read(self, unit: Unit) -> dict[str, NDArray[Any]]:
        """The raw matrices of a finished unit; raises RunError when the file is damaged."""
        return self._files.read(unit)

    def intact(self, unit: Unit) -> bool:
        """Whether a unit is done and both of its files are whole; what is not is logged."""
        return self._files.intact(unit)

    def stitch(self, cell: Cell) -> tuple[Tensor, Tensor]:
        """Weight (F, D), features ordered (ky, kx, c), and bias (D,) of a trained stitch, fp32."""
        tensors = self._files.tensors(cell)
        return tensors["weight"], tensors["bias"]

    def running_statistics(self, cell: Cell) -> dict[str, Tensor]:
        """What training a stitch left in the receiver's BatchNorm layers: fp32 (D,), ``block2.bn1.running_mean``, ...

        Of the blocks that the stitch passes; there are none behind the last position. Raises RunError where BatchNorm
        was frozen.
        """
        if self.config.receiver_bn != "batch":
            raise RunError(f"run {self.name!r} has no running statistics: expected one made with --receiver-bn batch")
        return {name: tensor for name, tensor in self._files.tensors(cell).items() if name not in ("weight", "bias")}

    def stitches(self, unit: Unit) -> dict[Cell, tuple[Tensor, Tensor]]:
        """All stitches of a finished unit, as :meth:`stitch` gives them; raises RunError."""
        return self._files.stitches(unit)

    def stitches_hash(self, unit: Unit) -> str:
        """sha256 (hex) of the file with a finished unit's stitches; raises RunError where there is none."""
        return self._files.stitches_hash(unit)

    def pairs(self) -> Iterator[tuple[str, str, str]]:
        """(sender, receiver, setting) of every exported matrix, in the order of the plan."""
        yield from dict.fromkeys((u.unit.sender, u.unit.receiver, u.unit.setting) for u in self.units)

    def pair_networks(self, sender: str, receiver: str, setting: str = "T2T") -> tuple[NetworkInput, NetworkInput]:
        """The networks behind a pair and setting; raises RunError when the run has no such pair."""
        sender, receiver = _canonical(sender), _canonical(receiver)
        for planned in self.units:
            unit = planned.unit
            if (unit.sender, unit.receiver, unit.setting) == (sender, receiver, setting):
                return self.networks[planned.sender], self.networks[planned.receiver]
        raise RunError(
            f"run {self.name!r} has no pair {sender}--{receiver}.{setting}: it joins "
            f"{', '.join(self.config.senders)} to {', '.join(self.config.receivers)} in "
            f"{', '.join(self.config.settings)}"
        )

    def matrix_by_seed(self, sender: str, receiver: str, metric: str, *, setting: str = "T2T") -> NDArray[Any]:
        """A metric of all cells, (seeds, sender positions, receiver positions).

        NaN, or status 0, where a cell is not done or was not asked for.

        Metrics are listed in :attr:`metrics`; ``accuracy_ratio`` and ``accuracy_drop`` refer to the receiver's own
        accuracy.
        """
        if metric not in self.metrics:
            raise RunError(f"unknown metric {metric!r}: expected one of {', '.join(self.metrics)}")
        first, last = self.pair_networks(sender, receiver, setting)
        sender, receiver = _canonical(sender), _canonical(receiver)
        raw = metric if metric in self._files.raw else "accuracy"
        missing = 0 if metric == "status" else np.nan
        matrices = []
        for seed in self.config.seeds:
            unit = Unit(sender=sender, receiver=receiver, setting=setting, loss=self.config.loss, seed=seed)
            if self.done(unit):
                matrices.append(self.read(unit)[raw].astype(np.float64))
            else:
                matrices.append(np.full((len(first.positions), len(last.positions)), missing, np.float64))
        stacked = np.stack(matrices)
        if metric == "accuracy_ratio":
            return np.asarray(stacked / last.accuracy if last.accuracy else stacked * np.nan)
        return np.asarray(last.accuracy - stacked) if metric == "accuracy_drop" else stacked

    def matrix(
        self,
        sender: str,
        receiver: str,
        metric: str = "accuracy",
        *,
        setting: str = "T2T",
        seed: int | None = None,
    ) -> NDArray[Any]:
        """A metric of all cells: float64 (sender positions, receiver positions), rows = sender.

        The mean over the run's seeds, or one of them. The status is the worst over seeds: 0 where any is not run,
        else 2 where any diverged, else 1.
        """
        by_seed = self.matrix_by_seed(sender, receiver, metric, setting=setting)
        if seed is not None:
            if seed not in self.config.seeds:
                raise RunError(f"run {self.name!r} has no seed {seed}: expected one of {self.config.seeds}")
            return np.asarray(by_seed[self.config.seeds.index(seed)])
        if metric == "status":
            return np.asarray(np.where((by_seed == 0).any(0), 0, by_seed.max(0)))
        return np.asarray(by_seed.mean(0))

    def interval(self, sender: str, receiver: str, metric: str = "accuracy", *, setting: str = "T2T") -> NDArray[Any]:
        """Half width of the 95 % interval of :meth:`matrix` over the run's seeds: Student's t, same shape.

        NaN where a cell is not done or diverged for any seed, and everywhere with a single seed. Raises RunError for
        ``status``, which has no mean.
        """
        if metric == "status":
            raise RunError("the status has no interval over seeds: expected another metric")
        return half_width(self.matrix_by_seed(sender, receiver, metric, setting=setting))


def _canonical(name: str) -> str:
    return str(NetworkName.parse(name))


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``key: X there, Y asked for`` for every key of nested mappings that differs."""
    differing = []
    for key in sorted({*found, *wanted}):
        there, asked = found.get(key), wanted.get(key)
        if isinstance(there, Mapping) and isinstance(asked, Mapping):
            differing += _differences(there, asked, f"{prefix}{key}.")
        elif stable_hash(there) != stable_hash(asked):
            differing.append(f"{prefix}{key} is {_plain(there)} there, {_plain(asked)} was asked for")
    return differing


def _plain(value: Any) -> str:
    # only positions may be empty
    return ",".join(map(str, value)) or "all" if isinstance(value, list | tuple) else str(value)
