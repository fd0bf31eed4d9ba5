"""Files that are either whole or absent: written aside, synced, then renamed."""

import errno
import glob
import json
import logging
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from fastsitch.errors import BusyError, ConfigError, argument, plain

log = logging.getLogger(__name__)

PARTIAL = ".partial"
"""The end of the name of a file that is being written."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|file:")

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
"""As shells know them; those that are set are replaced before it is looked for."""

_LONGEST_COMMENT = 65_535
"""Of a zip archive."""


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path as a user gave it, with ``~`` and variables such as ``$HOME`` in it replaced, as a shell does."""
    replaced = Path(os.path.expandvars(path))
    try:
        return replaced.expanduser()
    except RuntimeError:
        raise ConfigError(f"{replaced}: there is no user of that name; expected ~/ for your own folder") from None


def output_folder(out: str | os.PathLike[str]) -> Path:
    """The folder to write results to; raises ConfigError where it cannot be one, or nothing can be written there."""
    folder = usable_folder("out", out)
    existing = nearest_existing(folder)
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ConfigError(
            f"cannot use {argument('out', folder)} ({os.strerror(errno.EACCES)}): expected a folder that can be written"
        )
    return folder


def usable_folder(option: str, given: str | os.PathLike[str]) -> Path:
    """The folder that an argument names, which may not exist yet.

    Raises ConfigError when the name is blank, an address, or has a variable in it that is not set, and when a file has
    its name, or that of a folder above it.
    """
    folder = output_path(option, given, "folder")
    # no folder can be made below a file
    existing = next((path for path in (folder, *folder.parents) if _there(path)), folder)
    if _there(existing) and not existing.is_dir():
        where = "" if existing == folder else f": {existing}"
        raise ConfigError(f"{argument(option, folder)}{where} is a file: expected a folder, or a name for a new one")
    return folder


def output_path(option: str, given: str | os.PathLike[str], kind: str) -> Path:
    """The path on this machine that an argument names; ConfigError where it is blank, an address, or not known."""
    if not os.fspath(given).strip():
        raise ConfigError(f"{argument(option)} is empty: expected the name of a {kind}")
    if _ADDRESS.match(os.fspath(given)):
        raise ConfigError(f"{argument(option, given)} is an address: expected a {kind} on this machine")
    path = expanded(given)
    unset = _VARIABLE.search(str(path))
    if unset:
        raise ConfigError(f"{argument(option, given)}: {plain(unset[0])} is not set; expected the name of a {kind}")
    return path


def _there(path: Path) -> bool:
    try:
        return path.exists()
    # such as a name that is too long
    except OSError as error:
        raise ConfigError(f"cannot use {path} ({error.strerror}): expected the name of a folder") from None


def sync_file(path: Path) -> None:
    """Flush one file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def nearest_existing(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def free_space(path: Path) -> int:
    """Bytes free on the disk where a path is, or would be made."""
    return shutil.disk_usage(nearest_existing(path)).free


def drop_from_cache(path: Path) -> None:
    """Ask the system to drop a file from its cache, so that the next read comes from the disk; not all systems can."""
    if not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it and rename it to ``path``.

    After a crash ``path`` is what it was before or wholly new. Every process has a temporary name of its own; what a
    killed one left behind on this machine is removed by the next. One that fails leaves nothing. Raises ConfigError
    where something else than a file has the name, such as a device.
    """
    require_regular(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f"{glob.escape(path.name)}.", PARTIAL)
    partial = path.with_name(f"{path.name}.{process_name()}{PARTIAL}")
    try:
        with naming(path):
            _write_aside(partial, write)
            partial.replace(path)
    except BaseException:
        # a full disk would stay full; the error itself may be that there is no such file
        with suppress(OSError):
            partial.unlink()
        raise
    sync_file(path.parent)


def _write_aside(partial: Path, write: Callable[[IO[bytes]], object]) -> None:
    # neither through a link, nor into what somebody else has put there
    partial.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(partial, flags, 0o666), "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of the system that name no file, as that of a full disk, the name of what was written."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def process_name() -> str:
    """This machine and process, as part of the name of a temporary file."""
    return f"{_host()}-{os.getpid()}"


def remove_leftovers(folder: Path, prefix: str, suffix: str = "") -> None:
    """Remove temporary files ``PREFIX PROCESS SUFFIX`` of processes of this machine that have ended; a glob pattern."""
    for left in folder.glob(f"{prefix}{_host()}-*{suffix}"):
        if not _runs(left.name.removesuffix(suffix).rpartition("-")[2]):
            left.unlink(missing_ok=True)


def _host() -> str:
    return "".join(filter(str.isalnum, socket.gethostname()))


def require_regular(path: Path) -> None:
    """Raise ConfigError where something else than a file has the name of an output, such as a folder or a device."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no regular file: expected a file, or a name for a new one")


def _runs(process: str) -> bool:
    """Whether a process with this number runs on this machine; anything else than a number is taken for one."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        return True
    return True


def json_bytes(content: dict[str, Any]) -> bytes:
    """Indented JSON; NaN and infinities are refused, they are not JSON."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` atomically as :func:`json_bytes`."""
    text = json_bytes(content)
    write_atomically(path, lambda file: file.write(text))


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]], comment: str = "") -> None:
    """Write named arrays atomically as an npz file without pickles; ``comment`` is that of the zip archive."""
    content = BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    if comment:
        with zipfile.ZipFile(content, "a") as archive:
            archive.comment = comment.encode()[:_LONGEST_COMMENT]
    write_atomically(path, lambda file: file.write(content.getvalue()))


@contextmanager
def exclusive(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path``; the system releases it when the process ends, however it ends.

    When somebody else holds it, wait for it if ``wait`` is set, otherwise raise BusyError at once. The file stays.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ConfigError(f"{path} is no regular file: expected a lock, or nothing; remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    # a soft lock, which is a mere file, would outlive a killed process
    lock = FileLock(path, preserve_lock_file=True, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not wait:
            raise BusyError(f"another process is at work on {what} (lock {path}): wait until it ends") from None
        log.info("another process is at work on %s: waiting until it ends", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
