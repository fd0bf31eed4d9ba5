"""Stitches and the matrices that belong to them: a safetensors file, then an npz that says that both are whole.

The npz holds the size and the sha256 of the stitches, so that files which do not belong together are found.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as format_safetensors
from torch import Tensor

from fastsitch.checked_files import DamagedFile, require_arrays
from fastsitch.files import write_atomically, write_npz

HASH, _BYTES = "stitches_hash", "stitches_bytes"


def save_stitches(path: Path, tensors: Mapping[str, Tensor], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write named tensors beside ``path``, then the arrays into it."""
    content = format_safetensors(dict(tensors))
    write_atomically(tensors_file(path), lambda file: file.write(content))
    tie = {HASH: np.array(hashlib.sha256(content).hexdigest()), _BYTES: np.array(len(content))}
    write_npz(path, {**tie, **arrays})


def require_stitches(path: Path, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The content of the stitches beside ``path``, whose arrays these are.

    Raises DamagedFile when they are missing or not those that were written with it.
    """
    file = tensors_file(path)
    kinds = {_BYTES: ("i", ()), HASH: ("U", ())}
    try:
        require_arrays(arrays, {name: kind for name, kind in kinds.items() if name in arrays})
    except DamagedFile as error:
        raise DamagedFile(f"{path} is damaged: {error}") from None
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise DamagedFile(f"{file} is missing") from None
    # files of version 0.1 know either the size or the hash
    whole = _BYTES not in arrays or len(content) == int(arrays[_BYTES])
    same = HASH not in arrays or hashlib.sha256(content).hexdigest() == str(arrays[HASH])
    if not whole or not same:
        raise DamagedFile(f"{file} does not hold the stitches that were written with {path.name}")
    return content


def read_stitches(path: Path, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """The named tensors beside ``path``; raises DamagedFile."""
    try:
        return parse_safetensors(require_stitches(path, arrays))
    except SafetensorError as error:
        raise DamagedFile(f"{tensors_file(path)}: {error}") from None


def tensors_file(path: Path) -> Path:
    """The file with the stitches that belong to an npz."""
    return path.with_name(path.name.removesuffix(".npz") + ".safetensors")
