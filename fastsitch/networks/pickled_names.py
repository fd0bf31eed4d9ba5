"""What a checkpoint that is not unpickled holds, told from the steps of its pickle, none of which is done."""

import json
import pickletools
import re
import shlex
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO

import torch

from fastsitch.checked_files import NPZ_ERRORS
from fastsitch.errors import plain

_LISTED = 4

_LARGEST_PICKLE = 1 << 28
"""Bytes; of a checkpoint's names and shapes, which are a thousandth of that."""

_PICKLES = 4
"""A file without an archive, as torch wrote before 1.6, begins with three small ones; the fourth is the checkpoint."""

_USUAL_KEYS = ("state_dict", "model_state_dict", "model", "net", "weights", "params")

_DOTTED = re.compile(r"(?!\d)\w+(\.(?!\d)\w+)*")


@dataclass(frozen=True)
class Pickled:
    """Names that one pickle would import, the texts in it, and whether it is a dict."""

    names: frozenset[str]
    texts: frozenset[str]
    is_dict: bool
    steps: int


def why_not_unpickled(path: Path) -> str | None:
    """What a file holds that ``torch.load(weights_only=True)`` refuses, and how to convert it where it is trusted.

    Two lines that continue one which names the file; None when nothing in it explains the refusal.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                file.seek(0)
                return _remedy(path, list(_pickles(file)))
            with zipfile.ZipFile(file) as archive:
                members = archive.namelist()
                if any(name.endswith("/constants.pkl") for name in members):
                    load = f'torch.jit.load({_quoted(path)}, map_location="cpu").state_dict()'
                    return f"is a TorchScript archive, which is a program and is not run: {_conversion(f'c = {load}')}"
                pickles = (name for name in members if name.count("/") == 1 and name.endswith("/data.pkl"))
                with archive.open(next(pickles)) as member:
                    return _remedy(path, list(_pickles(BytesIO(member.read(_LARGEST_PICKLE)))))
    except (*NPZ_ERRORS, StopIteration):
        return None


def _remedy(path: Path, pickles: list[Pickled]) -> str | None:
    names = sorted({name for pickle in pickles for name in pickle.names if not _of_tensors(name)})
    if not names:
        return None
    # the checkpoint itself, not what stands before it
    checkpoint = max(pickles, key=lambda pickle: pickle.steps)
    part = next((f'["{key}"]' for key in _USUAL_KEYS if checkpoint.is_dict and key in checkpoint.texts), "")
    if any(name.startswith("torch.nn.modules.") for name in names):
        part += ".state_dict()"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    load = f'torch.load({_quoted(path)}, map_location="cpu", weights_only=False){part}'
    return (
        f"holds more than tensors ({', '.join(map(plain, names[:_LISTED]))}{more}), which is never unpickled: "
        f"{_conversion(f'c = {load}')}"
    )


def _conversion(load: str) -> str:
    code = f'import torch; {load}; torch.save(c, "weights.pt")'
    return f"convert it where you trust it, such as by\n  python -c {shlex.quote(code)}"


def _quoted(path: Path) -> str:
    """With the quotes that a shell leaves alone between single ones."""
    return json.dumps(str(path), ensure_ascii=False)


def _of_tensors(name: str) -> bool:
    """Whether a name is one of those that state dicts consist of."""
    module, _, last = name.rpartition(".")
    if module == "torch" or module == "torch.storage":
        return (
            last.endswith("Storage") or last in ("Size", "device") or isinstance(getattr(torch, last, 0), torch.dtype)
        )
    return (
        (module == "torch._utils" and last.startswith("_rebuild"))
        or (module == "collections" and last in ("OrderedDict", "Counter"))
        or (module == "__builtin__" and last in ("set", "complex", "bytearray"))
        or name
        in (
            "torch._tensor._rebuild_from_type_v2",
            "torch.nn.parameter.Parameter",
            "torch.serialization._get_layout",
            "_codecs.encode",
            "builtins.set",
            "builtins.complex",
            "builtins.bytearray",
        )
    )


def _pickles(file: IO[bytes]) -> Iterator[Pickled]:
    """The pickles that a file begins with, each of them whole."""
    for _ in range(_PICKLES):
        try:
            yield _steps(file)
        # no further one, or none at all
        except (ValueError, EOFError, IndexError, OverflowError, MemoryError):
            return


def _steps(file: IO[bytes]) -> Pickled:
    """Names and texts of one pickle; raises ValueError where there is none."""
    names: set[str] = set()
    texts: set[str] = set()
    steps, is_dict = 0, False
    memo: dict[object, str] = {}
    stack: list[str] = []
    top = ""
    for opcode, argument, _ in pickletools.genops(file):
        kind = opcode.name
        steps += 1
        if kind in ("PROTO", "FRAME"):
            continue
        if kind in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = top
            continue
        if not texts and not names and kind in ("EMPTY_DICT", "DICT"):
            is_dict = True
        top = ""
        if kind in ("GLOBAL", "INST"):
            names.add(str(argument).replace(" ", "."))
            is_dict = is_dict or (argument == "collections OrderedDict" and len(names) == 1 and not texts)
        elif kind == "STACK_GLOBAL":
            names.add(".".join(stack[-2:]))
        elif kind in ("GET", "BINGET", "LONG_BINGET"):
            top = memo.get(argument, "")
        elif isinstance(argument, str):
            top = argument
            texts.add(argument)
        stack = [*stack[-1:], top] if top else stack
    return Pickled(frozenset(name for name in names if _DOTTED.fullmatch(name)), frozenset(texts), is_dict, steps)
