"""What the fault bench does to a command's process before the command begins; nothing heavy is imported."""

import itertools
import os
import signal
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Hook = Callable[[], None]

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


def in_turn(hooks: tuple[Hook, ...]) -> None:
    """Several hooks as one."""
    for hook in hooks:
        hook()


def tiny_study() -> None:
    """``paper --scale small`` is a study of one architecture on few.npz."""
    from fastsitch.study import study_config

    study_config.SCALES["small"] = study_config.Scale(
        dataset="npz:few.npz", width=4, training="fast", recipe="small", networks=("R1111",)
    )


def die_at(number: int, torn: bool, place: Path, log: Path) -> None:
    """Kill this process just before its ``number``-th file operation below ``place``; 0 lets it live.

    Operations are files opened for writing, renamed, removed and flushed, and folders made and removed; each is a line
    in ``log``. ``torn`` cuts a file that was being flushed to half of its size first: a kill in the middle of writing.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC)
    numbers = itertools.count(1)

    def operation(what: str, path: str) -> None:
        if not os.path.abspath(path).startswith(f"{place}{os.sep}"):
            return
        os.write(file, f"{what} {os.path.relpath(path, place)}\n".encode(errors="replace"))
        if next(numbers) == number:
            if torn and what == "fsync" and stat.S_ISREG(os.stat(path).st_mode):
                os.truncate(path, os.stat(path).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(event: str, arguments: tuple[object, ...]) -> None:
        if event not in _OPERATIONS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if event == "open":
            flags = arguments[2]
            if not isinstance(flags, int) or not flags & _WRITING:
                return
        operation(event.removeprefix("os."), os.fsdecode(arguments[0]))

    flush = os.fsync

    def counted(descriptor: Any) -> None:
        with suppress(OSError):
            operation("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        flush(descriptor)

    sys.addaudithook(audited)
    os.fsync = counted
