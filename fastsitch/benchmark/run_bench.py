"""The whole benchmark: check, then measure."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fastsitch.benchmark.agreement import (
    Agreement,
    accuracy_agreement,
    change_agreement,
    exact_errors,
    peer_names,
    require_right_convolutions,
)
from fastsitch.benchmark.bandwidth import copy_bandwidth, scratch_folder, store_speeds
from fastsitch.benchmark.bench_config import BenchConfig
from fastsitch.benchmark.bench_pair import BenchNetworks, BenchPair, make_bench_pair
from fastsitch.benchmark.ceilings import Ceiling, measure_ceiling
from fastsitch.benchmark.group_sizes import GroupMeasure, compare_pairs, default_group_sizes, fits, measure_groups
from fastsitch.benchmark.study_projection import Projection, project
from fastsitch.benchmark.time_peers import PeerMeasure, time_peers
from fastsitch.benchmark.timing_rounds import Spread
from fastsitch.data import load_dataset
from fastsitch.errors import ConfigError, FailedError, NetworkError, argument
from fastsitch.machine import (
    DTYPES,
    configure,
    resolve_compile,
    resolve_device,
    resolve_kernel,
    resolve_precision,
    versions,
)
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import read_record
from fastsitch.networks.find_network import models_folder, not_trained
from fastsitch.networks.network_definition import require_defined
from fastsitch.networks.require_receivers import require_receivers
from fastsitch.planning.machine_profile import Tuning, machine_name, save_tuning
from fastsitch.progress import Progress, Report, ignore
from fastsitch.root import Root
from fastsitch.runs.workbench import Networks
from fastsitch.vocabulary import DEFAULT_DATASET, Attention, Compile

TRAINING_STEPS, TRAIN_IMAGES, TEST_IMAGES = 48, 2048, 512
"""The networks are trained for so many steps, so that accuracies say something; speed does not depend on it."""

_AS_FAST = 0.02
"""Group sizes that are slower than the fastest by no more than this count as equally fast; the largest is chosen."""


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Everything measured; ``to_dict`` is the JSON file. Speeds are per second."""

    config: BenchConfig
    command: str
    machine: str
    device: str
    threads: int
    precision: str
    kernel: str
    compile: str
    versions: dict[str, str]
    unit: int
    """Cells of one unit."""
    agreements: dict[str, Agreement]
    ceiling: Ceiling
    bandwidths: dict[str, Spread]
    """Bytes per second: copies in memory, the store on the disk."""
    groups: list[GroupMeasure]
    peers: list[PeerMeasure]
    projection: Projection | None
    """Of the study, for pairs of small ResNets."""
    tuning: Tuning | None
    profile: str | None
    """Where the tuning was written."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "config": self.config.to_dict()}

    @property
    def whole_unit(self) -> GroupMeasure:
        """The measure whose groups come closest to one whole unit."""
        return min(self.groups, key=lambda measure: abs(math.log(measure.group_size / self.unit)))


def run_bench(root: Root, config: BenchConfig, *, device: str = "auto", report: Report = ignore) -> BenchResult:
    """Measure this machine; raises FailedError, before any speed is measured, when a check fails."""
    torch_device = resolve_device(device)
    configure(torch_device)
    precision = resolve_precision(config.precision, torch_device)
    kernel = resolve_kernel(config.kernel, torch_device)
    compiled = resolve_compile(config.compile, torch_device)
    dtype = DTYPES[precision]

    def stage(what: str) -> Report:
        return lambda progress: report(replace(progress, unit="measurements", task=f"bench: {what}"))

    scratch = scratch_folder(root.path)
    check, ceilings = stage("check"), stage("ceilings")
    check(Progress(0, 2))
    networks = bench_networks(root, config)
    _check_group_sizes(networks, config)
    small = NetworkName.parse(config.receiver).built_in
    names = peer_names(dtype, everything=config.peers, small=small)
    exact = exact_errors(networks, names, torch_device, config.rules)
    if dtype == torch.bfloat16:
        require_right_convolutions(torch_device)
    pair = _bench_pair(networks, config, dtype, torch_device, kernel, compiled == "on")
    check(Progress(1, 2))
    agreements = (accuracy_agreement if networks.built_in else change_agreement)(pair, exact)

    sizes = _group_sizes(pair, config)
    counts = [sum(cell.j == j for cell in pair.cells) for j in range(len(pair.frozen.positions))]
    ceilings(Progress(0, 3))
    ceiling = measure_ceiling(pair.receiver, counts, config.batch_size, dtype, torch_device, config.repeats)
    ceilings(Progress(1, 3))
    bandwidths = {"copy": copy_bandwidth(torch_device, config.repeats)}
    ceilings(Progress(2, 3))
    bandwidths |= store_speeds(scratch, pair.frozen.positions, config.repeats)
    groups = measure_groups(pair, sizes, config.repeats, stage("group sizes"))
    peers = time_peers(pair, agreements, config.repeats, stage("peers")) if config.peers else []
    unit = len(pair.cells)
    whole = min(groups, key=lambda measure: abs(math.log(measure.group_size / unit)))
    projection = None
    if networks.built_in:
        stage("projection")(Progress(0, 1))
        projection = project(whole.fraction.median, dtype, torch_device, config.repeats)
    tuning = _tune(networks, pair, config, groups, precision, compiled, stage) if config.tune else None
    return BenchResult(
        config=config,
        command=config.command(root.path, device),
        machine=machine_name(torch_device),
        device=torch_device.type,
        threads=torch.get_num_threads(),
        precision=precision,
        kernel=kernel,
        compile=compiled,
        versions=versions(),
        unit=unit,
        agreements=agreements,
        ceiling=ceiling,
        bandwidths=bandwidths,
        groups=groups,
        peers=peers,
        projection=projection,
        tuning=tuning,
        profile=None if tuning is None else str(save_tuning(root.path, torch_device, tuning)),
    )


def bench_networks(root: Root, config: BenchConfig) -> BenchNetworks:
    """Those of the embedded images, or of the data set that the networks were added to.

    Raises NetworkError where one is missing, DataError for data sets.
    """
    names = [NetworkName.parse(name) for name in (config.sender, config.receiver)]
    if all(name.built_in for name in names) and config.dataset == DEFAULT_DATASET:
        return BenchNetworks(config.sender, config.receiver)
    added = sorted({name for name in names if not name.built_in})
    require_defined(root, config.dataset, added)
    missing = [name for name in added if read_record(models_folder(root, config.dataset, name), name) is None]
    if missing:
        raise NetworkError(not_trained(root, config.dataset, missing))
    require_receivers(root, config.dataset, [config.receiver])
    dataset = load_dataset(config.dataset, root.data_dir)
    return BenchNetworks(config.sender, config.receiver, Networks(root, dataset))


def _bench_pair(
    networks: BenchNetworks,
    config: BenchConfig,
    dtype: torch.dtype,
    device: torch.device,
    kernel: str,
    compiled: bool,
    attention: Attention = "fused",
) -> BenchPair:
    return make_bench_pair(
        networks,
        width=config.width,
        batch_size=config.batch_size,
        images=max(TRAIN_IMAGES, config.batch_size),
        tests=TEST_IMAGES,
        dtype=dtype,
        device=device,
        kernel=kernel,
        compiled=compiled,
        training_steps=TRAINING_STEPS,
        rules=config.rules,
        attention=attention,
    )


def _check_group_sizes(networks: BenchNetworks, config: BenchConfig) -> None:
    unit = networks.cells
    for size in config.group_sizes:
        if size > unit and size % unit:
            raise ConfigError(
                f"{argument('group_sizes', size)}: {config.sender} -> {config.receiver} has {unit} cells; expected up "
                f"to {unit}, or a multiple of it, such as {2 * unit}"
            )


def _group_sizes(pair: BenchPair, config: BenchConfig) -> list[int]:
    sizes = sorted(set(config.group_sizes)) or default_group_sizes(pair)
    if not fits(pair, sizes):
        raise FailedError(
            f"{argument('group_sizes', sizes)}: groups of all these sizes do not fit into memory together; "
            "use smaller ones, or measure them in several runs"
        )
    return sizes


def _tune(
    networks: BenchNetworks,
    pair: BenchPair,
    config: BenchConfig,
    groups: list[GroupMeasure],
    precision: str,
    compiled: Compile,
    stage: Callable[[str], Report],
) -> Tuning:
    """The fastest group size, with CUDA whether to compile, and on a CPU how attention is computed.

    All are measured on one machine in one process.
    """
    rates = {str(measure.group_size): measure.rate.median for measure in groups}
    fastest = max(measure.rate.median for measure in groups)
    best = max(
        (measure for measure in groups if measure.rate.median >= (1 - _AS_FAST) * fastest),
        key=lambda measure: measure.group_size,
    )
    choice: Compile = compiled
    if pair.device.type == "cuda":
        other: Compile = "off" if compiled == "on" else "on"
        changed = _bench_pair(networks, config, pair.dtype, pair.device, pair.kernel, other == "on")
        again = measure_groups(changed, [best.group_size], config.repeats, stage(f"compile {other}"))[0]
        rates[f"compile {compiled}"], rates[f"compile {other}"] = best.rate.median, again.rate.median
        choice = other if again.rate.median > best.rate.median else compiled
    attention: Attention = "fused"
    if pair.attends and pair.device.type == "cpu":
        changed = _bench_pair(networks, config, pair.dtype, pair.device, pair.kernel, compiled == "on", "products")
        works = {"attention fused": pair, "attention products": changed}
        found = compare_pairs(works, best.group_size, config.repeats, stage("attention"))
        rates |= found
        attention = "products" if found["attention products"] > found["attention fused"] else "fused"
    return Tuning(
        receiver=None if pair.small else config.receiver,
        width=max(pair.source.shapes[0][0], pair.frozen.positions[0].rows[0]),
        batch_size=config.batch_size,
        precision=precision,
        group_size=best.group_size,
        compile=choice,
        rates=rates,
        attention=attention,
    )
