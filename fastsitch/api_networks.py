"""The commands that make networks and their stores, as functions for notebooks and scripts. Nothing here prints."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from fastsitch.activations.precompute import StoreMaker
from fastsitch.activations.store import ActivationStore
from fastsitch.analysis.probe_positions import NetworkProbes, PositionProber
from fastsitch.chains.layout import Layout, parse_layout
from fastsitch.cluster.cluster import Cluster, connected
from fastsitch.cluster.worker import Task
from fastsitch.data import Dataset, Normalisation, canonical_dataset
from fastsitch.data import load_dataset as read_dataset
from fastsitch.errors import ConfigError, NetworkError, argument
from fastsitch.files import expanded, require_regular, write_json
from fastsitch.machine import configure, resolve_device, versions
from fastsitch.network_names import NetworkName
from fastsitch.networks.add_network import NewNetwork, add_network
from fastsitch.networks.checkpoint import NetworkRecord, namesake, read_record
from fastsitch.networks.find_network import models_folder, not_trained
from fastsitch.networks.model_source import ModelSource
from fastsitch.networks.network_definition import Definition, require_defined
from fastsitch.networks.train_network import NetworkTrainer, network_recipe
from fastsitch.progress import Progress, Report, ignore
from fastsitch.root import Root
from fastsitch.runs.inventory import chosen_dataset
from fastsitch.runs.sweep_config import position_patterns
from fastsitch.vocabulary import DEFAULT_DATASET, Compression, HeadChoice, NetworkRecipe, StoredDtype, require_whole

log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


def load_dataset(
    name: str = DEFAULT_DATASET, data_dir: PathLike | None = None, root: PathLike | None = None
) -> Dataset:
    """A data set in memory.

    Args:
        name: ``fashion-mini`` (embedded), ``fashion-mnist``, ``cifar10``, ``cifar100``, one of these with ``:N`` for
            its first N training images, ``imagefolder:DIR``, ``imagefolder:DIR@SIDE``, ``npz:FILE``,
            ``hf:ORG/NAME:CONFIG`` of the Hugging Face hub or ``hf:/DIR`` with parquet files; any of them
            with ``@train=N`` or ``@test=N`` behind it for a class-balanced subset.
        data_dir: folder with the files of named data sets; None: ``data`` in the root.
        root: folder of networks, stores and runs; None: FASTSITCH_ROOT, then ``./fastsitch-data``.

    Returns:
        Training and test images, uint8 (N, H, W, 3), and their labels.

    Raises:
        DataError: the name is unknown, or files are missing or malformed.
        MemoryLimitError: neither memory nor disk hold the pixels.
    """
    return read_dataset(name, Root.at(root, data_dir).data_dir)


def train(
    *networks: str,
    dataset: str = DEFAULT_DATASET,
    width: int = 64,
    epochs: int | None = None,
    seed: int = 0,
    recipe: NetworkRecipe = "fast",
    resolution: int | None = None,
    normalisation: Normalisation | None = None,
    force: bool = False,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    device: str = "auto",
    ray: str | Cluster | None = None,
    report: Report = ignore,
) -> list[NetworkRecord]:
    """Train networks on a data set and save them; those that are trained just so already are left alone.

    Args:
        networks: names such as ``R1111``, ``ResNet18``, ``R1111@3`` (seed 3), or of networks that were added.
        dataset: see :func:`load_dataset`.
        width: channels of the first stage of a small ResNet.
        epochs: None: those of the recipe.
        seed: of every name without one of its own.
        recipe: ``fast`` or ``published``.
        resolution: side to which images are resized for a small ResNet, a multiple of 8; None: as they are.
        normalisation: mean and standard deviation of a small ResNet's inputs; None: those of the data set.
        force: train again what was trained otherwise.
        root: folder of networks, stores and runs; None: FASTSITCH_ROOT, then ``./fastsitch-data``.
        data_dir: folder with the files of data sets; None: ``data`` in the root.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        ray: see :func:`fastsitch.sweep`.
        report: gets the steps done.

    Returns:
        The record of each network, with its test accuracy.

    Raises:
        ConfigError: an option that cannot work, before any work begins.
        DataError: the data set is missing or malformed.
        NetworkError: a name is unknown, or a network was trained otherwise.
        FailedError: a training diverged.
    """
    folders = Root.at(root, data_dir)
    names = list(dict.fromkeys(_seeded(text, seed) for text in networks))
    if not names:
        raise ConfigError("no network named: expected at least one, such as R1111")
    chosen = network_recipe(recipe, epochs)
    data = canonical_dataset(dataset)
    require_defined(folders, data, names)
    if ray is not None:
        # a download is finished before workers look for its files
        load_dataset(data, folders.data_dir)
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
    for name, record in _each(ray, folders, make, names, device, "the training of {}", report):
        log.info("%s is trained: test accuracy %.4f", name, record.accuracy)
        records.append(record)
    return records


def add(
    name: str,
    source: str,
    *,
    weights: PathLike | None = None,
    pretrained: bool = False,
    classes_from: PathLike | None = None,
    weights_key: str | None = None,
    head: HeadChoice | None = None,
    positions: Sequence[str] | str | None = None,
    layouts: Mapping[str, Layout | str] | None = None,
    classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resolution: int | tuple[int, int] | None = None,
    channels: int | None = None,
    output: str | int | None = None,
    dataset: str = DEFAULT_DATASET,
    force: bool = False,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    device: str = "auto",
) -> tuple[Definition, NetworkRecord | None]:
    """Register a network of torchvision, of timm, or of a factory in a Python file under a name, for one data set.

    Args:
        name: letters, digits and _; ``NAME@3`` with the weights of another seed.
        source: ``torchvision:resnet18``, ``timm:resnet10t`` or ``FILE.py:factory``, whose code runs whenever the
            network is built.
        pretrained: take the weights, the preprocessing and the image size that the library publishes, of
            ``timm:NAME.TAG``, ``timm:hf-hub:ORG/MODEL@REVISION``, ``timm:local-dir:PATH`` or
            ``torchvision:NAME@WEIGHTS``; from its cache, or downloaded.
        classes_from: file with lines ``class,output`` that say which output of a pretrained network stands for a class
            of the data set, by index or name; None: they are matched by name.
        weights: safetensors, or a checkpoint with a state dict in it, of which nothing is executed; also the index of
            shards, or a folder with one of these; None: the network is to be trained.
        weights_key: which weights, where a checkpoint has several, such as ``state_dict_ema`` or ``teacher.backbone``.
        head: what stands in the place of the last layer: ``new``: the same layer, untrained; ``probe``: a linear probe,
            fitted to the network's features of the training images; ``none``: nothing, for a sender of features.
        positions: names or patterns; None: the outputs of blocks.
        layouts: by name of the position, where the one that is found is wrong, or none: a :class:`Layout`, or its text
            such as ``map``, ``tokens:14x14`` or, with a class token, ``tokens:1+14x14``.
        classes: outputs of the network; None: the classes of the data set.
        mean: of pixels in [0, 1], one number or three; None: that of the data set.
        std: as ``mean``.
        resolution: side, or height and width, of the images it is built for; None: those of the data set.
        channels: 3, or 1 for a network that sees images in grey; None: as it takes them.
        output: name or index of the logits, where the network returns several tensors; None: ``logits``, then ``out``,
            then the first tensor (B, classes).
        dataset: see :func:`load_dataset`.
        force: replace what the name is registered for.
        root: folder of networks, stores and runs; None: FASTSITCH_ROOT, then ``./fastsitch-data``.
        data_dir: folder with the files of data sets; None: ``data`` in the root.
        device: where the accuracy is measured.

    Returns:
        The definition, and the record of the network if it has weights.

    Raises:
        ConfigError: an option that cannot work.
        DataError: the data set is missing or malformed.
        NetworkError: the network cannot be built or cut, its weights do not fit, or the name is taken.
    """
    folders = Root.at(root, data_dir)
    torch_device = resolve_device(device)
    new = NewNetwork(
        name=NetworkName.parse_new(name),
        source=ModelSource.parse(source),
        weights=None if weights is None else _file("weights", weights),
        pretrained=pretrained,
        classes_from=None if classes_from is None else _file("classes_from", classes_from),
        weights_key=weights_key,
        head=head,
        positions=positions,
        layouts={key: parse_layout(value) for key, value in (layouts or {}).items()},
        classes=classes,
        normalisation=_normalisation(mean, std),
        resolution=(resolution, resolution) if isinstance(resolution, int) else resolution,
        channels=channels,
        output=output,
    )
    configure(torch_device)
    return add_network(folders, canonical_dataset(dataset), new, device=torch_device, force=force)


def precompute(
    *networks: str,
    dataset: str | None = None,
    dtype: StoredDtype = "bf16",
    compress: Compression = "none",
    positions: Sequence[str] | str | None = None,
    force: bool = False,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    activations: PathLike | None = None,
    device: str = "auto",
    ray: str | Cluster | None = None,
    report: Report = ignore,
) -> list[ActivationStore]:
    """Run networks once over a data set and store their representations; stores that are up to date are left alone.

    Args:
        networks: trained networks, or controls such as ``R1111-random@0``.
        dataset: None: the one data set in the root that has the networks; ``@train=N@test=N`` alone: a subset of it.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        compress: ``none`` or ``zstd``.
        positions: names or patterns such as ``layer*.0``; None: all. A store that is made again keeps those it had.
        force: replace stores that are stale or damaged.
        root: folder of networks, stores and runs; None: FASTSITCH_ROOT, then ``./fastsitch-data``.
        data_dir: folder with the files of data sets; None: ``data`` in the root.
        activations: where stores lie instead of the root: a folder, or ``s3://BUCKET/PREFIX``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        ray: see :func:`fastsitch.sweep`.
        report: gets the images done.

    Returns:
        The stores, opened.

    Raises:
        StoreError: a store is stale or damaged and ``force`` is not set.
        NetworkError: a network was never trained.
        ConfigError: an option that cannot work.
    """
    folders = Root.at(root, data_dir, activations)
    names = _named(networks)
    patterns = position_patterns(positions)
    data = chosen_dataset(folders, dataset, [str(name) for name in names])
    _require_trained(folders, data, names)
    make = partial(
        StoreMaker, dataset=data, dtype=dtype, compress=compress, force=force, positions=patterns, alone=len(names) == 1
    )
    stores = []
    for name, (store, made) in _each(ray, folders, make, names, device, "the store of {}", report):
        log.info("the store of %s is %s: %s", name, "made" if made else "up to date", store.path)
        stores.append(store)
    return stores


def probe(
    *networks: str,
    dataset: str | None = None,
    json: PathLike | None = None,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    activations: PathLike | None = None,
    device: str = "auto",
    report: Report = ignore,
) -> list[NetworkProbes]:
    """Fit a linear probe at every position of networks: logistic regression on the mean over the map or the tokens.

    Representations come from a network's store where there is one; else the network runs once over all images.

    Args:
        networks: trained networks, networks of features, or controls such as ``R1111-random@0``.
        dataset: None: the one data set in the root that has the networks.
        json: a file for the results; None: none is written.
        root: folder of networks, stores and runs; None: FASTSITCH_ROOT, then ``./fastsitch-data``.
        data_dir: folder with the files of data sets; None: ``data`` in the root.
        activations: where stores lie instead of the root.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        report: gets the images done.

    Returns:
        The probes of each network.

    Raises:
        ConfigError: an option that cannot work.
        NetworkError: a network was never trained, or its representations are not finite.
        StoreError: a store is stale or damaged.
    """
    folders = Root.at(root, data_dir, activations)
    names = _named(networks)
    path = None if json is None else _file("json", json)
    if path is not None:
        require_regular(path)
    data = chosen_dataset(folders, dataset, [str(name) for name in names])
    _require_trained(folders, data, names)
    prober = PositionProber(folders, data, device=device)
    found = [prober(name, report) for name in names]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"networks": [each.to_dict() for each in found], "versions": versions()})
    return found


def _named(networks: Sequence[str]) -> list[NetworkName]:
    names = list(dict.fromkeys(NetworkName.parse(text) for text in networks))
    if not names:
        raise ConfigError("no network named: expected at least one, such as R1111")
    return names


def _require_trained(root: Root, dataset: str, names: Sequence[NetworkName]) -> None:
    """Raise NetworkError with the exact command line when a network, or a control's namesake, was never trained."""
    missing = []
    for name in names:
        folder = models_folder(root, dataset, name)
        if (namesake(folder, name) if name.random else read_record(folder, name)) is None:
            missing.append(NetworkName(name.architecture) if name.random else name)
    if missing:
        require_defined(root, dataset, missing)
        raise NetworkError(not_trained(root, dataset, missing))


_SMALLEST_STD = 1e-3


def _normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalisation | None:
    """One number or three of each, of pixels in [0, 1]; raises ConfigError."""
    if mean is None and std is None:
        return None
    given = [tuple(values or ()) for values in (mean, std)]
    means, stds = (values * (3 if len(values) == 1 else 1) for values in given)
    fits = len(means) == len(stds) == 3 and all(isinstance(value, Real) for value in (*means, *stds))
    if not fits or not all(0 <= value <= 1 for value in means) or not all(_SMALLEST_STD <= x <= 1 for x in stds):
        raise ConfigError(
            f"{argument('mean', _joined(mean))} {argument('std', _joined(std))}: expected both, one number or three, "
            f"of pixels in [0, 1]: means from 0 to 1, deviations from {_SMALLEST_STD:g} to 1"
        )
    return Normalisation(means, stds)


def _joined(values: Sequence[float] | None) -> str | None:
    return (
        None
        if values is None
        else ",".join(f"{value:g}" if isinstance(value, Real) else str(value) for value in values)
    )


def _each(
    ray: str | Cluster | None,
    root: Root,
    make: Callable[..., Task],
    names: list[NetworkName],
    device: str,
    what: str,
    report: Report,
) -> Iterator[tuple[NetworkName, Any]]:
    """What the task ``make(root, device=...)`` does with each network: here, or on the workers of a cluster."""
    if ray is None:
        task = make(root, device=device)
        for name in names:
            yield name, task(name, report)
        return

    def report_network(name: NetworkName, progress: Progress) -> None:
        report(progress)

    with connected(ray, root.path) as cluster:
        slots = cluster.worker_slots(device)
        make_task = partial(make, root.absolute(), device=slots.device)
        yield from cluster.run_jobs(make_task, names, slots, name=what.format, report=report_network)


def _seeded(text: str, seed: int) -> NetworkName:
    name = NetworkName.parse(text)
    require_whole("seed", seed, 0)
    if "@" in text:
        if seed not in (0, name.seed):
            raise ConfigError(f"{text} names seed {name.seed}: leave out {argument('seed', seed)}")
        return name
    return NetworkName(name.architecture, name.random, seed)


def _file(name: str, given: PathLike) -> Path:
    if not os.fspath(given).strip():
        raise ConfigError(f"{argument(name)} is empty: expected the name of a file")
    return expanded(given)
