"""Weights as they lie on a disk: one file, shards with an index, or a folder of either. Nothing in them is run."""

import json
import os.path
import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors

from fastsitch.errors import NetworkError, argument, plain
from fastsitch.networks.pickled_names import why_not_unpickled

_INDEX = ".index.json"

_USUAL_NAMES = ("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.bin", f"pytorch_model.bin{_INDEX}")
"""In a folder of the Hugging Face hub, the first that is there."""

_LARGEST_INDEX = 1 << 28

_LARGEST_HEADER = 100_000_000
"""Bytes, by the definition of the format."""

_LISTED = 6

_EXPECTED = "expected safetensors, or a state dict saved by torch.save"


def read_checkpoint(path: Path) -> Any:
    """What a file of weights holds: a mapping of tensors, or plain containers around some.

    A folder stands for the one checkpoint in it, an index for its shards. Raises NetworkError.
    """
    # pathlib raises for names that are too long
    if os.path.isdir(path):
        path = _in_folder(path)
    if path.name.endswith(_INDEX):
        return _read_shards(path)
    return read_file(path, argument("weights", path))


def _in_folder(folder: Path) -> Path:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise NetworkError(f"cannot read {argument('weights', folder)} ({error.strerror})") from None
    usual = next((name for name in _USUAL_NAMES if name in names), None)
    if usual is not None:
        return folder / usual
    found = [name for name in names if name.endswith((f".safetensors{_INDEX}", f".bin{_INDEX}"))]
    found = found or [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return folder / found[0]
    there = f"it has {_listed(found)}: name one of them" if found else f"expected {', '.join(_USUAL_NAMES)} in it"
    raise NetworkError(f"{argument('weights', folder)} is a folder, no regular file: {there}")


def read_file(path: Path, shown: str) -> Any:
    """One file, by its content or name; ``shown`` names it in errors."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise NetworkError(f"{shown} is no regular file: {_EXPECTED}")
    try:
        if path.suffix == ".safetensors" or _begins_as_safetensors(path):
            return parse_safetensors(path.read_bytes())
        with warnings.catch_warnings():
            # what it warns of it also refuses
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise NetworkError(f"cannot read {shown} ({error.strerror or error})") from None
    except _UNREADABLE as error:
        reason = None if isinstance(error, SafetensorError) else why_not_unpickled(path)
        # torch's message advises to unpickle everything
        raise NetworkError(
            f"{shown} {reason}"
            if reason
            else f"{shown} holds no weights that can be read safely ({type(error).__name__}): {_EXPECTED}; nothing "
            "else in a file is ever unpickled"
        ) from None


def _begins_as_safetensors(path: Path) -> bool:
    """The format begins with the length of a JSON object, then that; files in caches are named by their hash."""
    with path.open("rb") as file:
        begin = file.read(9)
    return begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= _LARGEST_HEADER


def shards(index: Path) -> list[Path]:
    """The files beside an index that it names, whether they are there or not; raises NetworkError."""
    return [index.parent / name for name in _shard_names(index, _read_index(index))]


def _shard_names(index: Path, places: Mapping[str, str]) -> list[str]:
    files = sorted(set(places.values()))
    beside = [name for name in files if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name]
    if beside:
        raise NetworkError(
            f"{argument('weights', index)} names the shard {plain(beside[0])!r}: expected names of files beside the "
            "index"
        )
    return files


def _read_shards(index: Path) -> dict[str, Any]:
    """The tensors that an index lists, from the files beside it that it names."""
    places = _read_index(index)
    shown = argument("weights", index)
    files = _shard_names(index, places)
    missing = [name for name in files if not os.path.exists(index.parent / name)]
    if missing:
        raise NetworkError(f"{shown} lacks {_listed(missing)} of its {len(files)} shards: put them beside it")
    weights: dict[str, Any] = {}
    for name in files:
        content = read_file(index.parent / name, f"{shown}: shard {plain(name)}")
        listed = [key for key, file in places.items() if file == name]
        lacking = [key for key in listed if not isinstance(content, Mapping) or key not in content]
        if lacking:
            raise NetworkError(f"{shown}: shard {plain(name)} lacks {_listed(lacking)}, which the index says it has")
        weights.update((key, content[key]) for key in listed)
    return weights


def _read_index(path: Path) -> dict[str, str]:
    shown = argument("weights", path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise NetworkError(f"{shown} is no regular file: expected the index of shards")
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise ValueError
        content = json.loads(path.read_bytes())
        places = content["weight_map"]
        if not places or not all(isinstance(name, str) for name in places.values()):
            raise ValueError
    except OSError as error:
        raise NetworkError(f"cannot read {shown} ({error.strerror})") from None
    # brackets inside brackets, two hundred thousand times
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise NetworkError(f'{shown} is no index of shards: expected JSON with "weight_map": {{NAME: FILE}}') from None
    return dict(places)


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(map(plain, names[:_LISTED])) + (f" and {more} more" if more > 0 else "")


_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
    OverflowError,
    RecursionError,
    struct.error,
)
"""What the readers raise for other files: torch takes the letters of a text for the steps of a pickle."""
