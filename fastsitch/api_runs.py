"""The commands that make runs and read them, as functions for notebooks and scripts. Nothing here prints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from fastsitch.analysis import measure_errors as measurement
from fastsitch.api_networks import PathLike
from fastsitch.benchmark.bench_config import BenchConfig, BenchOptions
from fastsitch.benchmark.run_bench import BenchResult, run_bench
from fastsitch.cluster.cluster import Cluster, connected
from fastsitch.execution.run_sweep import run_sweep
from fastsitch.files import output_folder
from fastsitch.generation.choose_images import Chosen, chosen_units
from fastsitch.generation.generate_images import run_images
from fastsitch.network_names import NetworkName
from fastsitch.planning.sweep_estimate import SweepEstimate, estimate_sweep
from fastsitch.progress import Report, ignore
from fastsitch.report.image_grids import require_images_replaceable, write_images
from fastsitch.root import Root
from fastsitch.runs.inventory import chosen_dataset, find_run
from fastsitch.runs.output_source import source_of
from fastsitch.runs.run import Run
from fastsitch.runs.sweep_config import SweepConfig, SweepOptions, sweep_config
from fastsitch.vocabulary import DEFAULT_DATASET, separated


def configure_sweep(
    senders: Sequence[str] | str,
    receivers: Sequence[str] | str,
    *,
    dataset: str | None = None,
    root: PathLike | None = None,
    activations: PathLike | None = None,
    **options: Unpack[SweepOptions],
) -> SweepConfig:
    """The configuration of a sweep, checked; nothing is made.

    Args:
        senders: as in :func:`sweep`, like all the other arguments.

    Returns:
        Every option of the sweep, as given or by default.

    Raises:
        ConfigError: an option, or a combination of options, that cannot work.
        NetworkError: a name that no network can have.
    """
    names = [*separated(senders), *separated(receivers)]
    chosen = chosen_dataset(Root.at(root, activations=activations), dataset, names)
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
    report: Report = ignore,
    **options: Unpack[SweepOptions],
) -> Run:
    """Train and evaluate the stitches of all pairs; a run that exists is continued.

    Args:
        senders: networks to take representations from; lists may be texts with commas.
        receivers: networks to stitch into.
        dataset: None: the one data set in the root that has the networks; ``@train=N@test=N`` alone: a subset of it.
        run: name of the run; None: from the configuration.
        root: folder of networks, stores and runs; None: FASTSITCH_ROOT, then ``./fastsitch-data``.
        data_dir: folder with the files of data sets; None: ``data`` in the root.
        activations: where stores lie instead of the root: a folder, or ``s3://BUCKET/PREFIX``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        memory: what a run that begins now may take on the device: ``auto``, or a size such as ``8GB``.
        ray: the Ray cluster whose machines do the work, all of which see the root under the same path: ``HOST:PORT``,
            ``auto`` for the one on this machine, ``local`` for one that starts and stops by itself, or a
            :class:`fastsitch.Cluster`.
        report: gets the cells done.
        options: settings, seeds, positions, recipe, epochs, lr, optimizer, batch_size, loss, solver, init, receiver_bn,
            resample, class_token, group_size, precision, kernel, compile, source; see
            :class:`fastsitch.runs.sweep_config.SweepOptions`.

    Returns:
        The finished run.

    Raises:
        ConfigError: an option, or a combination of options, that cannot work.
        DataError: the data set is missing or malformed.
        NetworkError: a network was never trained.
        StoreError: a store is stale or damaged.
        RunError: the run of that name has another configuration.
    """
    config = configure_sweep(senders, receivers, dataset=dataset, root=root, activations=activations, **options)
    folders = Root.at(root, data_dir, activations)
    with connected(ray, folders.path) as cluster:
        return run_sweep(folders, config, run=run, device=device, memory=memory, report=report, cluster=cluster)


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
    **options: Unpack[SweepOptions],
) -> SweepEstimate:
    """What :func:`sweep` with the same arguments would take; needs neither data nor networks.

    Args:
        senders: as in :func:`sweep`, like all the other arguments.

    Returns:
        Units, cells, shapes, parameters, and predicted memory, disk and time.

    Raises:
        ConfigError: an option, or a combination of options, that cannot work.
    """
    config = configure_sweep(senders, receivers, dataset=dataset, root=root, activations=activations, **options)
    return estimate_sweep(Root.at(root, data_dir, activations), config, device, memory)


def bench(
    *,
    sender: str = "R1111",
    receiver: str = "R1111",
    dataset: str | None = None,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    device: str = "auto",
    report: Report = ignore,
    **options: Unpack[BenchOptions],
) -> BenchResult:
    """Measure this machine with a pair of networks; R1111 ... R2222, ResNet18 and ResNet34 need no files.

    Args:
        sender: a small ResNet, which is made here, or a network that was added.
        receiver: likewise.
        dataset: None: that to which the networks were added; for small ResNets alone the embedded images.
        root: folder of the networks, and where ``profile.json`` is written with ``tune``; None: FASTSITCH_ROOT, then
            ``./fastsitch-data``.
        data_dir: folder with the files of data sets; None: ``data`` in the root.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        report: gets the measurements done.
        options: width, batch_size, precision, kernel, compile, group_sizes, resample, class_token, repeats, tune,
            peers; see :class:`fastsitch.benchmark.bench_config.BenchConfig`.

    Returns:
        All figures.

    Raises:
        ConfigError: an option that cannot work.
        NetworkError: a network that was not added.
        DataError: the data set is missing or malformed.
        FailedError: the engine fails its own check; no figure is given then.
    """
    folders = Root.at(root, data_dir)
    added = [name for name in (sender, receiver) if not NetworkName.parse(name).built_in]
    chosen = dataset or DEFAULT_DATASET if not added else chosen_dataset(folders, dataset, added)
    config = BenchConfig(sender=sender, receiver=receiver, dataset=chosen, **options)
    return run_bench(folders, config, device=device, report=report)


def measure_errors(
    run: Run,
    *,
    root: PathLike | None = None,
    data_dir: PathLike | None = None,
    activations: PathLike | None = None,
    device: str = "auto",
    report: Report = ignore,
) -> None:
    """Measure EV, ES and SV of every cell of a vanilla run, for :func:`read_errors`; what is measured is kept.

    Args:
        run: a run on the task loss.
        root: where its networks and stores lie; None: the root that the run is in.
        data_dir: folder with the files of data sets; None: ``data`` in the root.
        activations: where stores lie instead of the root.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        report: gets the units done.

    Raises:
        RunError: the run is of another kind, or has no finished unit.
        NetworkError: a network is missing.
        StoreError: a store is stale or damaged.
        DataError: the data set is missing or malformed.
        BusyError: another process measures the same run.
    """
    folders = Root.at(run.path.parents[2] if root is None else root, data_dir, activations)
    measurement.measure_errors(folders, run, device=device, report=report)


def open_run(name: str, *, dataset: str | None = None, root: PathLike | None = None) -> Run:
    """Open a run by name, for ``run.matrix("R1111", "R1112", "accuracy", setting="T2T")``.

    Args:
        name: as :func:`sweep` was given it, or as ``fastsitch list`` shows it.
        dataset: None: the one data set in the root that has a run of this name.
        root: folder of networks, stores and runs; None: FASTSITCH_ROOT, then ``./fastsitch-data``.

    Returns:
        The run, finished or not.

    Raises:
        ConfigError: none has this name, or runs on several data sets have it.
        RunError: its file is damaged.
    """
    return find_run(Root.at(root), name, dataset)


def images(
    run: Run | str,
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
    report: Report = ignore,
) -> list[Path]:
    """Stitch every sender position into the receivers' inputs, and draw what the stitches generate beside the images.

    Stitches are trained on the task loss (vanilla) and, without training, matched to the image; they are kept in the
    run, so that other test images cost no training. Networks, recipe, first seed and precision are the run's.

    Args:
        run: a run, or its name.
        senders: some of the run's; None: all.
        receivers: some of the run's; None: all.
        settings: some of the run's; None: all.
        images: indices of test images.
        count: how many test images to draw where none are named; None: 4.
        seed: of the drawn images; None: 0.
        out: folder for the figures; None: ``images`` in the run's folder.
        dataset: of the run, where it is given by name.
        root: folder of networks, stores and runs; None: that of the run, or the default.
        data_dir: folder with the files of data sets; None: ``data`` in the root.
        activations: where stores lie instead of the root.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        memory: what training may take on the device: ``auto``, or a size such as ``8GB``.
        report: gets the cells done.

    Returns:
        Paths of the PNG files; PDF and npz lie beside them.

    Raises:
        ConfigError: an option that cannot work.
        DataError: the data set is missing or malformed.
        NetworkError: a network is missing.
        RunError: networks or data are no longer those of the run.
    """
    if isinstance(run, Run) and root is None:
        root = run.path.parents[2]
    folders = Root.at(root, data_dir, activations)
    found = run if isinstance(run, Run) else find_run(folders, run, dataset)
    folder, source = output_folder(found.path / "images" if out is None else out), source_of("images", found)
    require_images_replaceable(chosen_units(found, senders, receivers, settings), folder, source)
    pairs = run_images(
        folders,
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
    return write_images(pairs, folder, source)
