"""What lies in a root: networks, stores, runs."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from fastsitch.activations.store import ActivationStore
from fastsitch.chains.trace import first_line
from fastsitch.data import canonical_dataset, dataset_of_folder, whole_dataset
from fastsitch.errors import ConfigError, FastsitchError, argument, plain
from fastsitch.folders import Folder
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import NetworkRecord, namesake, read_record, record_files
from fastsitch.networks.network_definition import defined_for, read_definition
from fastsitch.root import Root
from fastsitch.runs.run import Run
from fastsitch.runs.sweep_config import checked_run_name
from fastsitch.vocabulary import DEFAULT_DATASET

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NetworkEntry:
    """A network in the root: its record, or why it cannot be used."""

    path: Path
    dataset: str
    """As options name it; where nothing in the root tells, the name of its folder."""
    record: NetworkRecord | None
    problem: str


@dataclass(frozen=True)
class StoreEntry:
    """A store in the root: its description, or why it cannot be used."""

    path: Folder
    dataset: str
    store: ActivationStore | None
    problem: str


@dataclass(frozen=True)
class RunEntry:
    """A run in the root, with its units done and in all, or why it cannot be read."""

    path: Path
    dataset: str
    run: Run | None
    done: int
    total: int
    problem: str


def networks(root: Root) -> Iterator[NetworkEntry]:
    """All trained networks, by data set and name."""
    for folder in _folders(root.path / "models"):
        for path in record_files(folder):
            record, problem = _read(partial(_saved_record, folder, path.stem))
            yield NetworkEntry(path, _dataset_name(root, folder.name), record, problem)


def added(root: Root) -> Iterator[tuple[str, str, str]]:
    """Added networks of which no seed is trained: name, data set, and where they come from."""
    for folder in _folders(root.path / "networks"):
        models = root.path / "models" / folder.name
        trained = {path.stem.partition("@")[0] for path in record_files(models)}
        for path in sorted(folder.glob("*.json")):
            if path.stem in trained:
                continue
            definition, problem = _read(partial(read_definition, folder, path.stem))
            unusable = f"an unusable definition: {problem}"
            dataset = _dataset_name(root, folder.name)
            yield path.stem, dataset, unusable if definition is None else definition.source.text


def stores(root: Root) -> Iterator[StoreEntry]:
    """All complete stores on a disk; partial ones of killed processes are not listed."""
    for folder in root.stores.folders():
        for path in folder.folders():
            store, problem = _read(partial(ActivationStore.open, path))
            dataset = _dataset_name(root, folder.name) if store is None else store.identity.dataset
            yield StoreEntry(path, dataset, store, problem)


def runs(root: Root) -> Iterator[RunEntry]:
    """All runs, by data set and name."""
    for folder in _folders(root.path / "runs"):
        for path in _folders(folder):
            if not (path / "run.json").is_file():
                continue
            found, problem = _read(partial(_counted, path))
            run, done, total = found or (None, 0, 0)
            yield RunEntry(path, _dataset_name(root, folder.name), run, done, total, problem)


def _saved_record(folder: Path, name: str) -> NetworkRecord | None:
    return read_record(folder, NetworkName.parse(name))


def _counted(path: Path) -> tuple[Run, int, int]:
    """A run with its units done and in all."""
    run = Run.open(path)
    return run, sum(run.done(unit) for unit in run.units), len(run.units)


def _read(read: Callable[[], T]) -> tuple[T | None, str]:
    """What was read, or why it cannot be: one bad entry must not hide all others."""
    try:
        return read(), ""
    except FastsitchError as error:
        return None, str(error)
    # whatever a foreign file or folder of that name makes of it
    except Exception as error:
        return None, f"cannot be read ({first_line(error)})"


def _dataset_name(root: Root, folder: str) -> str:
    """The data set behind a folder's name, as options name it; the folder's name where nothing in the root tells."""
    known = dataset_of_folder(folder)
    if known is not None:
        return known
    networks = root.path / "networks" / folder
    for path in networks.glob("*.json"):
        dataset, _ = _read(partial(defined_for, networks, path.stem))
        if dataset:
            return dataset
    for path in record_files(root.path / "models" / folder):
        record, _ = _read(partial(_saved_record, path.parent, path.stem))
        if record is not None:
            return record.dataset
    for path in _folders(root.path / "runs" / folder):
        run, _ = _read(partial(Run.open, path))
        if run is not None:
            return run.config.dataset
    return folder


def find_run(root: Root, name: str, dataset: str | None = None) -> Run:
    """The run of this name; raises ConfigError when none has it or several data sets have one."""
    checked_run_name(name, f"run {plain(name)!r}")
    if dataset is not None:
        folder = root.runs(dataset)
        if not (folder / name / "run.json").exists():
            known = [path.parent.name for path in sorted(folder.glob("*/run.json"))]
            raise ConfigError(
                f"no run {name!r} of {argument('dataset', dataset)} in {folder}: found {', '.join(known) or 'none'}"
            )
        return _opened(folder / name)
    found = [folder / name for folder in _folders(root.path / "runs") if (folder / name / "run.json").is_file()]
    if len(found) > 1:
        raise ConfigError(
            f"several data sets have a run {name!r}: choose one with {argument('dataset')}: "
            + ", ".join(Run.open(path).config.dataset for path in found)
        )
    if not found:
        known = [entry.path.name for entry in runs(root)]
        raise ConfigError(f"no run {name!r} in {root.path / 'runs'}: found {', '.join(known) or 'none'}")
    return _opened(found[0])


def _opened(path: Path) -> Run:
    """A run; that nothing vouches for one of version 0.1 is said, once per command."""
    run = Run.open(path)
    if not run.record.hashed:
        log.warning(
            "run %s was made by version 0.1: run.json has no hash, and its units do not record what they depend on, so "
            "that what was altered since is not noticed",
            run.name,
        )
    return run


def chosen_dataset(root: Root, dataset: str | None, names: list[str]) -> str:
    """The data set that is named or, without a name, the one in the root that has these networks.

    ``@train=N@test=N`` alone is a subset of that one. Raises DataError, or what :func:`infer_dataset` raises.
    """
    if dataset and not dataset.startswith("@"):
        return canonical_dataset(dataset)
    return canonical_dataset(infer_dataset(root, names, subset=bool(dataset)) + (dataset or ""))


def infer_dataset(root: Root, names: list[str], *, subset: bool = False) -> str:
    """The one data set in the root that has all the named networks (controls count by their namesake).

    For a ``subset`` it is a whole one. The default data set when the root has no network at all; raises ConfigError
    listing the choices when several have them or none has.
    """
    wanted = [NetworkName.parse(name) for name in names]
    folders = [folder for folder in _folders(root.path / "models") if record_files(folder)]
    if not folders:
        return DEFAULT_DATASET
    fitting = [folder for folder in folders if all(_record(folder, name) is not None for name in wanted)]
    if subset:
        wholes = {whole_dataset(_dataset_of(folder)) for folder in (fitting or folders)}
        if len(wholes) == 1:
            return wholes.pop()
    if len(fitting) == 1:
        return _dataset_of(fitting[0])
    if len(folders) == 1:
        return _dataset_of(folders[0])
    have = "several data sets have" if fitting else "no single data set has"
    raise ConfigError(
        f"{have} {', '.join(map(str, wanted)) or 'these networks'}: choose one with {argument('dataset')}: "
        f"{', '.join(sorted(map(_dataset_of, fitting or folders)))}"
    )


def _record(folder: Path, name: NetworkName) -> NetworkRecord | None:
    return namesake(folder, name) if name.random else read_record(folder, name)


def _dataset_of(folder: Path) -> str:
    """The data set whose networks a folder holds, from the first record that can be read."""
    problem: FastsitchError | None = None
    for path in record_files(folder):
        try:
            record = read_record(folder, NetworkName.parse(path.stem))
        except FastsitchError as error:
            problem = problem or error
        else:
            if record is not None:
                return record.dataset
    raise problem or ConfigError(f"{folder} has no network")


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
