"""The files of an activation store: their checksums, and how Zarr opens its arrays."""

import zlib
from typing import Any

import zarrs  # noqa: F401  registers the codec pipeline; has to come before zarr

import zarr  # isort: skip

from fastsitch.folders import Folder


def checksums(folder: Folder, sizes: dict[str, int]) -> dict[str, int]:
    """Of a chunk the crc32c that it ends in (verified on every read), of other files their crc32."""
    found = {name: zlib.crc32(folder.read(name)) for name in sizes if name.endswith(".json")}
    tails = folder.tails({name: size for name, size in sizes.items() if name not in found}, 4)
    return found | {name: int.from_bytes(tail, "little") for name, tail in tails.items()}


def open_array(folder: Folder, name: str, *, quick: bool) -> Any:
    """An array of a complete store, read by the quickest pipeline there is, or without ``quick`` by zarr's own.

    In a bucket a chunk that is missing is an error; on a disk, where the census has just found it, fill values.
    """
    with folder.translating_errors(), zarr.config.set(folder.zarr_settings if quick else {}):
        return zarr.open_array(folder.zarr_store(reading=True), path=name, mode="r", zarr_format=3)
