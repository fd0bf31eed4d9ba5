"""Files that are either whole or absent: written aside, synced, then renamed."""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fastsitch.errors import BusyError, ConfigError

log = logging.getLogger(__name__)


def output_folder(out: str | os.PathLike[str]) -> Path:
    """The folder to write results to; raises ConfigError when a file has its name, or that of a folder above it."""
    folder = Path(out)
    # the first that exists decides: below a file nothing can be made
    place = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if place.exists() and not place.is_dir():
        where = "" if place == folder else f": {place}"
        raise ConfigError(f"--out {folder}{where} is a file: expected a folder, or a name for a new one")
    return folder


def sync_file(path: Path) -> None:
    """Flush one file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_space(path: Path) -> int:
    """Bytes free on the disk where a path is, or would be made."""
    return shutil.disk_usage(next(place for place in (path, *path.absolute().parents) if place.exists())).free


def drop_from_cache(path: Path) -> None:
    """Let the system forget a file's content, so that the next read comes from the disk; where it can do that."""
    if not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it and rename it into place.

    After a crash ``path`` is what it was before or wholly new. The temporary name is fixed, so that a later
    attempt overwrites what a killed one left behind; one that fails leaves nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        # a full disk would stay full; the error itself may be that there is no such file
        with suppress(OSError):
            partial.unlink()
        raise
    sync_file(path.parent)


def json_bytes(content: dict[str, Any]) -> bytes:
    """Indented JSON; NaN and infinities are refused, they are not JSON."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` atomically as :func:`json_bytes`."""
    text = json_bytes(content)
    write_atomically(path, lambda file: file.write(text))


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write named arrays atomically as an npz file without pickles."""
    content = BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    write_atomically(path, lambda file: file.write(content.getvalue()))


@contextmanager
def exclusive(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path``; the system releases it when the process ends, however it ends.

    When another process holds it, wait for it if ``wait`` is set, otherwise raise BusyError at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait:
                log.info("another process is at work on %s: waiting until it ends", what)
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
                return
            raise BusyError(f"another process is at work on {what} (lock {path}): wait until it ends") from None
        yield
