"""A run on disk: its configuration, what ``auto`` chose, and one pair of files per finished unit."""

import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastsitch.checked_files import read_json
from fastsitch.errors import RunError, argument
from fastsitch.files import write_json
from fastsitch.identity import stable_hash
from fastsitch.machine import versions
from fastsitch.network_names import NetworkName
from fastsitch.runs.confidence_interval import half_width
from fastsitch.runs.run_record import FORMAT, NetworkInput, RunRecord
from fastsitch.runs.sweep_plan import SweepPlan
from fastsitch.runs.unit_files import UnitFiles
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.vocabulary import Metric, Setting, Status

log = logging.getLogger(__name__)


class Run:
    """A sweep's results, finished or not.

    ``path`` is its folder, ``config`` what was asked for, ``resolved`` what ``auto`` chose, ``networks`` what is known
    of every network that it joins. Get one from :func:`fastsitch.sweep` or :func:`fastsitch.open_run`.
    """

    def __init__(self, path: Path, record: RunRecord) -> None:
        self.path = path
        self.record = record
        self.config = record.config
        self.resolved = record.resolved
        self.networks = record.networks
        self.data_hash = record.data_hash
        self.versions = record.versions
        self._files = UnitFiles(
            path,
            matches=self.config.matches,
            inputs=self._inputs,
            shape=self._shape,
            cells=self.cells,
            vouched=record.hashed,
        )

    def __repr__(self) -> str:
        pairs = f"{','.join(self.config.senders)} -> {','.join(self.config.receivers)}"
        return f"<Run {self.name}: {pairs}, {','.join(self.config.settings)} on {self.config.dataset}>"

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.path.name

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What :meth:`matrix` knows of this run: ``matched_error`` only where matched stitches are computed."""
        return tuple(name for name in get_args(Metric) if name != "matched_error" or self.config.matches)

    @classmethod
    def create(cls, path: Path, record: RunRecord) -> "Run":
        """Write ``run.json`` of a new run."""
        write_json(path / "run.json", record.to_dict())
        return cls(path, record)

    def note_versions(self) -> None:
        """Record the versions that the run goes on with, and say so where they are others than before."""
        record = self.record.continued_with(versions())
        if record != self.record:
            log.warning("run %s %s: both are recorded", self.name, record.described_change())
            write_json(self.path / "run.json", record.to_dict())
            self.record = record

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open the run in a folder.

        Raises:
            RunError: there is none, or its file is damaged.
        """
        file = path / "run.json"
        if not file.exists():
            known = sorted(entry.parent.name for entry in path.parent.glob("*/run.json"))
            raise RunError(f"no run {path.name!r} in {path.parent}: found {', '.join(known) or 'none'}")
        other = f"start a new run with another {argument('run')} name"
        try:
            # version 0.1 wrote no hash
            content = read_json(file, "run_hash", required=False)
            if content["format"] != FORMAT:
                raise RunError(f"{file} has format {content['format']}, expected {FORMAT}: {other}")
            hashed = b'"run_hash"' in file.read_bytes()
            return cls(path, RunRecord.from_dict({**content, "hashed": hashed}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, RunError):
                raise
            raise RunError(f"{file} is damaged ({error}): {other}") from None

    @cached_property
    def plan(self) -> SweepPlan:
        """Units, cells and kinds of stitches."""
        return SweepPlan(self.config, {name: network.positions for name, network in self.networks.items()})

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units of the run, done or not."""
        return self.config.units

    def cells(self, unit: Unit) -> list[Cell]:
        """The cells of a unit that the run asks for, by receiver position."""
        return self.plan.cells(unit)

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
        assert set(results) == set(self.cells(unit))
        self._files.save(unit, results, store_hash, receiver_store_hash)

    def _shape(self, unit: Unit) -> tuple[int, int]:
        """Sender and receiver positions of a unit."""
        sender, receiver = (self.networks[name].positions for name in (unit.sender_network, unit.receiver_network))
        return len(sender), len(receiver)

    def _inputs(self, unit: Unit) -> str:
        """A hash of all that a unit's results depend on."""
        networks = [self.networks[name].weights_hash for name in (unit.sender_network, unit.receiver_network)]
        source = self.resolved.source_of(unit.sender_network)
        return stable_hash(
            [unit.name, networks, self.data_hash, self.config.to_dict(), self.resolved.precision, source]
        )

    def read(self, unit: Unit) -> dict[str, NDArray[Any]]:
        """The raw matrices of a finished unit; raises RunError when the file is damaged."""
        return self._files.read(unit)

    def intact(self, unit: Unit) -> bool:
        """Whether a unit is done and both of its files are whole; what is not is logged."""
        return self._files.intact(unit)

    def cell(
        self,
        sender: str,
        receiver: str,
        i: int | str,
        j: int | str,
        *,
        setting: Setting = "T2T",
        seed: int | None = None,
    ) -> Cell:
        """The cell of a stitch.

        Args:
            sender: a sender of the run.
            receiver: a receiver of the run.
            i: sender position, by index or name.
            j: receiver position, by index or name.
            setting: which of the two networks are trained.
            seed: one of the run's seeds; None: the first.

        Returns:
            The unit of that pair, setting and seed, and the indices of the positions.

        Raises:
            RunError: the run has no such pair, position or seed.
        """
        first, last = self.pair_networks(sender, receiver, setting)
        chosen = self.config.seeds[0] if seed is None else self._seed(seed)
        unit = self._unit(sender, receiver, setting, chosen)
        return Cell(unit, first.position(sender, i), last.position(receiver, j))

    def stitch(
        self,
        sender: str,
        receiver: str,
        i: int | str,
        j: int | str,
        *,
        setting: Setting = "T2T",
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One trained stitch, fp32 on the CPU; :func:`fastsitch.conv_weight` makes a convolution of it.

        Args:
            sender: a sender of the run.
            receiver: a receiver of the run.
            i: sender position, by index or name.
            j: receiver position, by index or name.
            setting: which of the two networks are trained.
            seed: one of the run's seeds; None: the first.

        Returns:
            Weight (F, D), features ordered (ky, kx, c), and bias (D,).

        Raises:
            RunError: the run has no such cell, or its unit is not done or damaged.
        """
        return self.read_stitch(self.cell(sender, receiver, i, j, setting=setting, seed=seed))

    def running_statistics(
        self,
        sender: str,
        receiver: str,
        i: int | str,
        j: int | str,
        *,
        setting: Setting = "T2T",
        seed: int | None = None,
    ) -> dict[str, Tensor]:
        """What training a stitch left in the receiver's BatchNorm layers.

        Args:
            sender: as in :meth:`stitch`, like all the other arguments.
            receiver: a receiver of the run.
            i: sender position, by index or name.
            j: receiver position, by index or name.
            setting: which of the two networks are trained.
            seed: one of the run's seeds; None: the first.

        Returns:
            fp32 (D,) by name, such as ``block2.bn1.running_mean``, of the blocks that the stitch passes; there are none
            behind the last position.

        Raises:
            RunError: BatchNorm was frozen, or there is no such cell.
        """
        return self.read_statistics(self.cell(sender, receiver, i, j, setting=setting, seed=seed))

    def read_stitch(self, cell: Cell) -> tuple[Tensor, Tensor]:
        """The stitch of a cell, as :meth:`stitch` gives it."""
        tensors = self._files.tensors(cell)
        return tensors["weight"], tensors["bias"]

    def read_statistics(self, cell: Cell) -> dict[str, Tensor]:
        """The running statistics of a cell, as :meth:`running_statistics` gives them."""
        if self.config.receiver_bn != "batch":
            raise RunError(
                f"run {self.name!r} has no running statistics: expected one made with "
                f"{argument('receiver_bn', 'batch')}"
            )
        return {name: tensor for name, tensor in self._files.tensors(cell).items() if name not in ("weight", "bias")}

    def stitches(self, unit: Unit) -> dict[Cell, tuple[Tensor, Tensor]]:
        """All stitches of a finished unit, as :meth:`stitch` gives them; raises RunError."""
        return self._files.stitches(unit)

    def stitches_hash(self, unit: Unit) -> str:
        """sha256 (hex) of the file with a finished unit's stitches; raises RunError where there is none."""
        return self._files.stitches_hash(unit)

    def pairs(self) -> Iterator[tuple[str, str, Setting]]:
        """(sender, receiver, setting) of every exported matrix, in the order of the plan."""
        yield from dict.fromkeys((unit.sender, unit.receiver, unit.setting) for unit in self.units)

    def pair_networks(self, sender: str, receiver: str, setting: Setting = "T2T") -> tuple[NetworkInput, NetworkInput]:
        """What the run recorded of the two networks behind a pair and setting, such as their accuracy and positions.

        Raises:
            RunError: the run has no such pair.
        """
        wanted = (_shortest(sender), _shortest(receiver), setting)
        for unit in self.units:
            if (unit.sender, unit.receiver, unit.setting) == wanted:
                return self.networks[unit.sender_network], self.networks[unit.receiver_network]
        raise RunError(
            f"run {self.name!r} has no pair {wanted[0]}--{wanted[1]}.{setting}: it joins "
            f"{', '.join(self.config.senders)} to {', '.join(self.config.receivers)} in "
            f"{', '.join(self.config.settings)}"
        )

    def matrix_by_seed(
        self, sender: str, receiver: str, metric: Metric = "accuracy", *, setting: Setting = "T2T"
    ) -> NDArray[Any]:
        """A metric of all cells of a pair, for every seed.

        Args:
            sender: a sender of the run.
            receiver: a receiver of the run.
            metric: one of :attr:`metrics`, as in :meth:`matrix`.
            setting: which of the two networks are trained.

        Returns:
            float64 (seeds, sender positions, receiver positions), in the order of the run's seeds.

        Raises:
            RunError: the run has no such pair or metric, or a file is damaged.
        """
        if metric not in self.metrics:
            raise RunError(f"unknown metric {metric!r}: expected one of {', '.join(self.metrics)}")
        first, last = self.pair_networks(sender, receiver, setting)
        raw = metric if metric in self._files.raw else "accuracy"
        missing = Status.NOT_RUN if metric == "status" else np.nan
        matrices = []
        for seed in self.config.seeds:
            unit = self._unit(sender, receiver, setting, seed)
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
        metric: Metric = "accuracy",
        *,
        setting: Setting = "T2T",
        seed: int | None = None,
    ) -> NDArray[Any]:
        """A metric of all cells of a pair.

        Args:
            sender: a sender of the run.
            receiver: a receiver of the run.
            metric: one of :attr:`metrics`; ``accuracy_ratio`` and ``accuracy_drop`` refer to the receiver's accuracy.
            setting: which of the two networks are trained.
            seed: one of the run's seeds; None: the mean over all, of ``status`` the worst (not run, diverged, done).

        Returns:
            float64 (sender positions, receiver positions); NaN, or status 0, where a cell is not done or was not
            asked for.

        Raises:
            RunError: the run has no such pair, metric or seed, or a file is damaged.
        """
        by_seed = self.matrix_by_seed(sender, receiver, metric, setting=setting)
        if seed is not None:
            return np.asarray(by_seed[self.config.seeds.index(self._seed(seed))])
        if metric == "status":
            return np.asarray(np.where((by_seed == Status.NOT_RUN).any(0), Status.NOT_RUN, by_seed.max(0)))
        return np.asarray(by_seed.mean(0))

    def interval(
        self, sender: str, receiver: str, metric: Metric = "accuracy", *, setting: Setting = "T2T"
    ) -> NDArray[Any]:
        """Half width of the 95 % interval of :meth:`matrix` over the run's seeds: Student's t, same shape.

        NaN where a cell is not done or diverged for any seed, and everywhere with a single seed.

        Raises:
            RunError: ``status`` has no mean; or the run has no such pair or metric.
        """
        if metric == "status":
            raise RunError("the status has no interval over seeds: expected another metric")
        return half_width(self.matrix_by_seed(sender, receiver, metric, setting=setting))

    def _seed(self, seed: int) -> int:
        if seed not in self.config.seeds:
            raise RunError(f"run {self.name!r} has no seed {seed}: expected one of {self.config.seeds}")
        return seed

    def _unit(self, sender: str, receiver: str, setting: Setting, seed: int) -> Unit:
        return Unit(
            sender=_shortest(sender), receiver=_shortest(receiver), setting=setting, loss=self.config.loss, seed=seed
        )


def _shortest(name: str) -> str:
    return str(NetworkName.parse(name))
