"""Readers of the file formats that data sets come in. Nothing that a file contains is ever executed."""

import gzip
import io
import math
import pickle
import pickletools
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy._core.multiarray as _multiarray
import torch
from numpy.typing import NDArray

from fastsitch.errors import DataError
from fastsitch.machine import available_memory

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images uint8 (N, H, W, 3) and labels int64 (N,)."""


MAX_LABEL = 99_999
"""The largest training label decides how many classes there are, and a network has an output for each of them."""


def read_idx(folder: Path, prefix: str) -> Arrays:
    """Images and labels of one split in MNIST's IDX format, plain or gzipped; raises DataError."""
    images = read_idx_array(folder, f"{prefix}-images-idx3-ubyte", 3)
    labels = read_idx_array(folder, f"{prefix}-labels-idx1-ubyte", 1)
    return checked(images, labels, str(folder))


def read_idx_array(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    """One IDX file of bytes, ``name`` or ``name.gz``; raises DataError when it is missing or malformed."""
    path = next((folder / file for file in (name, name + ".gz") if (folder / file).is_file()), None)
    if path is None:
        raise DataError(f"{folder} has no file {name} or {name}.gz: expected the four IDX files of the data set")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 * (1 + dimensions))
            if len(head) < 4 * (1 + dimensions) or head[:4] != bytes((0, 0, 8, dimensions)):
                raise DataError(f"{path} is no IDX file of {dimensions} dimension(s) of bytes: download the file again")
            shape = struct.unpack(f">{dimensions}I", head[4:])
            expected = math.prod(shape)
            if expected > (room := available_memory(torch.device("cpu"))):
                raise DataError(f"{path} says that it holds {expected} bytes of data, {room} bytes of memory are free")
            # no more than the header promises, whatever a compressed file grows to
            content = file.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot decompress {path} ({error}): download the file again") from None
    if len(content) != expected:
        raise DataError(
            f"{path} is cut off: expected {expected} bytes of data, found {len(content)}; download the file again"
            if len(content) < expected
            else f"{path} is longer than its header says: expected {expected} bytes of data; download the file again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_cifar(folder: Path, files: tuple[str, ...], label_key: bytes) -> Arrays:
    """Images and labels from CIFAR's python batches, without running the pickles' code; raises DataError."""
    images, labels = [], []
    for name in files:
        batch = _plain_pickle(folder / name)
        try:
            images.append(np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32))
            labels.append(np.asarray(batch[label_key], np.int64))
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{folder / name} is no CIFAR batch: expected uint8 rows of 3072 in 'data' and labels in "
                f"{label_key.decode()!r}"
            ) from None
    return checked(np.concatenate(images).transpose(0, 2, 3, 1), np.concatenate(labels), str(folder))


class _PlainUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and Python containers, and nothing else."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "scalar"})

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in self._ALLOWED:
            return {"ndarray": np.ndarray, "dtype": np.dtype}.get(name) or getattr(_multiarray, name)
        if (module, name) == ("_codecs", "encode"):
            import _codecs

            return _codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _plain_pickle(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path} is missing: expected the batches of the python version of CIFAR")
    try:
        content = path.read_bytes()
        _require_small_memo(content)
        return _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    # whatever the bytes of a pickle make the steps of one say
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        OverflowError,
        MemoryError,
        RecursionError,
        ImportError,
        SystemError,
    ) as error:
        raise DataError(f"{path} is no plain CIFAR batch ({error}): download the file again") from None


def _require_small_memo(pickled: bytes) -> None:
    """Raise UnpicklingError where a step names a place that makes the memo larger than the file could fill."""
    for step, argument, _ in pickletools.genops(pickled):
        if step.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(str(argument)) <= len(pickled):
            raise pickle.UnpicklingError(f"place {argument} in a file of {len(pickled)} bytes")


def padding(height: int, width: int) -> int:
    """Pixels that are put around images of this size: those of MNIST's size become 32x32."""
    return 2 if (height, width) == (28, 28) else 0


def checked(images: NDArray[Any], labels: NDArray[Any], what: str) -> Arrays:
    """Check shapes and types, make grey images three channels, pad 28x28 to 32x32; raises DataError."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise DataError(
            f"{what}: expected images as uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3), "
            f"found {images.dtype} {images.shape}"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise DataError(f"{what}: expected {len(images)} integer labels, found {labels.dtype} {labels.shape}")
    if 0 in images.shape:
        raise DataError(f"{what}: expected at least one image with at least one pixel, found {images.shape}")
    if labels.min() < 0 or labels.max() > MAX_LABEL:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"{what}: expected labels from 0 to at most {MAX_LABEL}, found {wrong}")
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[-1] == 1:
        images = images.repeat(3, -1)
    if pad := padding(images.shape[1], images.shape[2]):
        images = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return np.ascontiguousarray(images), labels.astype(np.int64)
