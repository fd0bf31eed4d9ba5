"""Python files of users: run from the bytes that were hashed, once per process, able to import files beside them."""

import hashlib
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

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
    with _folder_first(path.parent, file):
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
    """Files beside ``path`` that it has imported in this process, by relative path, each with its sha256."""
    return tuple(sorted(_FILES[path, digest].hashes.items()))


def file_hash(path: Path) -> str:
    """sha256 (hex) of a file; empty where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


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
