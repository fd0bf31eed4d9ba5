"""The commands as functions, for notebooks and scripts. Nothing here prints."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastsitch.activations.precompute import StoreMaker
from fastsitch.activations.store import ActivationStore
from fastsitch.advice import command
from fastsitch.analysis import measure
from fastsitch.analysis.measure import MeasureReport
from fastsitch.benchmark.config import BenchConfig
from fastsitch.benchmark.run import BenchResult, Report, run_bench
from fastsitch.cluster.cluster import Cluster, connected
from fastsitch.cluster.worker import Station
from fastsitch.data import DEFAULT_DATASET, Dataset, Normalisation, canonical_dataset
from fastsitch.data import load_dataset as read_dataset
from fastsitch.errors import ConfigError, NetworkError
from fastsitch.files import output_folder
from fastsitch.inventory import find_run, infer_dataset
from fastsitch.machine import configure, resolve_device
from fastsitch.networks.add import NewNetwork, add_network
from fastsitch.networks.checkpoint import NetworkRecord, namesake, read_record
from fastsitch.networks.definition import Definition, require_defined
from fastsitch.networks.model_source import ModelSource
from fastsitch.networks.names import NetworkName
from fastsitch.networks.training import NetworkTrainer, TrainReport, network_recipe
from fastsitch.report.images import write_images
from fastsitch.root import Root
from fastsitch.sweep.config import SweepConfig, listed, sweep_config
from fastsitch.sweep.estimate import SweepEstimate, estimate_sweep
from fastsitch.sweep.execute import SweepReport
from fastsitch.sweep.images import Chosen, run_images
from fastsitch.sweep.results import Run
from fastsitch.sweep.run import run_sweep

PathLike = str | os.PathLike[str]


def load_dataset(
    name: str = DEFAULT_DATASET, data_dir: PathLike | None = None, root: PathLike | None = None
) -> Dataset:
    """A data set in memory, by the name that the commands take; see :func:`fastsitch.data.load.load_dataset`."""
    return read_dataset(name, Root.at(root, data_dir).data_dir)


def train(
    *networks: str,
    dataset: str = DEFAULT_DATASET,
    width: int = 64,
    epochs: int | None = None,
    seed: int = 0,
    recipe: str = "fast",
    resolution: int | None = None,
    normalisation: Normalisation | None = None,
    force: bool = False,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    device: str = "auto",
    ray: str | Cluster | None = None,
    report: Callable[[NetworkName, TrainReport], None] | None = None,
    finished: Callable[[NetworkRecord], None] | None = None,
) -> list[NetworkRecord]:
    """Train networks on a data set and save them; those that are trained just so already are left alone.

    ``width`` is that of the small ResNets; networks that were added are as they were defined. ``seed`` is that of every
    name without one of its own (``R1111`` with seed 3 is ``R1111@3``). ``resolution`` is the side to which images are
    resized for these networks, ``normalisation`` their own mean and standard deviation of pixels in [0, 1]; without
    them a network takes both from its definition or from the data set. All names are checked before any work begins;
    ``finished`` is called with each record as it is there. ``ray``: see :func:`sweep`. Raises ConfigError, DataError,
    NetworkError, or FailedError when a training diverges.
    """
    place = Root.at(root, data_dir)
    names = list(dict.fromkeys(_seeded(text, seed) for text in networks))
    if not names:
        raise ConfigError("no network named: expected at least one, such as R1111")
    chosen = network_recipe(recipe, epochs)
    data = canonical_dataset(dataset)
    require_defined(place, data, names)
    if ray is not None:
        # a download is finished before workers look for its files
        load_dataset(data, place.data_dir)
    make = partial(
        NetworkTrainer,
        dataset=data,
        width=width,
        recipe=chosen,
        resolution=resolution,
        normalisation=normalisation,
        force=force,
    )
    records = []
    for _, record in _each(ray, place, make, names, device, "the training of {}", report):
        records.append(record)
        if finished is not None:
            finished(record)
    return records


def add(
    name: str,
    source: str,
    *,
    weights: PathLike | None = None,
    positions: Sequence[str] | str | None = None,
    classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resolution: int | tuple[int, int] | None = None,
    dataset: str = DEFAULT_DATASET,
    force: bool = False,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    device: str = "auto",
) -> tuple[Definition, NetworkRecord | None]:
    """Let ``name`` stand for a network of torchvision, of timm, or of a factory in a Python file, on one data set.

    ``source`` is ``torchvision:resnet18``, ``timm:resnet10t`` or ``FILE.py:factory``, whose code runs whenever the
    network is built. ``weights`` is a safetensors file or a state dict, of which nothing is executed; without it the
    network is to be trained. ``positions`` are names or patterns (default: the outputs of blocks), ``mean`` and ``std``
    of pixels in [0, 1] (one number or three), ``resolution`` the side, or height and width, of the images that the
    network is built for; without them, and without ``classes``, those of the data set. Returns the definition, and the
    record of the network that has weights. See :func:`fastsitch.networks.add.add_network` for the errors.
    """
    place = Root.at(root, data_dir)
    torch_device = resolve_device(device)
    new = NewNetwork(
        name=NetworkName.parse_new(name),
        source=ModelSource.parse(source),
        weights=None if weights is None else Path(weights),
        positions=positions,
        classes=classes,
        normalisation=_normalisation(mean, std),
        resolution=(resolution, resolution) if isinstance(resolution, int) else resolution,
    )
    configure(torch_device)
    return add_network(place, canonical_dataset(dataset), new, device=torch_device, force=force)


def precompute(
    *networks: str,
    dataset: str | None = None,
    dtype: str = "bf16",
    compress: str = "none",
    force: bool = False,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    activations: PathLike | None = None,
    device: str = "auto",
    ray: str | Cluster | None = None,
    report: Callable[[NetworkName, int, int], None] | None = None,
    finished: Callable[[NetworkName, ActivationStore, bool], None] | None = None,
) -> list[ActivationStore]:
    """Run networks once over a data set and store every representation.

    Stores that are up to date are left alone; ``finished`` is called with each store as it is there, and whether it was
    made now. ``activations`` and ``ray``: see :func:`sweep`. Raises StoreError when one is stale or damaged and
    ``force`` is not set, NetworkError when a network was never trained.
    """
    place = Root.at(root, data_dir, activations)
    names = list(dict.fromkeys(NetworkName.parse(text) for text in networks))
    if not names:
        raise ConfigError("no network named: expected at least one, such as R1111")
    name_of_data = canonical_dataset(dataset) if dataset else infer_dataset(place, [str(name) for name in names])
    folder = place.models(name_of_data)
    missing = [
        NetworkName(name.architecture) if name.random else name
        for name in names
        if (namesake(folder, name) if name.random else read_record(folder, name)) is None
    ]
    if missing:
        require_defined(place, name_of_data, missing)
        listed = ", ".join(map(str, missing))
        line = command("train", *missing, dataset=name_of_data, root=place.path)
        raise NetworkError(f"not trained yet on {name_of_data}: {listed}; train first with\n  {line}")
    make = partial(StoreMaker, dataset=name_of_data, dtype=dtype, compress=compress, force=force)

    def images_done(name: NetworkName, done: tuple[int, int]) -> None:
        if report is not None:
            report(name, *done)

    stores = []
    for name, (store, made) in _each(ray, place, make, names, device, "the store of {}", images_done):
        stores.append(store)
        if finished is not None:
            finished(name, store, made)
    return stores


def configure_sweep(
    senders: Sequence[str] | str,
    receivers: Sequence[str] | str,
    *,
    dataset: str | None = None,
    root: PathLike | None = None,
    activations: PathLike | None = None,
    **options: Any,
) -> SweepConfig:
    """The configuration of a sweep; ``options`` are those of :func:`fastsitch.sweep.config.sweep_config`."""
    chosen = dataset or infer_dataset(Root.at(root, activations=activations), [*listed(senders), *listed(receivers)])
    return sweep_config(dataset=chosen, senders=senders, receivers=receivers, **options)


def sweep(
    senders: Sequence[str] | str,
    receivers: Sequence[str] | str,
    *,
    dataset: str | None = None,
    run: str | None = None,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    activations: PathLike | None = None,
    device: str = "auto",
    memory: str = "auto",
    ray: str | Cluster | None = None,
    report: Callable[[SweepReport], None] | None = None,
    **options: Any,
) -> Run:
    """Train and evaluate the stitches of all pairs; a run that exists is continued.

    ``options``: settings, seeds, positions, recipe, epochs, lr, optimizer, batch_size, group_size, precision, kernel,
    compile, source, loss, solver, init, receiver_bn, resample, class_token; see
    :func:`fastsitch.sweep.config.sweep_config`.
    ``ray`` is the address of a Ray cluster whose machines do the work, all of which see the root under the same path:
    ``HOST:PORT``, ``auto`` for the one on this machine, ``local`` for one that starts and stops by itself, or a
    :class:`fastsitch.Cluster`. ``activations`` is where stores lie instead of the root: a folder, or s3://BUCKET/PREFIX.
    Raises ConfigError, DataError, NetworkError, StoreError or RunError.
    """
    config = configure_sweep(senders, receivers, dataset=dataset, root=root, activations=activations, **options)
    place = Root.at(root, data_dir, activations)
    with connected(ray, place.path) as cluster:
        return run_sweep(place, config, run=run, device=device, memory=memory, report=report, cluster=cluster)


def estimate(
    senders: Sequence[str] | str,
    receivers: Sequence[str] | str,
    *,
    dataset: str | None = None,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    activations: PathLike | None = None,
    device: str = "auto",
    memory: str = "auto",
    **options: Any,
) -> SweepEstimate:
    """What :func:`sweep` with the same arguments would take; needs neither data nor networks."""
    config = configure_sweep(senders, receivers, dataset=dataset, root=root, activations=activations, **options)
    return estimate_sweep(Root.at(root, data_dir, activations), config, device, memory)


def bench(
    *,
    root: PathLike | None = None,
    device: str = "auto",
    report: Report | None = None,
    **options: Any,
) -> BenchResult:
    """Measure this machine; needs neither networks nor files.

    ``options`` are the fields of :class:`fastsitch.benchmark.config.BenchConfig`. Raises ConfigError, and FailedError
    without any figure when the engine fails its own check.
    """
    return run_bench(Root.at(root), BenchConfig(**options), device=device, report=report)


def measure_errors(
    run: Run,
    *,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    activations: PathLike | None = None,
    device: str = "auto",
    report: Callable[[MeasureReport], None] | None = None,
) -> None:
    """Measure EV, ES and SV of every cell of a vanilla run, for :func:`read_errors`; what is measured is kept.

    ``root`` is where the run's networks and stores lie (default: the root that the run is in). Raises RunError,
    NetworkError, StoreError, DataError or BusyError; see :func:`fastsitch.analysis.measure.measure_errors`.
    """
    place = Root.at(run.path.parents[2] if root is None else root, data_dir, activations)
    measure.measure_errors(place, run, device=device, report=report)


def open_run(name: str, *, dataset: str | None = None, root: PathLike | None = None) -> Run:
    """Open a run by name, for ``run.matrix("R1111", "R1112", "accuracy", setting="T2T")``."""
    return find_run(Root.at(root), name, dataset)


def images(
    run: str,
    *,
    senders: Chosen = None,
    receivers: Chosen = None,
    settings: Chosen = None,
    images: Sequence[int] | None = None,
    count: int | None = None,
    seed: int | None = None,
    out: PathLike | None = None,
    dataset: str | None = None,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    activations: PathLike | None = None,
    device: str = "auto",
    memory: str = "auto",
    report: Callable[[SweepReport], None] | None = None,
) -> list[Path]:
    """Stitch every sender position into the receivers' inputs, and draw what the stitches generate beside the images.

    For all pairs and settings of a run, or those named; networks, recipe, first seed and precision are the run's.
    Stitches are trained on the task loss (vanilla) and, without training, matched to the image; they are kept in the
    run, so that other test images cost no training. ``images`` are indices of test images; without them ``count`` (4)
    are drawn with ``seed`` (0). Returns the PNG paths, in ``out`` (default: ``images`` in the run's folder); see
    :func:`fastsitch.report.images.write_images` for the files beside them. Raises ConfigError, DataError,
    NetworkError or RunError.
    """
    place = Root.at(root, data_dir, activations)
    found = find_run(place, run, dataset)
    folder = output_folder(found.path / "images" if out is None else out)
    pairs = run_images(
        place,
        found,
        senders=senders,
        receivers=receivers,
        settings=settings,
        images=images,
        count=count,
        seed=seed,
        device=device,
        memory=memory,
        report=report,
    )
    return write_images(pairs, folder)


_SMALLEST_STD = 1e-3


def _normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalisation | None:
    """One number or three of each, of pixels in [0, 1]; raises ConfigError."""
    if mean is None and std is None:
        return None
    means, stds = (tuple(own or ()) * (3 if own is not None and len(own) == 1 else 1) for own in (mean, std))
    fits = len(means) == len(stds) == 3
    if not fits or not all(0 <= own <= 1 for own in means) or not all(_SMALLEST_STD <= own <= 1 for own in stds):
        raise ConfigError(
            f"--mean {_joined(mean)} --std {_joined(std)}: expected both, one number or three, of pixels in [0, 1]: "
            f"means from 0 to 1, deviations from {_SMALLEST_STD:g} to 1"
        )
    return Normalisation(means, stds)


def _joined(values: Sequence[float] | None) -> str:
    return "(none)" if values is None else ",".join(f"{value:g}" for value in values)


def _each(
    ray: str | Cluster | None,
    place: Root,
    make: Callable[..., Station],
    names: list[NetworkName],
    device: str,
    what: str,
    report: Callable[[NetworkName, Any], None] | None,
) -> Iterator[tuple[NetworkName, Any]]:
    """What ``make(root, device=...)`` does with each network: here, one by one, or on the workers of a cluster."""
    tell = report or (lambda name, progress: None)
    if ray is None:
        station = make(place, device=device)
        for name in names:
            yield name, station(name, partial(tell, name))
        return
    with connected(ray, place.path) as cluster:
        places = cluster.places(device)
        elsewhere = partial(make, place.absolute(), device=places.device)
        yield from cluster.carry_out(elsewhere, names, places, name=what.format, report=tell)


def _seeded(text: str, seed: int) -> NetworkName:
    name = NetworkName.parse(text)
    if seed < 0:
        raise ConfigError(f"--seed {seed}: expected a number from 0")
    if "@" in text:
        if seed not in (0, name.seed):
            raise ConfigError(f"{text} names seed {name.seed}, but --seed says {seed}: give one of them")
        return name
    return NetworkName(name.architecture, name.random, seed)
