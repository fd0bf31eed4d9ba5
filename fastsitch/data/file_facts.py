"""What a look at the files of a folder said, remembered: the next command need not open them again."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsitch.checked_files import DamagedFile, read_npz, require_arrays
from fastsitch.data.table_rows import ImageFile
from fastsitch.errors import ConfigError, DataError
from fastsitch.files import write_npz
from fastsitch.identity import stable_hash

log = logging.getLogger(__name__)

_WORTH = 1000
"""Folders of fewer files are looked at as quickly as their facts are read."""

_SETTLED = 2.0
"""Seconds after which a file that changes has another time of modification, on every file system."""

_TRANSPARENT, _MOVING, _HASHED = 1, 2, 4


@dataclass(frozen=True)
class FileFacts:
    """What is known of an image without decoding it: its upright size, and whether it has alpha or several frames."""

    height: int
    width: int
    transparent: bool = False
    moving: bool = False
    digest: bytes = b""
    """sha256 of the file's bytes; empty until somebody asked for it."""


class FolderFacts:
    """Facts of the files of one folder, or rows of one table, as long as sizes and times of modification are the same.

    They are kept in a file in ``data_dir``, if the folder has a thousand files, and that can be written to; damaged or
    missing ones are found anew.
    """

    def __init__(self, folder: Path, data_dir: Path) -> None:
        self._folder = folder
        self._path = data_dir / "scans" / f"{stable_hash(str(folder))[:16]}.npz"
        self._known: dict[str, tuple[int, int, FileFacts]] = _read(self._path)
        self._found: dict[str, tuple[int, int, FileFacts]] = {}
        self._changed = False

    def of(self, file: ImageFile, look: Callable[[ImageFile], FileFacts]) -> FileFacts:
        """The facts of a file, by ``look`` where they are not known."""
        return self._get(file, look)

    def digests(self, files: Iterable[ImageFile], look: Callable[[ImageFile], FileFacts]) -> list[bytes]:
        """sha256 of the bytes of files; raises DataError for one that cannot be read."""
        found = []
        for file in files:
            facts = self._get(file, look)
            if not facts.digest:
                facts = replace(facts, digest=_digest(file))
                size, modified, _ = self._found[self._name(file)]
                self._found[self._name(file)] = (size, modified, facts)
                self._changed = True
            found.append(facts.digest)
        return found

    def state(self, files: Iterable[ImageFile]) -> str | None:
        """Hash over names, sizes and times of modification of files that were looked at; None: some still change."""
        found = [(name, *self._found[name][:2]) for name in map(self._name, files)]
        settled = _settled()
        return None if any(modified >= settled for _, _, modified in found) else stable_hash(found)

    def save(self) -> None:
        """Keep what was found, beside what is known of other files of the folder."""
        if not self._changed or len(self._found) < _WORTH:
            return
        settled = _settled()
        entries = {**self._known, **self._found}
        entries = {name: entry for name, entry in entries.items() if entry[1] < settled}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_npz(self._path, _arrays(entries))
        except (OSError, ConfigError) as error:
            log.debug("%s cannot be written: %s", self._path, error)

    def _get(self, file: ImageFile, look: Callable[[ImageFile], FileFacts]) -> FileFacts:
        name = self._name(file)
        if name in self._found:
            return self._found[name][2]
        try:
            status = file.stat()
        except OSError as error:
            raise DataError(f"cannot read {file} ({error.strerror})") from None
        size, modified = status.st_size, status.st_mtime_ns
        known = self._known.get(name)
        if known is None or known[:2] != (size, modified):
            known = (size, modified, look(file))
            self._changed = True
        self._found[name] = known
        return known[2]

    def _name(self, file: ImageFile) -> str:
        return str(file)[len(str(self._folder)) + 1 :]


def _settled() -> int:
    """Times of modification, in nanoseconds, before which a file that changes now has another one."""
    return time.time_ns() - int(_SETTLED * 1e9)


def _digest(file: ImageFile) -> bytes:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError as error:
        raise DataError(f"cannot read {file} ({error.strerror})") from None


def _arrays(entries: dict[str, tuple[int, int, FileFacts]]) -> dict[str, NDArray[Any]]:
    facts = [entry[2] for entry in entries.values()]
    names = b"\0".join(os.fsencode(name) for name in entries)
    flags = [_TRANSPARENT * one.transparent + _MOVING * one.moving + _HASHED * (one.digest != b"") for one in facts]
    digests = b"".join(one.digest or bytes(32) for one in facts)
    arrays: dict[str, NDArray[Any]] = {
        "names": np.frombuffer(names, np.uint8),
        "files": np.array([entry[:2] for entry in entries.values()], np.int64).reshape(-1, 2),
        "sizes": np.array([(one.height, one.width) for one in facts], np.int64).reshape(-1, 2),
        "flags": np.array(flags, np.uint8),
        "digests": np.frombuffer(digests, np.uint8).reshape(-1, 32),
    }
    return {**arrays, "hash": np.frombuffer(_hash(arrays), np.uint8)}


def _hash(arrays: dict[str, NDArray[Any]]) -> bytes:
    digest = hashlib.sha256()
    for name in ("names", "files", "sizes", "flags", "digests"):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.digest()


def _read(path: Path) -> dict[str, tuple[int, int, FileFacts]]:
    try:
        arrays = read_npz(path)
        count = len(arrays["flags"])
        require_arrays(
            arrays,
            {
                "files": ("i", (count, 2)),
                "sizes": ("i", (count, 2)),
                "flags": ("u", (count,)),
                "digests": ("u", (count, 32)),
                "hash": ("u", (32,)),
            },
        )
        if arrays["hash"].tobytes() != _hash(arrays):
            raise DamagedFile("it was altered")
        names = [os.fsdecode(name) for name in arrays["names"].tobytes().split(b"\0")] if count else []
    except FileNotFoundError:
        return {}
    except (DamagedFile, KeyError) as error:
        log.debug("%s is not used: %s", path, error)
        return {}
    rows = zip(arrays["files"].tolist(), arrays["sizes"].tolist(), arrays["flags"].tolist(), strict=True)
    digests = arrays["digests"].tobytes()
    known = {}
    for k, (name, ((size, modified), (height, width), flags)) in enumerate(zip(names, rows, strict=True)):
        digest = digests[32 * k : 32 * (k + 1)] if flags & _HASHED else b""
        known[name] = (
            size,
            modified,
            FileFacts(height, width, bool(flags & _TRANSPARENT), bool(flags & _MOVING), digest),
        )
    return known
