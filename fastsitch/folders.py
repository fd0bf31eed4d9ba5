"""A folder of files, on a disk or in a bucket: what activation stores are written to and read from.

:class:`LocalFolder` is a folder on a disk, :class:`fastsitch.bucket_folder.BucketFolder` a prefix in an object store.
"""

import os
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastsitch.files import (
    PARTIAL,
    drop_from_cache,
    naming,
    nearest_existing,
    process_name,
    remove_leftovers,
    sync_file,
    write_atomically,
)

STORES = "activations"
"""The folder of activation stores in a root."""

MANIFEST = "manifest.json"
"""The file of a store that is written last and removed first: without it the store does not exist."""

_REPLACED = ".old"

_SCRATCH = ".fastsitch-scratch-"


class Folder(ABC):
    """A folder whose files have names relative to it, such as ``train/0/0.0.0.0``.

    Hashable, can be pickled, and prints as a user would name it.
    """

    listable: ClassVar[bool]
    """Whether :meth:`folders` finds what is there."""
    zarr_settings: ClassVar[Mapping[str, Any]]
    """Zarr's configuration while it opens an array here that is to be read or written quickly."""

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def __truediv__(self, name: str) -> "Folder":
        """The folder of this name in it; in error messages also the file."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def parent(self) -> "Folder": ...

    @abstractmethod
    def absolute(self) -> "Folder":
        """The same folder for processes with another working directory."""

    @abstractmethod
    def reached(self) -> "Folder":
        """The same folder; raises ConfigError where there is no way to it."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is a store of this name; one that is still being written is not there yet."""

    @abstractmethod
    def folders(self) -> list["Folder"]:
        """The folders in it, by name, without those that are being written or replaced."""

    def sizes(self) -> dict[str, int]:
        """The size of every file, in the order of a walk through the folders."""
        sizes = self._sizes()
        return {name: sizes[name] for name in sorted(sizes, key=lambda name: name.split("/"))}

    @abstractmethod
    def _sizes(self) -> dict[str, int]: ...

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole file; raises FileNotFoundError."""

    @abstractmethod
    def tails(self, sizes: Mapping[str, int], count: int) -> dict[str, bytes]:
        """The last ``count`` bytes of files of these sizes; raises FileNotFoundError."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a file: afterwards it is there wholly, or as before."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def clear(self) -> None:
        """Remove everything, if there is anything."""

    @abstractmethod
    def flush(self) -> None:
        """Make sure that what was written survives a crash of the machine."""

    @abstractmethod
    def replacing(self) -> AbstractContextManager["Folder"]:
        """A folder to write to, whose content is that of this one once the block ends without an error.

        What an earlier, killed attempt left behind is removed first, what this one wrote when it fails: a full disk
        must not stay full. The caller holds the lock.
        """

    @abstractmethod
    def zarr_store(self, *, reading: bool) -> Any:
        """What Zarr opens: for ``reading`` a store that is known to be complete, otherwise one to be written."""

    @abstractmethod
    def translating_errors(self) -> AbstractContextManager[None]:
        """Turns errors of the library that reaches the folder into those of fastsitch, also while Zarr works on it."""

    @property
    @abstractmethod
    def lock_file(self) -> Path:
        """The file on a disk that is locked by whoever writes to this folder."""

    @property
    @abstractmethod
    def disk(self) -> Path | None:
        """Where on a disk its content takes space; None where it takes none."""

    @abstractmethod
    def disk_needed(self, size: int) -> int:
        """Bytes of disk that it still takes to have a store of this size here."""

    @abstractmethod
    def forget(self, name: str) -> None:
        """Let the system drop what it keeps in memory of a file, so that the next read comes from where it lies."""

    def reading_rate(self, size: int) -> float:
        """Bytes per second of reading a scratch file of this size, here or in the nearest parent that exists."""
        folder, name = self._scratch(), f"{_SCRATCH}{process_name()}"
        if folder.disk is not None:
            for suffix in ("", PARTIAL):
                remove_leftovers(folder.disk, _SCRATCH, suffix)
        try:
            folder.write(name, os.urandom(size))
            folder.forget(name)
            begun = time.perf_counter()
            folder.read(name)
            return size / (time.perf_counter() - begun)
        finally:
            folder.remove(name)

    @abstractmethod
    def _scratch(self) -> "Folder": ...

    @property
    @abstractmethod
    def root_of_stores(self) -> Path | None:
        """Of the folder of all stores: the root that it belongs to, or None where it does not show that."""

    @property
    @abstractmethod
    def activations_option(self) -> str | None:
        """Of the folder of all stores: the value of ``--activations`` that names it; None where the root is enough."""


@dataclass(frozen=True)
class LocalFolder(Folder):
    """A folder on a disk. It is written beside its name, and gets it by one rename."""

    path: Path

    listable = True
    # several times faster than zarr's own pipeline
    zarr_settings: ClassVar[Mapping[str, Any]] = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> "LocalFolder":
        return LocalFolder(self.path / name)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> "LocalFolder":
        return LocalFolder(self.path.parent)

    def absolute(self) -> "LocalFolder":
        return LocalFolder(self.path.absolute())

    def reached(self) -> "LocalFolder":
        return self

    def exists(self) -> bool:
        return self.path.exists()

    def folders(self) -> list[Folder]:
        if not self.path.is_dir():
            return []
        paths = sorted(path for path in self.path.iterdir() if path.is_dir())
        return [LocalFolder(path) for path in paths if path.suffix not in (PARTIAL, _REPLACED)]

    def _sizes(self) -> dict[str, int]:
        return _file_sizes(self.path)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def tails(self, sizes: Mapping[str, int], count: int) -> dict[str, bytes]:
        return {name: self._tail(name, size - count) for name, size in sizes.items()}

    def _tail(self, name: str, start: int) -> bytes:
        with (self.path / name).open("rb") as file:
            file.seek(start)
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        write_atomically(self.path / name, lambda file: file.write(content))

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def clear(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def flush(self) -> None:
        for path in sorted(self.path.rglob("*")):
            sync_file(path)

    @contextmanager
    def replacing(self) -> Iterator["LocalFolder"]:
        partial, replaced = self._partial, self._beside(_REPLACED)
        partial.clear()
        replaced.clear()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with naming(self.path):
                yield partial
        except BaseException:
            partial.clear()
            raise
        if self.path.exists():
            self.path.rename(replaced.path)
        partial.path.rename(self.path)
        sync_file(self.path.parent)
        replaced.clear()

    @property
    def _partial(self) -> "LocalFolder":
        return self._beside(PARTIAL)

    def _beside(self, suffix: str) -> "LocalFolder":
        return LocalFolder(self.path.with_name(self.path.name + suffix))

    def zarr_store(self, *, reading: bool) -> Path:
        return self.path

    @contextmanager
    def translating_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # those of the system in the words of the codec pipeline
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(self)) from error

    @property
    def lock_file(self) -> Path:
        return self._beside(".lock").path

    @property
    def disk(self) -> Path:
        return self.path

    def disk_needed(self, size: int) -> int:
        """Nothing where there is a store; the next attempt removes first what a killed one left behind."""
        return 0 if self.exists() else max(0, size - sum(_file_sizes(self._partial.path).values()))

    def forget(self, name: str) -> None:
        drop_from_cache(self.path / name)

    def _scratch(self) -> "LocalFolder":
        return LocalFolder(nearest_existing(self.path))

    @property
    def root_of_stores(self) -> Path | None:
        return self.path.parent if self.path.name == STORES and (self.path.parent / "models").is_dir() else None

    @property
    def activations_option(self) -> str | None:
        return None if self.root_of_stores is not None else str(self)


FolderLike = Folder | str | os.PathLike[str]
"""A folder, or the path of one on a disk."""


def as_folder(folder: FolderLike) -> Folder:
    """The folder itself, or the one on a disk that has this path."""
    return folder if isinstance(folder, Folder) else LocalFolder(Path(folder))


def _file_sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
