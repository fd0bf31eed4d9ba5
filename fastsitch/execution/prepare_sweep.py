"""A sweep before it begins: what cannot work is refused, and what ``auto`` chose is frozen into the run."""

import logging
from collections.abc import Sequence
from pathlib import Path

from fastsitch.activations.precompute import open_fitting, store_identity, storing_network
from fastsitch.chains.vet_chain import require_gradients
from fastsitch.data import load_dataset
from fastsitch.errors import NetworkError, argument
from fastsitch.machine import DTYPES, available_memory, configure, resolve_device, resolve_precision
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import namesake, read_record
from fastsitch.networks.find_network import models_folder, not_trained
from fastsitch.networks.network_definition import require_defined
from fastsitch.networks.require_receivers import require_receivers
from fastsitch.planning.group_memory import memory_budget
from fastsitch.planning.resolve_auto import resolve
from fastsitch.planning.source_rates import choose_measured
from fastsitch.receivers.contract import SegmentMemory
from fastsitch.receivers.graph_segment import segment_costs
from fastsitch.receivers.working_precision import working_network
from fastsitch.root import Root
from fastsitch.runs.continue_run import require_same_device, require_same_run
from fastsitch.runs.run import Run
from fastsitch.runs.run_record import Resolved, RunRecord
from fastsitch.runs.sweep_config import SweepConfig
from fastsitch.runs.sweep_plan import SweepPlan
from fastsitch.runs.workbench import Networks, Workbench
from fastsitch.suggested_command import command
from fastsitch.vocabulary import Attention

log = logging.getLogger(__name__)


class Preparation:
    """A sweep on the machine that trains it: device, images and networks, and what ``auto`` means there.

    Raises what :func:`fastsitch.sweep` raises, before any work begins. ``workers`` share the memory of the machine.
    """

    def __init__(self, root: Root, config: SweepConfig, *, device: str, memory: str, workers: int = 1) -> None:
        self._root = root
        self._config = config
        self._memory = memory
        self._workers = workers
        self._device = resolve_device(device)
        # what is wrong is said even where a run that exists needs no budget
        memory_budget(memory, available_memory(self._device), self._device.type)
        configure(self._device)
        self._dataset = load_dataset(config.dataset, root.data_dir)
        config.require_one_batch(len(self._dataset.train))
        self._networks = Networks(root, self._dataset)
        self._inputs = {network: self._networks.describe(network, self._device) for network in config.networks}
        self._plan = SweepPlan(config, {name: network.positions for name, network in self._inputs.items()})
        self._plan.require_stitches()
        self._require_receivers()
        self._require_senders()

    def existing(self, path: Path) -> Run | None:
        """The run at ``path``, if there is one, of which the stores that are there can be used."""
        config = self._config
        run = self._existing_run(path)
        for name in config.stored_networks(config.units):
            asked = "live" if config.augments else config.source
            if (asked if run is None else run.resolved.source_of(name)) != "live":
                self._check_store(name)
        return run

    def begin(self, path: Path) -> Workbench:
        """The run at ``path``, created where there is none, and what it works with. The caller holds its lock."""
        run = self._existing_run(path)
        if run is None:
            run = self._new_run(path)
        else:
            run.note_versions()
        log.info("run %s: %s", run.name, _describe(run.resolved))
        return Workbench(self._root, run, self._networks, self._device)

    def _existing_run(self, path: Path) -> Run | None:
        """The run at ``path``, if there is one; raises RunError when it is not the one asked for."""
        if not (path / "run.json").is_file():
            return None
        run = Run.open(path)
        require_same_run(run, self._config, self._inputs, self._dataset.hash)
        require_same_device(run, self._device)
        return run

    def _new_run(self, path: Path) -> Run:
        """Create the run, with everything that ``auto`` chooses on this machine frozen into it."""
        device = self._device
        budget = memory_budget(self._memory, available_memory(device) // self._workers, device.type)
        source = choose_measured(
            self._root,
            self._plan,
            self._dataset,
            self._networks.load,
            dtype=DTYPES[resolve_precision(self._config.precision, device)],
            device=device,
            budget=budget,
        )
        log.info("source %s", source.reason)
        resolved = resolve(
            self._root.path,
            self._plan,
            source,
            device,
            memory=self._memory,
            budget=budget,
            segments=self._segments,
        )
        return Run.create(
            path,
            RunRecord(config=self._config, resolved=resolved, networks=self._inputs, data_hash=self._dataset.hash),
        )

    def _segments(self, attention: Attention) -> dict[NetworkName, Sequence[SegmentMemory]]:
        """What a step takes for the segments of receivers that are no small ResNets."""
        config = self._config
        if config.loss != "task" or config.receiver_bn != "frozen":
            return {}
        dtype = DTYPES[resolve_precision(config.precision, self._device)]
        return {
            name: segment_costs(self._networks.receiver(name, dtype, self._device, attention))
            for name in dict.fromkeys(unit.receiver_network for unit in self._plan.units)
            if not name.built_in
        }

    def _require_receivers(self) -> None:
        """Refuse a receiver that does not work in the run's precision, or without a gradient where one is needed."""
        trained = self._config.loss == "task"
        dtype = DTYPES[resolve_precision(self._config.precision, self._device)]
        for name in dict.fromkeys(unit.receiver_network for unit in self._plan.units):
            if name.built_in:
                continue
            units = [unit for unit in self._plan.units if unit.receiver_network == name]
            positions = sorted({cell.j for unit in units for cell in self._plan.cells(unit)})
            chain = self._networks.load(name).chain
            if trained:
                require_gradients(chain, positions, str(name))
            working_network(
                chain,
                str(name),
                f"use {argument('precision', 'fp32')}",
                dtype=dtype,
                device=self._device,
                gradients_to=positions[0] if trained and positions else None,
            )

    def _require_senders(self) -> None:
        """Refuse a network whose representations cannot be computed as stores hold them, unless they are there."""
        config = self._config
        for name in config.stored_networks(config.units):
            live = config.augments or config.source == "live"
            if name.built_in or (not live and self._root.store(config.dataset, name).exists()):
                continue
            network = self._networks.load(name)
            identity = store_identity(self._dataset, network, dtype="bf16", compress="none", device=self._device)
            line = f"{command('precompute', name, dataset=config.dataset, root=self._root.path)} --dtype fp32"
            without = f", and leave out {argument('source', 'live')}" if live else ""
            storing_network(network, identity, self._device, f"make its store by {line}{without}")

    def _check_store(self, name: NetworkName) -> None:
        """Refuse a store that is stale, damaged or of other samples before any work begins, not when its turn comes."""
        path = self._root.store(self._config.dataset, name)
        if path.exists():
            network = self._networks.load(name)
            identity = store_identity(self._dataset, network, dtype="bf16", compress="none", device=self._device)
            open_fitting(path, identity, self._dataset, content_only=True)


def require_networks(root: Root, config: SweepConfig) -> None:
    """Raise NetworkError with the exact command line when a network of the sweep was never trained."""
    dataset = config.dataset
    for name in config.networks:
        if name.random:
            # refuses controls that would be ambiguous
            namesake(models_folder(root, dataset, name), name)
    require_receivers(root, dataset, config.receivers)
    trained = map(NetworkName.parse, (*config.senders, *config.receivers))
    names = sorted({name for name in trained if read_record(models_folder(root, dataset, name), name) is None})
    if names:
        require_defined(root, dataset, names)
        raise NetworkError(not_trained(root, dataset, names))


def _describe(resolved: Resolved) -> str:
    return (
        f"{resolved.device}, {resolved.precision}, {resolved.kernel} kernel, compile {resolved.compile}, "
        f"groups of up to {resolved.group_size} cells, {resolved.source} representations"
        + "".join(f", of {name} {source}" for name, source in resolved.sources.items())
    )
