"""Python files of users: run from the bytes that were hashed, once per process, able to import files beside them."""

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fastsitch.identity import stable_hash


@dataclass
class _FactoryFile:
    """A file that has been run, and the modules that it imported from its folder, by name."""

    module: ModuleType
    neighbours: dict[str, ModuleType] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    """sha256 of their files, by path relative to the folder."""


_FILES: dict[tuple[Path, str], _FactoryFile] = {}
"""By path and sha256."""

_opened: list[set[str]] = []
"""Of every block that watches: Python files that were opened since it began."""


@contextmanager
def importing_neighbours(path: Path, content: bytes) -> Iterator[ModuleType]:
    """The module made of exactly these bytes of ``path``; while the block runs, its folder is the first on the path.

    Modules of the folder are this file's alone: files of another folder may import others of the same names.
    """
    key = path, hashlib.sha256(content).hexdigest()
    known = _FILES.get(key)
    if known is not None and any(file_hash(path.parent / name) != found for name, found in known.hashes.items()):
        known = None
    file = known or _FactoryFile(ModuleType(f"fastsitch_file_{stable_hash([str(path), key[1]])[:16]}"))
    with _folder_first(path.parent, file), _recording_opened(path, file):
        if known is None:
            file.module.__file__ = str(path)
            sys.modules[file.module.__name__] = file.module
            try:
                exec(compile(content, str(path), "exec"), file.module.__dict__)
            except BaseException:
                del sys.modules[file.module.__name__]
                raise
            _FILES[key] = file
        yield file.module


def imported_neighbours(path: Path, digest: str) -> tuple[tuple[str, str], ...]:
    """Python files beside ``path`` that it has run in this process, by relative path, each with its sha256."""
    return tuple(sorted(_FILES[path, digest].hashes.items()))


def file_hash(path: Path) -> str:
    """sha256 (hex) of a file; empty where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


@contextmanager
def _recording_opened(path: Path, file: _FactoryFile) -> Iterator[None]:
    """Keep the hashes of Python files below the folder of ``path`` that are read meanwhile, in whichever way.

    Such as by ``spec_from_file_location``, ``runpy``, or ``exec`` of what ``open`` gives; not those that are installed.
    """
    _watch()
    opened: set[str] = set()
    _opened.append(opened)
    try:
        yield
    finally:
        _opened[:] = [each for each in _opened if each is not opened]
        for name in opened:
            relative = _below(path.parent, Path(name))
            if relative is not None and name != str(path):
                file.hashes.setdefault(relative.as_posix(), file_hash(path.parent / relative))


def _below(folder: Path, file: Path) -> Path | None:
    """A file's path relative to the folder; None where it is elsewhere, or installed there."""
    for location in (file, file.resolve()):
        if location.is_relative_to(folder) and location.is_file():
            relative = location.relative_to(folder)
            return None if {"site-packages", "dist-packages"} & {*relative.parts} else relative
    return None


@cache
def _watch() -> None:
    # it can never be removed: where no block watches, it does nothing
    sys.addaudithook(_note_opened)


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _opened:
        return
    name = arguments[0]
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if isinstance(name, str) and name.endswith((".py", ".pyc")):
        with suppress(ValueError):
            # what is compiled stands for its source
            name = importlib.util.source_from_cache(name) if name.endswith(".pyc") else name
        for opened in _opened:
            opened.add(os.path.abspath(name))


@contextmanager
def _folder_first(folder: Path, file: _FactoryFile) -> Iterator[None]:
    """Let imports find the modules of ``folder`` first; ``file`` keeps those that were imported."""
    # modules that others have imported under a name of the folder, as from another one; the standard library's stay
    hidden = {
        name: module
        for name, module in list(sys.modules.items())
        if _is_module(folder, _top(name)) and _in_folder(folder, module) is None
    }
    for name in hidden:
        del sys.modules[name]
    others = {_top(name) for name in sys.modules}
    sys.modules.update(file.neighbours)
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    # it may have been looked into before its files were written
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = writes_bytecode
        for name, module in list(sys.modules.items()):
            relative = _in_folder(folder, module)
            # packages that are installed below the folder are no neighbours
            if relative is None or _top(name) in others or relative.parts[0].partition(".")[0] != _top(name):
                continue
            file.neighbours[name] = sys.modules.pop(name)
            if (folder / relative).is_file():
                file.hashes[relative.as_posix()] = file_hash(folder / relative)
        sys.modules.update(hidden)


def _top(name: str) -> str:
    return name.partition(".")[0]


def _is_module(folder: Path, name: str) -> bool:
    found = (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()
    return found and name not in sys.stdlib_module_names


def _in_folder(folder: Path, module: ModuleType) -> Path | None:
    """The path of a module's file, or of its package, relative to the folder; None where it is elsewhere."""
    try:
        location = getattr(module, "__file__", None) or next(iter(module.__path__))
        return Path(location).resolve().relative_to(folder)
    # some modules are objects of other kinds
    except (AttributeError, StopIteration, TypeError, ValueError, OSError):
        return None
