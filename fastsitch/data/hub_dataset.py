"""Data sets of the Hugging Face hub, and folders of parquet files, through the library ``datasets``.

Nothing of a data set's repository is executed: the library refuses scripts, and only readers of files that cannot hold
code are used.
"""

import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from fastsitch.data.dataset_name import DatasetName
from fastsitch.errors import DataError, plain

log = logging.getLogger(__name__)

_READERS = ("parquet", "arrow", "imagefolder", "cache")
"""Of the library; others read pickles, or no images. ``cache`` is what these have prepared before."""

_SHARD = re.compile(r"(.*)-[0-9]{5}-of-([0-9]{5})(-[0-9a-f]+)?\.parquet")

_PATIENCE = 15
"""Seconds until the hub counts as out of reach."""

Tables = dict[str, Any]
"""A ``datasets.Dataset`` for every split."""


def is_here(name: DatasetName) -> bool:
    """Whether a data set can be read without a network; a folder, whether it is there."""
    if name.path is not None:
        return name.path.is_dir()
    try:
        _require_library()
        with _quiet(), offline():
            _builder(name, "it was not asked")
    except DataError:
        return False
    return True


@contextmanager
def offline() -> Iterator[None]:
    """The library asks no server, as with HF_HUB_OFFLINE."""
    _require_library()
    from datasets import config

    online = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = online


def read_tables(name: DatasetName) -> Tables:
    """The tables of a data set, mapped into memory from the library's cache; prepared there, or downloaded, if need be.

    Raises DataError where it is neither here nor to be had, or cannot be read.
    """
    _require_library()
    if name.path is not None and not name.path.is_dir():
        problem = "is no folder" if name.path.exists() else "does not exist"
        raise DataError(f"{name.path} {problem}: expected a folder with parquet files such as train-*.parquet")
    with _quiet():
        out_of_reach = _out_of_reach() if name.path is None else ""
        # it would try again and again
        with offline() if out_of_reach else nullcontext():
            builder = _builder(name, out_of_reach)
            _require_readable(name, builder)
            try:
                builder.download_and_prepare()
                tables: Tables = dict(builder.as_dataset())
            # the errors of several libraries, for files, formats and transfers
            except Exception as error:
                raise DataError(f"{name.source} cannot be read: {_brief(error)}") from None
    if name.config is None and builder.config.name != "default":
        log.info("%s: config %s is taken", name.source, builder.config.name)
    return tables


def _require_library() -> None:
    try:
        import datasets
    except ImportError:
        raise DataError("data sets hf:NAME need the library datasets: pip install 'fastsitch[hf]'") from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise DataError(
            f"data sets hf:NAME need the library datasets from version 4 on, which runs no scripts; found "
            f"{datasets.__version__}: pip install -U 'fastsitch[hf]'"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries neither log nor, except on a terminal, show bars."""
    import datasets

    loggers = {logger: logger.level for logger in map(logging.getLogger, ("datasets", "huggingface_hub"))}
    bars = not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    if bars and not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _out_of_reach() -> str:
    """Why the hub cannot be asked; empty if it can."""
    import datasets
    from huggingface_hub import constants, get_session

    if datasets.config.HF_HUB_OFFLINE or constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    # the errors of several libraries, for transfers
    except Exception as error:
        return f"{constants.ENDPOINT} cannot be reached, {_brief(error)}"
    return ""


def _builder(name: DatasetName, out_of_reach: str) -> Any:
    """The library's builder of a folder, the hub's newest version, what is prepared, or what the hub's cache has."""
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as readers
    from huggingface_hub import constants

    if name.called in readers:
        raise DataError(f"{name.source} is a kind of file: expected hf:ORG/NAME of the hub, or hf:/DIR")
    if name.called is not None and Path(name.called).exists():
        # the library would take it
        raise DataError(
            f"{name.source}: there is a folder of that name here; write hf:./{name.called} to take it, else go to "
            "another folder"
        )
    place: Any = name.path or name.called
    try:
        return datasets.load_dataset_builder(str(place), name.config)
    # the errors of several libraries, for files, formats and transfers
    except Exception as error:
        problem = error
    # of what the hub itself says the newest version is known
    nowhere = name.called is not None and (out_of_reach != "" or not isinstance(problem, ValueError))
    snapshot = _snapshot(str(name.called)) if nowhere else None
    if snapshot is not None:
        log.info("%s is taken from %s (%s)", name.source, snapshot, out_of_reach or _brief(problem))
        place = snapshot
        try:
            return datasets.load_dataset_builder(str(place), name.config)
        except Exception as error:
            problem = error
    if isinstance(problem, ValueError):
        _require_config(name, str(place))
    elif name.called is not None and snapshot is None:
        raise DataError(
            f"{name.source} is neither in {datasets.config.HF_DATASETS_CACHE} nor in {constants.HF_HUB_CACHE}, and the "
            f"hub does not give it ({out_of_reach or _brief(problem)}): set HF_HOME to a cache that has it, or "
            + ("run this once where the hub can be asked" if out_of_reach else "look for its name there")
        )
    raise DataError(f"{name.source} cannot be read: {_brief(problem)}")


def _snapshot(called: str) -> Path | None:
    """The folder of the newest version in the hub's own cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(called, repo_type="dataset", local_files_only=True))
    # whatever is wrong with it, it is not there
    except Exception as error:
        log.debug("%s is not in the cache of the hub: %s", called, error)
        return None


def _require_config(name: DatasetName, place: str) -> None:
    """Raise DataError, listing the configs, where one has to be chosen, or the chosen one does not exist."""
    import datasets

    try:
        known = datasets.get_dataset_config_names(place)
    except Exception as error:
        log.debug("%s does not tell its configs: %s", place, error)
        return
    listed = plain(", ".join(known))
    if name.config is None and len(known) > 1:
        raise DataError(f"{name.source} has the configs {listed}: choose one, such as {name.source}:{known[0]}")
    if name.config is not None and name.config not in known:
        raise DataError(f"{name.source} is unknown: expected one of the configs {listed}")


def _require_readable(name: DatasetName, builder: Any) -> None:
    """Say what is about to be downloaded or converted; raises DataError for files that lack, or that are not read."""
    import datasets

    *_, kind, _ = type(builder).__module__.split(".")
    if not type(builder).__module__.startswith("datasets.packaged_modules.") or kind not in _READERS:
        raise DataError(f"{name.source} is made of {plain(kind)} files: expected parquet or arrow files, or images")
    files = [file for split in (builder.config.data_files or {}).values() for file in split]
    _require_all_shards(files)
    if kind == "parquet" and builder.repo_id is None:
        _require_one_order(name, [file for file in map(Path, files) if file.suffix == ".parquet"])
    if Path(builder.cache_dir, datasets.config.DATASET_INFO_FILENAME).is_file():
        return
    if builder.repo_id is None:
        for file in map(Path, files):
            _require_file(name, file, Path(builder.base_path))
        log.info("%s is converted to Arrow files in %s", name.source, builder.cache_dir)
    else:
        size = builder.info.download_size
        stated = f"{size / 1e6:.0f} MB" if size else "of unknown size"
        log.info("downloads %s (%s) to %s", name.source, stated, datasets.config.HF_DATASETS_CACHE)


def _require_all_shards(files: list[str]) -> None:
    found: Counter[tuple[str, str, str]] = Counter()
    for file in files:
        if match := _SHARD.fullmatch(file):
            found[match[1], match[2], match[3] or ""] += 1
    for (start, count, _), there in found.items():
        if there < int(count):
            raise DataError(f"{start}-*-of-{count}.parquet: found {there} of {int(count)} files; download it again")


def _require_one_order(name: DatasetName, files: Sequence[Path]) -> None:
    """Raise DataError where files number the same classes otherwise: the library reads all as it does the first."""
    first: dict[str, tuple[Path, list[str]]] = {}
    for file in files:
        for column, classes in _stated_classes(file).items():
            other, names = first.setdefault(column, (file, classes))
            if names != classes:
                raise DataError(
                    f"{name.source}: column {plain(column)} has the classes {_classes(names)} in {other.name}, "
                    f"{_classes(classes)} in {file.name}: expected one order of classes in all files"
                )


def _stated_classes(file: Path) -> dict[str, list[str]]:
    """The classes of each column that is a ClassLabel, as the library wrote them into a parquet file."""
    from pyarrow import parquet

    # a file that cannot be read is refused by its name where it is converted
    with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        stated = json.loads((parquet.read_schema(file).metadata or {})[b"huggingface"])
        features = stated["info"]["features"].items()
        return {column: list(each["names"]) for column, each in features if each.get("_type") == "ClassLabel"}
    return {}


def _classes(names: Sequence[str]) -> str:
    return plain(", ".join(names[:6]) + (", ..." if len(names) > 6 else ""))


def _require_file(name: DatasetName, file: Path, folder: Path) -> None:
    """Raise DataError for a file outside of the folder, which its card may name, and for one that is no parquet."""
    import pyarrow
    from pyarrow import parquet

    if not any(file.is_relative_to(inside) for inside in (folder, folder.resolve())):
        raise DataError(f"{name.source} names {plain(str(file))}: expected files in the folder alone")
    if file.suffix != ".parquet":
        return
    try:
        parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as parquet ({_brief(error)})") from None


def _brief(error: BaseException) -> str:
    """In one line; of an error while files are converted, its cause."""
    import datasets

    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return plain(" ".join(f"{type(error).__name__}: {error}".split()))
