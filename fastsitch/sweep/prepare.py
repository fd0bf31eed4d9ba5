"""A sweep before it begins: what cannot work is refused, and what ``auto`` chose is frozen into the run."""

import logging
from pathlib import Path

import torch

from fastsitch.activations.precompute import open_fitting, store_identity
from fastsitch.data import Dataset, load_dataset
from fastsitch.errors import ConfigError, RunError
from fastsitch.machine import (
    DTYPES,
    available_memory,
    configure,
    resolve_device,
    resolve_precision,
)
from fastsitch.networks.names import NetworkName
from fastsitch.root import Root
from fastsitch.stitching.geometry import Geometry
from fastsitch.sweep.config import SweepConfig
from fastsitch.sweep.execute import Networks
from fastsitch.sweep.memory import memory_budget
from fastsitch.sweep.plan import PlannedUnit, plan_units, planned_cells, require_positions
from fastsitch.sweep.resolve import resolve
from fastsitch.sweep.results import NetworkInput, Resolved, Run
from fastsitch.sweep.source_rates import choose_measured

log = logging.getLogger(__name__)


class Preparation:
    """A sweep on the machine that trains it: device, images and networks, and what ``auto`` means there.

    Raises what :func:`run_sweep` raises, before any work begins. ``workers`` share the memory of the machine.
    """

    def __init__(self, root: Root, config: SweepConfig, *, device: str, memory: str, workers: int = 1) -> None:
        self._root = root
        self._config = config
        self._memory = memory
        self._workers = workers
        self._units = plan_units(config)
        self.device = resolve_device(device)
        # what is wrong is said even where a run that exists needs no budget
        memory_budget(memory, available_memory(self.device), self.device.type)
        configure(self.device)
        self.dataset = load_dataset(config.dataset, root.data_dir)
        if config.trains and len(self.dataset.train) < config.recipe.batch_size:
            raise ConfigError(
                f"{len(self.dataset.train)} training images are fewer than one batch of {config.recipe.batch_size} "
                f"images: use --batch-size {len(self.dataset.train)} or less"
            )
        self.networks = Networks(root, self.dataset, self.device)
        self._inputs = {
            network: self.networks.describe(network)
            for network in dict.fromkeys(name for own in self._units for name in (own.sender, own.receiver))
        }
        _check_geometries(config, self._units, self._inputs)

    def existing(self, path: Path) -> Run | None:
        """The run at ``path``, if there is one, of which the stores that are there can be used."""
        config = self._config
        finished = _existing_run(path, config, self._inputs, self.dataset, self.device)
        source = "live" if config.augments else config.source if finished is None else finished.resolved.source
        if source != "live":
            _check_stores(self._root, config, self._units, self.networks, self.device)
        return finished

    def begin(self, path: Path) -> Run:
        """The run at ``path``, created where there is none. The caller holds its lock."""
        run = _existing_run(path, self._config, self._inputs, self.dataset, self.device) or _new_run(
            self._root,
            path,
            self._config,
            self._inputs,
            self.networks,
            self.device,
            self._memory,
            available_memory(self.device) // self._workers,
        )
        log.info("run %s: %s", run.name, _describe(run.resolved))
        return run


def _check_stores(
    root: Root, config: SweepConfig, units: list[PlannedUnit], networks: "Networks", device: torch.device
) -> None:
    """Refuse a store that is stale, damaged or of other samples before any work begins, not when its turn comes."""
    names = [planned.sender for planned in units]
    if config.matches:
        names += [planned.receiver for planned in units]
    for name in dict.fromkeys(names):
        path = root.store(config.dataset, name)
        if path.exists():
            network = networks.load(name)
            identity = store_identity(networks.dataset, network, dtype="bf16", compress="none", device=device)
            open_fitting(path, identity, networks.dataset, content_only=True)


def _existing_run(
    path: Path,
    config: SweepConfig,
    inputs: dict[NetworkName, NetworkInput],
    dataset: Dataset,
    device: torch.device,
) -> Run | None:
    """The run at ``path``, if there is one; raises RunError when it is not the one asked for."""
    if not (path / "run.json").is_file():
        return None
    run = Run.open(path)
    run.require(config, inputs, dataset.hash)
    if run.resolved.device != device.type:
        raise RunError(
            f"run {run.name!r} began on {run.resolved.device}: continue it with --device {run.resolved.device}, "
            "or use another --run name"
        )
    return run


def _new_run(
    root: Root,
    path: Path,
    config: SweepConfig,
    inputs: dict[NetworkName, NetworkInput],
    networks: "Networks",
    device: torch.device,
    memory: str,
    available: int,
) -> Run:
    """Create the run, with everything that ``auto`` chooses on this machine frozen into it."""
    positions = {name: network.positions for name, network in inputs.items()}
    shapes = {name: [shape for _, shape in own] for name, own in positions.items()}
    budget = memory_budget(memory, available, device.type)
    dtype = DTYPES[resolve_precision(config.precision, device)]
    source = choose_measured(
        root, config, shapes, networks.dataset, networks.load, dtype=dtype, device=device, budget=budget
    )
    log.info("source %s", source.reason)
    resolved = resolve(root.path, config, positions, source, device, memory=memory, budget=budget)
    return Run.create(path, config, resolved, inputs, networks.dataset.hash)


def _check_geometries(config: SweepConfig, units: list[PlannedUnit], inputs: dict[NetworkName, NetworkInput]) -> None:
    """Refuse positions that there are not, and cells that no stitch can join."""
    positions = {name: network.positions for name, network in inputs.items()}
    require_positions(config, positions)
    for planned in units:
        sender, receiver = positions[planned.sender], positions[planned.receiver]
        for cell in sorted(planned_cells(config, planned, positions)):
            try:
                Geometry.between(sender[cell.i][1], receiver[cell.j][1], config.rules)
            except ConfigError as error:
                place = f"{planned.sender} {sender[cell.i][0]} -> {planned.receiver} {receiver[cell.j][0]}"
                raise ConfigError(f"{place}: {error}") from None


def _describe(resolved: Resolved) -> str:
    return (
        f"{resolved.device}, {resolved.precision}, {resolved.kernel} kernel, compile {resolved.compile}, "
        f"groups of up to {resolved.group_size} cells, {resolved.source} representations"
    )
