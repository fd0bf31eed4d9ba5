"""The manifest of an activation store: what its content depends on, and the files that it must have."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastsitch.activations.store_files import checksums
from fastsitch.chains.position import Position
from fastsitch.checked_files import DamagedFile, parse_json, with_hash
from fastsitch.errors import ConfigError, NetworkError, StoreError, argument
from fastsitch.files import json_bytes
from fastsitch.folders import MANIFEST, Folder
from fastsitch.identity import stable_hash
from fastsitch.suggested_command import command
from fastsitch.typed_fields import typed

FORMAT = 1
COMPRESSIONS = ("none", "zstd")

STORED_AS = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}
"""bf16 is kept as bit patterns: Zarr has no such type. The true dtype is in the attributes and the manifest."""


@dataclass(frozen=True, kw_only=True)
class StoreIdentity:
    """Everything that the content of a store depends on."""

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
            raise ConfigError(f"{argument('dtype', self.dtype)}: expected one of {', '.join(STORED_AS)}")
        if self.compress not in COMPRESSIONS:
            raise ConfigError(f"{argument('compress', self.compress)}: expected one of {', '.join(COMPRESSIONS)}")

    @property
    def hash(self) -> str:
        return stable_hash(asdict(self))

    def difference(self, wanted: "StoreIdentity", *, content_only: bool) -> str | None:
        """Why a store of this identity is not the one that is wanted, or None.

        ``content_only`` accepts any dtype, precision and compression.
        """
        reasons = {
            "network": "it holds another network",
            "dataset": "it holds another data set",
            "weights": "the network was trained again since",
            "data": "the data set has changed since",
            "normalisation": "the normalisation or the resolution of the network differs",
            "dtype": f"it holds {self.dtype} instead of {wanted.dtype}",
            "compute": f"it was computed in {self.compute} instead of {wanted.compute}",
            "compress": f"its compression is {self.compress} instead of {wanted.compress}",
        }
        for key, reason in reasons.items():
            if content_only and key in ("dtype", "compute", "compress"):
                continue
            if getattr(self, key) != getattr(wanted, key):
                return reason
        return None


@dataclass(frozen=True)
class StoreManifest:
    """What manifest.json says of a store."""

    identity: StoreIdentity
    positions: tuple[Position, ...]
    sizes: dict[str, int]
    """Images per split."""
    files: dict[str, list[int]]
    """Size in bytes and checksum of every file, by its name in the store."""
    position_count: int
    """Of the network, of which the store may hold some."""

    @classmethod
    def read(cls, folder: Folder) -> "StoreManifest":
        """The manifest of a store. Raises StoreError where it is missing, foreign or altered."""
        content = _content(folder)
        try:
            return typed(
                cls(
                    identity=StoreIdentity(**content["identity"]),
                    positions=tuple(Position.from_dict(entry) for entry in content["positions"]),
                    sizes=content["sizes"],
                    files=content["files"],
                    position_count=content.get("position_count", len(content["positions"])),
                )
            )
        except (KeyError, TypeError, ValueError, IndexError, NetworkError) as error:
            raise StoreError(
                f"{folder / MANIFEST} is not the manifest of an activation store ({error}); {remedy(folder)}"
            ) from None

    def write(self, folder: Folder) -> None:
        """Write it into the store, last of all files."""
        content = {
            "format": FORMAT,
            "identity": asdict(self.identity),
            "hash": self.identity.hash,
            "positions": [position.to_dict() for position in self.positions],
            "sizes": self.sizes,
            "files": self.files,
        }
        # as it was when stores held all positions
        if self.position_count != len(self.positions):
            content["position_count"] = self.position_count
        folder.write(MANIFEST, json_bytes(with_hash(content, "manifest_hash")))

    def verify(self, folder: Folder) -> None:
        """Raise StoreError unless every file is there, with its size and checksum."""
        sizes = folder.sizes()
        for name, (size, _) in self.files.items():
            if name not in sizes:
                raise StoreError(f"{folder / name} is missing; {remedy(folder)}")
            if sizes[name] != size:
                raise StoreError(f"{folder / name} has {sizes[name]} bytes, expected {size}; {remedy(folder)}")
        found = checksums(folder, {name: sizes[name] for name in self.files})
        for name, (_, checksum) in self.files.items():
            if found[name] != checksum:
                raise StoreError(f"{folder / name} has another checksum than in the manifest; {remedy(folder)}")


def remedy(folder: Folder) -> str:
    """The command that makes a store again, for error messages."""
    network, stores = folder.name.removesuffix(".partial"), folder.parent.parent
    line = command("precompute", network, root=stores.root_of_stores, activations=stores.activations_option, force=True)
    return f"make the store again with {line}" + (" and the same --root" if stores.root_of_stores is None else "")


def _content(folder: Folder) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        text = folder.read(MANIFEST)
    except FileNotFoundError:
        raise StoreError(f"{folder} is no complete activation store: it has no {MANIFEST}; {remedy(folder)}") from None
    except OSError as error:
        raise StoreError(f"cannot read {file} ({error.strerror}); {remedy(folder)}") from None
    try:
        manifest = parse_json(text, "manifest_hash")
    except DamagedFile as error:
        raise StoreError(f"{file} is not the manifest of an activation store ({error}); {remedy(folder)}") from None
    if manifest.get("format") != FORMAT:
        raise StoreError(f"{file} has format {manifest.get('format')}, expected {FORMAT}; {remedy(folder)}")
    return manifest
