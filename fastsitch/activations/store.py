"""The activation store: a Zarr v3 group with the representations of one network on one data set.

Layout (docs/store.md has it in full):
    manifest.json           written last; without a valid one the store does not exist
    train/0, train/1, ...   one array per position, (N, H, W, C), about 4 MiB per chunk, whole images; tokens and
                            vectors as fastsitch.networks.layout says
    train/labels, train/ids (N,) int64; the same under test/

Every chunk ends in its own crc32c, which is verified whenever it is read; the manifest repeats size and checksum of
every file, so that missing, truncated and exchanged files are found when a store is opened.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsitch.activations.files import MANIFEST, answering, checksums, file_sizes, open_array, read_file
from fastsitch.advice import command
from fastsitch.errors import ConfigError, FastsitchError, NetworkError, StoreError
from fastsitch.identity import stable_hash
from fastsitch.networks.chain import Position
from fastsitch.remote import Place, RemoteFolder
from fastsitch.root import STORES

FORMAT = 1
COMPRESSIONS = ("none", "zstd")

STORED_AS = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}
"""bf16 is kept as bit patterns: Zarr has no such type. The true dtype is in the attributes and the manifest."""


@dataclass(frozen=True, kw_only=True)
class StoreIdentity:
    """What the content of a store depends on."""

    network: str
    dataset: str
    weights: str
    """Hash of the network's weights."""
    data: str
    """Hash of the data set."""
    normalisation: dict[str, Any]
    """Of the network's transform: mean and std, and the resolution where images are resized to it."""
    dtype: str
    compute: str
    """The precision of the forward pass."""
    compress: str

    def __post_init__(self) -> None:
        if self.dtype not in STORED_AS:
            raise ConfigError(f"--dtype {self.dtype}: expected one of {', '.join(STORED_AS)}")
        if self.compress not in COMPRESSIONS:
            raise ConfigError(f"--compress {self.compress}: expected one of {', '.join(COMPRESSIONS)}")

    @property
    def hash(self) -> str:
        return stable_hash(asdict(self))


class ActivationStore:
    """A complete store, opened for reading. ``positions`` and ``sizes`` (images per split) describe it.

    ``reads`` counts how often each chunk was read, by (array, number of the chunk), such as ("train/0", 3).
    """

    def __init__(
        self, path: Place, identity: StoreIdentity, positions: tuple[Position, ...], sizes: dict[str, int]
    ) -> None:
        self.path = path
        self.identity = identity
        self.positions = positions
        self.sizes = sizes
        self.reads: Counter[tuple[str, int]] = Counter()
        self._small: dict[str, Tensor] = {}
        self._arrays: dict[tuple[str, bool], Any] = {}

    @classmethod
    def open(cls, path: Place) -> "ActivationStore":
        """Open a store after checking manifest, census and checksums of all files.

        Raises StoreError naming the file and the reason when anything is missing, cut off, exchanged or foreign.
        """
        manifest = _read_manifest(path)
        try:
            identity = StoreIdentity(**manifest["identity"])
            positions = tuple(Position.from_dict(entry) for entry in manifest["positions"])
            store = cls(path, identity, positions, dict(manifest["sizes"]))
            files = manifest["files"]
        except (KeyError, TypeError, IndexError, NetworkError) as error:
            raise StoreError(f"{path / MANIFEST} is no manifest of an activation store ({error})") from None
        _census(path, files)
        return store

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
        # zarrs decodes only the part of a chunk that is asked for and does not verify the checksum then. A last chunk
        # that reaches beyond the array is always read in part, however much of the array is asked for. zarr's own
        # pipeline is slower, but decodes chunks whole and finds the damage
        edge = last - last % step
        try:
            with answering(self.path):
                parts = [array[first:edge]] if edge > first else []
                if last > max(edge, first):
                    parts.append(self._array(name, whole_chunks=False)[max(edge, first) : last])
        except FastsitchError:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            raise StoreError(
                f"{self._damaged(name, first, last)} was altered or damaged ({error}); {remedy(self.path)}"
            ) from None
        self.reads.update((name, number) for number in range(first // step, -(-last // step)))
        values = np.asarray(parts[0] if len(parts) == 1 else np.concatenate(parts))
        return values[start - first : stop - first]

    def _damaged(self, name: str, first: int, last: int) -> Place:
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


def remedy(path: Place) -> str:
    """The command that makes a store again, for error messages."""
    network = path.name.removesuffix(".partial")
    folder = path.parent.parent
    if isinstance(path, RemoteFolder):
        line = command("precompute", network, root=path.locks.parent, activations=str(folder), force=True)
    elif path.parents[1].name == STORES and (path.parents[2] / "models").is_dir():
        line = command("precompute", network, root=path.parents[2], force=True)
    else:
        line = f"{command('precompute', network, activations=str(folder), force=True)} and the same --root"
    return f"make the store again with {line}"


def stale(store: ActivationStore, wanted: StoreIdentity, *, content_only: bool) -> str | None:
    """Why the store is not the wanted one, or None. ``content_only`` accepts any dtype and compression."""
    reasons = {
        "network": "it holds another network",
        "dataset": "it holds another data set",
        "weights": "the network was trained again since",
        "data": "the data set has changed since",
        "normalisation": "the normalisation or the resolution of the network differs",
        "dtype": f"it holds {store.identity.dtype} instead of {wanted.dtype}",
        "compute": f"it was computed in {store.identity.compute} instead of {wanted.compute}",
        "compress": f"its compression is {store.identity.compress} instead of {wanted.compress}",
    }
    for key, reason in reasons.items():
        if content_only and key in ("dtype", "compute", "compress"):
            continue
        if getattr(store.identity, key) != getattr(wanted, key):
            return reason
    return None


def _read_manifest(path: Place) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        text = read_file(path, MANIFEST)
    except FileNotFoundError:
        raise StoreError(f"{path} has no {MANIFEST}: it is no complete activation store; {remedy(path)}") from None
    try:
        manifest = json.loads(text)
        found_hash = manifest.pop("manifest_hash")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise StoreError(f"{file} is no manifest of an activation store ({error}); {remedy(path)}") from None
    if manifest.get("format") != FORMAT:
        raise StoreError(f"{file} has format {manifest.get('format')}, expected {FORMAT}; {remedy(path)}")
    if stable_hash(manifest) != found_hash:
        raise StoreError(f"{file} was altered (its own hash does not fit); {remedy(path)}")
    return dict(manifest)


def _census(path: Place, files: dict[str, list[int]]) -> None:
    sizes = file_sizes(path)
    for name, (size, _) in files.items():
        if name not in sizes:
            raise StoreError(f"{path / name} is missing; {remedy(path)}")
        if sizes[name] != size:
            raise StoreError(f"{path / name} has {sizes[name]} bytes, expected {size}; {remedy(path)}")
    found = checksums(path, {name: sizes[name] for name in files})
    for name, (_, checksum) in files.items():
        if found[name] != checksum:
            raise StoreError(f"{path / name} has another checksum than the manifest says; {remedy(path)}")
