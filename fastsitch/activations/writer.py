"""Writing an activation store: aside, checked, flushed, and put in place by one rename."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsitch.activations.files import (
    answering,
    checksums,
    file_sizes,
    flush,
    new_group,
    pipeline,
    remove,
    write_manifest,
)
from fastsitch.activations.order import ImageOrder
from fastsitch.activations.store import FORMAT, STORED_AS, StoreIdentity
from fastsitch.errors import FailedError, StoreError
from fastsitch.files import sync_file
from fastsitch.identity import stable_hash
from fastsitch.machine import DTYPES
from fastsitch.networks.layout import elements, stored_size
from fastsitch.networks.position import Position
from fastsitch.remote import Place

from zarr.codecs import Crc32cCodec, ZstdCodec  # isort: skip

CHUNK_BYTES = 4 << 20
MAX_CHUNK_IMAGES = ImageOrder.block
"""A block of the image order is whole chunks at every position, so that streaming reads no chunk twice."""

_MISSING = {"bf16": 0xFFFF, "fp16": float("nan"), "fp32": float("nan")}
"""Fill values: NaN, which is never stored. Chunks full of the fill value are not written, so with 0 a chunk of zeros
could not be told from a missing one."""


class StoreWriter:
    """Writes a store beside its final place; see :func:`writing`."""

    def __init__(
        self, path: Place, identity: StoreIdentity, positions: tuple[Position, ...], sizes: dict[str, int]
    ) -> None:
        self.path = path
        self.identity = identity
        self.positions = positions
        self.sizes = sizes
        self._stored_as = np.dtype(STORED_AS[identity.dtype])
        self._dtype = DTYPES[identity.dtype]
        compressors: list[Any] = [ZstdCodec(level=1)] if identity.compress == "zstd" else []
        with answering(path), pipeline(path):
            group = new_group(path)
            self._arrays: dict[str, Any] = {}
            for split, images in sizes.items():
                for position in positions:
                    row = (*stored_size(position.rows), position.rows[0])
                    self._arrays[f"{split}/{position.index}"] = group.create_array(
                        f"{split}/{position.index}",
                        shape=(images, *row),
                        chunks=(self.chunk_images(position), *row),
                        dtype=self._stored_as,
                        compressors=[*compressors, Crc32cCodec()],
                        fill_value=_MISSING[identity.dtype],
                        attributes={"dtype": identity.dtype, "position": position.name, **position.kind_dict()},
                        **_ARRAY_OPTIONS,
                    )
                for name in ("labels", "ids"):
                    self._arrays[f"{split}/{name}"] = group.create_array(
                        f"{split}/{name}",
                        shape=(images,),
                        chunks=(images,),
                        dtype=np.int64,
                        compressors=[Crc32cCodec()],
                        fill_value=-1,
                        **_ARRAY_OPTIONS,
                    )

    def chunk_images(self, position: Position) -> int:
        """Images per chunk: the power of two that comes closest to 4 MiB from below."""
        images = max(1, CHUNK_BYTES // (elements(position.rows) * self._stored_as.itemsize))
        return int(min(MAX_CHUNK_IMAGES, 1 << (images.bit_length() - 1)))

    @property
    def block_images(self) -> int:
        """Images per call of :meth:`write` that fill whole chunks at every position."""
        return max(self.chunk_images(position) for position in self.positions)

    def write(self, split: str, index: int, start: int, x_NHWC: Tensor) -> None:
        """Write consecutive images from ``start``, a multiple of the chunk, at one position.

        Raises StoreError when the store's dtype cannot hold the values.
        """
        values = x_NHWC.to(self._dtype).contiguous().cpu()
        if not bool(values.isfinite().all()):
            raise StoreError(
                f"{self.identity.network} has values at position {self.positions[index].name} that "
                f"{self.identity.dtype} cannot hold: use --dtype bf16 or fp32, or look whether the network diverged"
            )
        if self.identity.dtype == "bf16":
            values = values.view(torch.uint16)
        with answering(self.path):
            self._arrays[f"{split}/{index}"][start : start + len(values)] = values.numpy()

    def write_samples(self, split: str, labels: Tensor, ids: Tensor) -> None:
        """Write the labels and sample ids of a whole split."""
        with answering(self.path):
            self._arrays[f"{split}/labels"][:] = labels.cpu().numpy()
            self._arrays[f"{split}/ids"][:] = ids.cpu().numpy()

    def finish(self) -> None:
        """Check that every chunk is there, flush everything to the disk, then write the manifest."""
        flush(self.path)
        sizes = file_sizes(self.path)
        sums = checksums(self.path, sizes)
        files = {name: [size, sums[name]] for name, size in sizes.items()}
        for name, array in self._arrays.items():
            written = sum(file.rpartition("/")[0] == name for file in files) - 1
            expected = -(-array.shape[0] // array.chunks[0])
            if written != expected:
                raise FailedError(f"{self.path / name} has {written} of {expected} chunks: is the disk full?")
        content = {
            "format": FORMAT,
            "identity": asdict(self.identity),
            "hash": self.identity.hash,
            "positions": [position.to_dict() for position in self.positions],
            "sizes": self.sizes,
            "files": files,
        }
        write_manifest(self.path, {**content, "manifest_hash": stable_hash(content)})


_ARRAY_OPTIONS: dict[str, Any] = {
    "filters": None,
    "chunk_key_encoding": {"name": "v2", "separator": "."},
}


@contextmanager
def writing(
    path: Place, identity: StoreIdentity, positions: tuple[Position, ...], sizes: dict[str, int]
) -> Iterator[StoreWriter]:
    """Write a store that is there when the block ends without an error, and only then.

    On a disk it is written aside and put at ``path`` by one rename. An object store has no rename: there the manifest,
    which is written last, decides, and a store that is replaced is gone from the beginning. What an earlier, killed
    attempt left behind is removed first, what this one wrote when it fails: a full disk must not stay full. The caller
    holds the lock.
    """
    partial = _partial(path) if isinstance(path, Path) else path
    remove(partial)
    if isinstance(path, Path):
        remove(_old(path))
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer = StoreWriter(partial, identity, positions, sizes)
        yield writer
        writer.finish()
    except BaseException:
        remove(partial)
        raise
    if isinstance(path, Path):
        if path.exists():
            path.rename(_old(path))
        _partial(path).rename(path)
        sync_file(path.parent)
        remove(_old(path))


def leftover_bytes(path: Path) -> int:
    """Bytes that a killed attempt to write this store takes on the disk; the next attempt removes them first."""
    return sum(file.stat().st_size for file in _partial(path).rglob("*") if file.is_file())


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old")
