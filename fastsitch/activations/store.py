"""The activation store: a Zarr v3 group with the representations of one network on one data set.

Layout (docs/reference/files.md has it in full):
    manifest.json           written last; without a valid one the store does not exist
    train/0, train/1, ...   one array per position that is stored, (N, H, W, C), about 4 MiB per chunk, whole images;
                            tokens and vectors as fastsitch.chains.layout says
    train/labels, train/ids (N,) int64; the same under test/

Every chunk ends in its own crc32c, which is verified whenever it is read; the manifest repeats size and checksum of
every file, so that missing, truncated and exchanged files are found when a store is opened.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsitch.activations.store_files import open_array
from fastsitch.activations.store_manifest import STORED_AS, StoreIdentity, StoreManifest, remedy
from fastsitch.chains.layout import ABSENT, Shape
from fastsitch.chains.position import Position
from fastsitch.errors import FastsitchError, StoreError
from fastsitch.folders import Folder, FolderLike, as_folder


class ActivationStore:
    """A complete store, opened for reading. ``positions``, all or some of the network's, and ``sizes`` (images per
    split) describe it.

    ``reads`` counts how often each chunk was read, by (array, number of the chunk), such as ("train/0", 3).
    """

    def __init__(
        self,
        path: Folder,
        identity: StoreIdentity,
        positions: tuple[Position, ...],
        sizes: dict[str, int],
        position_count: int,
    ) -> None:
        self.path = path
        self.identity = identity
        self.positions = positions
        self.sizes = sizes
        self.position_count = position_count
        self.reads: Counter[tuple[str, int]] = Counter()
        self._small: dict[str, Tensor] = {}
        self._arrays: dict[tuple[str, bool], Any] = {}

    @classmethod
    def open(cls, path: FolderLike) -> "ActivationStore":
        """Open a store after checking manifest, census and checksums of all files.

        Raises StoreError naming the file and the reason when anything is missing, cut off, exchanged or foreign.
        """
        folder = as_folder(path)
        manifest = StoreManifest.read(folder)
        manifest.verify(folder)
        return cls(folder, manifest.identity, manifest.positions, manifest.sizes, manifest.position_count)

    def shapes(self, chosen: Sequence[int] | None = None) -> list[Shape]:
        """The shape of every position of the network, ABSENT where it is not stored, or not among those ``chosen``."""
        shapes = [ABSENT] * self.position_count
        for position in self.positions:
            if chosen is None or position.index in chosen:
                shapes[position.index] = position.rows
        return shapes

    @property
    def bytes(self) -> int:
        """Size of all representations, as stored without compression."""
        return self.image_bytes * sum(self.sizes.values())

    @property
    def image_bytes(self) -> int:
        """Size of one image at all positions, as stored without compression."""
        per_image = sum(int(np.prod(position.shape)) for position in self.positions)
        return per_image * np.dtype(STORED_AS[self.identity.dtype]).itemsize

    def read(self, split: str, index: int, start: int, stop: int) -> Tensor:
        """Images start ... stop - 1 at a position as (n, H, W, C) in the store's dtype, on the CPU."""
        values = self._read(f"{split}/{index}", start, stop)
        if self.identity.dtype == "bf16":
            return torch.from_numpy(values).view(torch.bfloat16)
        return torch.from_numpy(values)

    def labels(self, split: str) -> Tensor:
        """Labels of a split, int64 (N,)."""
        return self._whole(f"{split}/labels", split)

    def ids(self, split: str) -> Tensor:
        """Sample ids of a split, int64 (N,)."""
        return self._whole(f"{split}/ids", split)

    def _whole(self, name: str, split: str) -> Tensor:
        """A small array, read once."""
        if name not in self._small:
            self._small[name] = torch.from_numpy(self._read(name, 0, self.sizes[split]))
        return self._small[name]

    def chunk_images(self, split: str, index: int) -> int:
        """Images per chunk of an array."""
        return int(self._array(f"{split}/{index}").chunks[0])

    def chunk_file(self, split: str, index: int, number: int) -> str:
        """The name of an array's chunk, relative to the store."""
        return self._chunk_file(f"{split}/{index}", number)

    def _array(self, name: str, *, whole_chunks: bool = True) -> Any:
        """An array opened for reads of whole chunks by zarrs, or of any part by zarr's own pipeline."""
        if (name, whole_chunks) not in self._arrays:
            self._arrays[name, whole_chunks] = open_array(self.path, name, quick=whole_chunks)
        return self._arrays[name, whole_chunks]

    def _read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        array = self._array(name)
        step = array.chunks[0]
        first, last = start - start % step, min(-(-stop // step) * step, array.shape[0])
        # asked for a part of a chunk, zarrs decodes no more than that and does not verify the checksum; a last chunk
        # that reaches beyond the array is always read in part. zarr's own pipeline is slower, but decodes whole chunks
        # and finds the damage
        edge = last - last % step
        try:
            with self.path.translating_errors():
                blocks = [array[first:edge]] if edge > first else []
                if last > max(edge, first):
                    blocks.append(self._array(name, whole_chunks=False)[max(edge, first) : last])
        except FastsitchError:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            raise StoreError(
                f"{self._damaged(name, first, last)} was altered or damaged ({error}); {remedy(self.path)}"
            ) from None
        self.reads.update((name, number) for number in range(first // step, -(-last // step)))
        values = np.asarray(blocks[0] if len(blocks) == 1 else np.concatenate(blocks))
        return values[start - first : stop - first]

    def _damaged(self, name: str, first: int, last: int) -> Folder:
        """The file of the chunk that cannot be read, or the array's folder."""
        array = self._array(name, whole_chunks=False)
        step = array.chunks[0]
        for start in range(first, last, step):
            try:
                array[start : min(start + step, last)]
            except (RuntimeError, ValueError, OSError):
                return self.path / self._chunk_file(name, start // step)
        return self.path / name

    def _chunk_file(self, name: str, number: int) -> str:
        dimensions = len(self._array(name).shape)
        return f"{name}/" + ".".join([str(number), *["0"] * (dimensions - 1)])
