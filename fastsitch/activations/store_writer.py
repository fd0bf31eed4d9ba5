"""Writing an activation store: checked and flushed, then the manifest."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.store_files import checksums
from fastsitch.activations.store_manifest import STORED_AS, StoreIdentity, StoreManifest
from fastsitch.chains.layout import elements, stored_size
from fastsitch.chains.position import Position
from fastsitch.errors import FailedError, StoreError, argument
from fastsitch.folders import Folder, FolderLike, as_folder
from fastsitch.machine import DTYPES

import zarr  # isort: skip
from zarr.codecs import Crc32cCodec, ZstdCodec  # isort: skip

CHUNK_BYTES = 4 << 20
MAX_CHUNK_IMAGES = ImageOrder.block
"""A block of the image order is whole chunks at every position, so that streaming reads no chunk twice."""

_MISSING = {"bf16": 0xFFFF, "fp16": float("nan"), "fp32": float("nan")}
"""Fill values: NaN, which is never stored. Chunks full of the fill value are not written, so with 0 a chunk of zeros
could not be distinguished from a missing one."""


class StoreWriter:
    """Writes a store into an empty folder; see :func:`writing`."""

    def __init__(
        self,
        folder: Folder,
        identity: StoreIdentity,
        positions: tuple[Position, ...],
        sizes: dict[str, int],
        position_count: int | None = None,
    ) -> None:
        self.folder = folder
        self.identity = identity
        self.positions = positions
        self.sizes = sizes
        self._position_count = len(positions) if position_count is None else position_count
        self._stored_as = np.dtype(STORED_AS[identity.dtype])
        self._dtype = DTYPES[identity.dtype]
        compressors: list[Any] = [ZstdCodec(level=1)] if identity.compress == "zstd" else []
        with folder.translating_errors(), zarr.config.set(folder.zarr_settings):
            group = zarr.open_group(folder.zarr_store(reading=False), mode="w", zarr_format=3)
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
            (name,) = [position.name for position in self.positions if position.index == index]
            raise StoreError(
                f"{self.identity.network} has values at position {name} that "
                f"{self.identity.dtype} cannot hold: use {argument('dtype', 'bf16')} or {argument('dtype', 'fp32')}, "
                "or check whether its training diverged"
            )
        if self.identity.dtype == "bf16":
            values = values.view(torch.uint16)
        with self.folder.translating_errors():
            self._arrays[f"{split}/{index}"][start : start + len(values)] = values.numpy()

    def write_samples(self, split: str, labels: Tensor, ids: Tensor) -> None:
        """Write the labels and sample ids of a whole split."""
        with self.folder.translating_errors():
            self._arrays[f"{split}/labels"][:] = labels.cpu().numpy()
            self._arrays[f"{split}/ids"][:] = ids.cpu().numpy()

    def finish(self) -> None:
        """Flush everything, check that every chunk is there, then write the manifest."""
        self.folder.flush()
        sizes = self.folder.sizes()
        sums = checksums(self.folder, sizes)
        files = {name: [size, sums[name]] for name, size in sizes.items()}
        for name, array in self._arrays.items():
            written = sum(file.rpartition("/")[0] == name for file in files) - 1
            expected = -(-array.shape[0] // array.chunks[0])
            if written != expected:
                raise FailedError(f"{self.folder / name} has {written} of {expected} chunks: is the disk full?")
        StoreManifest(self.identity, self.positions, self.sizes, files, self._position_count).write(self.folder)


_ARRAY_OPTIONS: dict[str, Any] = {
    "filters": None,
    "chunk_key_encoding": {"name": "v2", "separator": "."},
}


@contextmanager
def writing(
    path: FolderLike,
    identity: StoreIdentity,
    positions: tuple[Position, ...],
    sizes: dict[str, int],
    position_count: int | None = None,
) -> Iterator[StoreWriter]:
    """Write a store that is there when the block ends without an error, and only then.

    Its ``positions`` are all of a network, or some of its ``position_count``.

    On a disk it is written aside and put at ``path`` by one rename. A bucket has no rename: there the manifest, which
    is written last, decides, and a store that is replaced is gone from the beginning. The caller holds the lock.
    """
    with as_folder(path).replacing() as folder:
        writer = StoreWriter(folder, identity, positions, sizes, position_count)
        yield writer
        writer.finish()
