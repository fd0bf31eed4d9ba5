"""What lies in a root: networks, stores, runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastsitch.activations.store import ActivationStore
from fastsitch.data import DEFAULT_DATASET
from fastsitch.errors import ConfigError, FastsitchError
from fastsitch.networks.checkpoint import NetworkRecord, namesake, read_record, record_files
from fastsitch.networks.definition import read_definition
from fastsitch.networks.names import NetworkName
from fastsitch.root import Root
from fastsitch.sweep.config import checked_run_name
from fastsitch.sweep.results import Run


@dataclass(frozen=True)
class NetworkEntry:
    """A network in the root: its record, or why it cannot be used."""

    path: Path
    record: NetworkRecord | None
    problem: str


@dataclass(frozen=True)
class StoreEntry:
    """A store in the root: its description, or why it cannot be used."""

    path: Path
    store: ActivationStore | None
    problem: str


@dataclass(frozen=True)
class RunEntry:
    """A run in the root, with its units done and in all, or why it cannot be read."""

    path: Path
    run: Run | None
    done: int
    total: int
    problem: str


def networks(root: Root) -> Iterator[NetworkEntry]:
    """All trained networks, by data set and name."""
    for folder in _folders(root.path / "models"):
        for path in record_files(folder):
            try:
                yield NetworkEntry(path, read_record(folder, NetworkName.parse(path.stem)), "")
            except FastsitchError as error:
                yield NetworkEntry(path, None, str(error))


def added(root: Root) -> Iterator[tuple[str, str, str]]:
    """Added networks of which no seed is trained: name, folder of the data set, and where they come from."""
    for folder in _folders(root.path / "networks"):
        models = root.path / "models" / folder.name
        trained = {path.stem.partition("@")[0] for path in record_files(models)}
        for path in sorted(folder.glob("*.json")):
            if path.stem in trained:
                continue
            try:
                definition = read_definition(folder, path.stem)
            except FastsitchError as error:
                yield path.stem, folder.name, f"an unusable definition: {error}"
            else:
                yield path.stem, folder.name, "" if definition is None else definition.source.text


def stores(root: Root) -> Iterator[StoreEntry]:
    """All complete stores on a disk; partial ones of killed processes are not listed."""
    for folder in _folders(root.stores) if isinstance(root.stores, Path) else ():
        for path in _folders(folder):
            if path.suffix in (".partial", ".old"):
                continue
            try:
                yield StoreEntry(path, ActivationStore.open(path), "")
            except FastsitchError as error:
                yield StoreEntry(path, None, str(error))


def runs(root: Root) -> Iterator[RunEntry]:
    """All runs, by data set and name."""
    for folder in _folders(root.path / "runs"):
        for path in _folders(folder):
            if not (path / "run.json").is_file():
                continue
            try:
                run = Run.open(path)
            except FastsitchError as error:
                yield RunEntry(path, None, 0, 0, str(error))
                continue
            done = sum(run.done(planned.unit) for planned in run.units)
            yield RunEntry(path, run, done, len(run.units), "")


def find_run(root: Root, name: str, dataset: str | None = None) -> Run:
    """The run of this name; raises ConfigError when none has it or several data sets have one."""
    checked_run_name(name)
    if dataset is not None:
        return Run.open(root.run(dataset, name))
    found = [folder / name for folder in _folders(root.path / "runs") if (folder / name / "run.json").is_file()]
    if len(found) > 1:
        raise ConfigError(
            f"several data sets have a run {name!r}: choose one with --dataset: "
            + ", ".join(Run.open(path).config.dataset for path in found)
        )
    if not found:
        known = [entry.path.name for entry in runs(root)]
        raise ConfigError(f"no run {name!r} in {root.path / 'runs'}: found {', '.join(known) or 'none'}")
    return Run.open(found[0])


def infer_dataset(root: Root, names: list[str]) -> str:
    """The one data set in the root that has all the named networks (controls count by their namesake).

    The default data set when the root has no network at all; raises ConfigError listing the choices when several
    have them or none has.
    """
    wanted = [NetworkName.parse(name) for name in names]
    folders = [folder for folder in _folders(root.path / "models") if record_files(folder)]
    if not folders:
        return DEFAULT_DATASET
    fitting = [folder for folder in folders if all(_record(folder, name) is not None for name in wanted)]
    if len(fitting) == 1:
        return _dataset_of(fitting[0])
    if len(folders) == 1:
        return _dataset_of(folders[0])
    have = "several data sets have" if fitting else "no single data set has"
    raise ConfigError(
        f"{have} {', '.join(map(str, wanted)) or 'these networks'}: choose one with --dataset: "
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
