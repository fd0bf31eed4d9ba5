"""The files of an activation store, on a disk or in an object store."""

import os
import shutil
import time
import zlib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import zarrs  # noqa: F401  registers the codec pipeline; has to come before zarr

import zarr  # isort: skip
from zarr.storage import ObjectStore  # isort: skip

from fastsitch.files import drop_from_cache, json_bytes, sync_file, write_json
from fastsitch.remote import Place, RemoteFolder

MANIFEST = "manifest.json"


def read_file(place: Place, name: str) -> bytes:
    """A file's content; raises FileNotFoundError."""
    return place.read(name) if isinstance(place, RemoteFolder) else (place / name).read_bytes()


def file_sizes(place: Place) -> dict[str, int]:
    """Size of every file by its name, such as ``train/0/0.0.0.0``, in the order of a walk through the folders."""
    if isinstance(place, RemoteFolder):
        sizes = place.sizes()
    else:
        files = (path for path in place.rglob("*") if path.is_file())
        sizes = {path.relative_to(place).as_posix(): path.stat().st_size for path in files}
    return {name: sizes[name] for name in sorted(sizes, key=lambda name: name.split("/"))}


def checksums(place: Place, sizes: dict[str, int]) -> dict[str, int]:
    """Of a chunk the crc32c that it ends in (verified on every read), of other files their crc32."""
    found = {name: zlib.crc32(read_file(place, name)) for name in sizes if name.endswith(".json")}
    chunks = {name: size for name, size in sizes.items() if name not in found}
    tails = (
        place.tails(chunks, 4) if isinstance(place, RemoteFolder) else {name: _tail(place / name) for name in chunks}
    )
    return found | {name: int.from_bytes(tail, "little") for name, tail in tails.items()}


def write_manifest(place: Place, content: dict[str, Any]) -> None:
    """Write the file without which the store does not exist."""
    if isinstance(place, RemoteFolder):
        place.write(MANIFEST, json_bytes(content))
    else:
        write_json(place / MANIFEST, content)


def flush(place: Place) -> None:
    """Flush files and folders to the disk. What an object store has taken over it keeps."""
    if isinstance(place, Path):
        for path in sorted(place.rglob("*")):
            sync_file(path)


def remove(place: Place) -> None:
    """Remove everything, if there is anything."""
    if isinstance(place, RemoteFolder):
        place.remove()
    else:
        shutil.rmtree(place, ignore_errors=True)


def new_group(place: Place) -> Any:
    """An empty Zarr group, whose arrays are written by the quickest pipeline that can."""
    with answering(place), pipeline(place):
        return zarr.open_group(place if isinstance(place, Path) else ObjectStore(place.store), mode="w", zarr_format=3)


def open_array(place: Place, name: str, *, quick: bool) -> Any:
    """An array of a complete store, read by zarrs where ``quick`` is set and it can, otherwise by zarr's own pipeline.

    In an object store a chunk that is missing is an error; on a disk, where the census has just found it, fill values.
    """
    with answering(place), pipeline(place) if quick else nullcontext():
        if isinstance(place, Path):
            return zarr.open_array(place / name, mode="r", zarr_format=3)
        return zarr.open_array(_Complete(place.store), path=name, mode="r", zarr_format=3)


def pipeline(place: Place) -> AbstractContextManager[Any]:
    """How an array is read and written, chosen when it is opened: on a disk by zarrs, which is several times faster."""
    if isinstance(place, RemoteFolder):
        return nullcontext()
    quick: AbstractContextManager[Any] = zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    return quick


def answering(place: Place) -> AbstractContextManager[None]:
    """Errors of an object store as our own, while zarr works on it."""
    return place.answering() if isinstance(place, RemoteFolder) else nullcontext()


def forget(place: Place, name: str) -> None:
    """Let the system forget what it keeps in memory of a file, so that the next read comes from where it lies."""
    if isinstance(place, Path):
        drop_from_cache(place / name)


def reading_rate(place: Place, size: int) -> float:
    """Bytes per second of reading a scratch file of this size that is written to a folder, or to its nearest parent."""
    name = f".fastsitch-scratch-{os.getpid()}"
    if isinstance(place, Path):
        place = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
    content = os.urandom(size)
    try:
        if isinstance(place, RemoteFolder):
            place.write(name, content)
        else:
            (place / name).write_bytes(content)
            sync_file(place / name)
            forget(place, name)
        begun = time.perf_counter()
        read_file(place, name)
        return size / (time.perf_counter() - begun)
    finally:
        if isinstance(place, RemoteFolder):
            place.remove(name)
        else:
            (place / name).unlink(missing_ok=True)


class _Complete(ObjectStore[Any]):
    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        found = await super().get(key, *arguments, **options)
        if found is None:
            raise FileNotFoundError(f"{key} is missing")
        return found


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        return file.read(4)
