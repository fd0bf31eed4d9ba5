"""JSON and npz files that fastsitch wrote: what they hold is what was written, or the reason why not is given."""

import json
import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsitch.identity import stable_hash

_LARGEST_JSON = 1 << 28
"""Bytes; a store of a million chunks has a manifest of a quarter of that."""


NPZ_ERRORS = (
    ValueError,
    OSError,
    EOFError,
    RuntimeError,
    MemoryError,
    OverflowError,
    SyntaxError,
    tokenize.TokenError,
    TypeError,
    IndexError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""Whatever the bytes of an archive make zipfile, its decoders and numpy say."""


class DamagedFile(ValueError):
    """A file that cannot be what it was when it was written; says why."""


def with_hash(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Content of a JSON file with its own hash under ``key``."""
    return {**content, key: stable_hash(content)}


def parse_json(text: bytes | str, key: str, *, required: bool = True) -> dict[str, Any]:
    """What a JSON file with its own hash under ``key`` holds, without the hash.

    Files of versions that wrote none have none: they are taken where the hash is not ``required``. Raises DamagedFile.
    """
    if len(text) > _LARGEST_JSON:
        raise DamagedFile(f"it has {len(text)} bytes")
    try:
        content = json.loads(text)
    # brackets inside brackets, two hundred thousand times
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"no JSON: {error}") from None
    if not isinstance(content, dict):
        raise DamagedFile("no JSON object")
    found = content.pop(key, None)
    if found is None and required:
        raise DamagedFile(f"it lacks {key}")
    if found is not None and found != stable_hash(content):
        raise DamagedFile(f"it was altered: {key} is not that of its content")
    return content


def read_json(path: Path, key: str, *, required: bool = True) -> dict[str, Any]:
    """As :func:`parse_json`; raises FileNotFoundError where there is no file."""
    return parse_json(_read(path), key, required=required)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an npz file without pickles that was written by :func:`fastsitch.files.write_npz`.

    Raises FileNotFoundError, or DamagedFile.
    """
    if not path.is_file():
        if path.exists():
            raise DamagedFile("it is no regular file")
        raise FileNotFoundError(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            with zipfile.ZipFile(stream) as archive:
                for member in archive.infolist():
                    # nothing is compressed, so that nothing can be larger than the file
                    if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
                        raise DamagedFile(f"{member.filename} is not stored as it was written")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                return dict(file)
    except DamagedFile:
        raise
    except (KeyError, *NPZ_ERRORS) as error:
        raise DamagedFile(str(error) or type(error).__name__) from None


def require_arrays(arrays: Mapping[str, NDArray[Any]], expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise DamagedFile unless arrays of these names are there, with these kinds of dtype and these shapes.

    Kinds are NumPy's letters: ``f`` for floating-point numbers, ``i`` for whole ones, ``U`` for text; with a size in
    bytes, such as ``f8``, the dtype itself.
    """
    missing = [name for name in expected if name not in arrays]
    if missing:
        raise DamagedFile(f"it lacks {', '.join(missing)}")
    for name, (kind, shape) in expected.items():
        found = arrays[name]
        if kind not in (found.dtype.kind, found.dtype.str[1:]) or found.shape != shape:
            raise DamagedFile(f"{name} is {found.dtype} of shape {found.shape}: expected {kind} of shape {shape}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFile(error.strerror or str(error)) from None
