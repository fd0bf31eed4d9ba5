"""Speed of memory and disk: copies, and a real activation store."""

import itertools
import os
import shutil
import tempfile
from pathlib import Path

import torch

from fastsitch.activations.store import ActivationStore
from fastsitch.activations.store_manifest import StoreIdentity
from fastsitch.activations.store_writer import writing
from fastsitch.benchmark.timing_rounds import Spread
from fastsitch.chains.layout import elements, stored_size
from fastsitch.chains.position import Position
from fastsitch.errors import ConfigError, argument
from fastsitch.timing import seconds

STORE_BYTES = 128 << 20
_READ_IMAGES = 1024
_SCRATCH = ".fastsitch-bench-"


def copy_bandwidth(device: torch.device, repeats: int, values: int | None = None) -> Spread:
    """Bytes per second, read and written, of one large copy (256 MiB; 2 GiB on CUDA)."""
    count = values or (1 << 29 if device.type == "cuda" else 1 << 26)
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(repeats + 1)][1:]
    return Spread.of([2 * count * 4 / time for time in times])


def scratch_folder(root: Path) -> Path:
    """The root, or the folder in which it would be created; raises ConfigError where nothing can be written.

    Files that killed benchmarks left there are removed.
    """
    folder = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-", dir=folder).cleanup()
    except OSError:
        raise ConfigError(
            f"{argument('root', root)}: cannot write to {folder}; choose a folder to which you can write"
        ) from None
    for leftover in folder.glob(f"{_SCRATCH}*"):
        process = leftover.name.removeprefix(_SCRATCH).partition("-")[0]
        if process.isdecimal() and not _alive(int(process)):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def store_speeds(
    scratch: Path, positions: tuple[Position, ...], repeats: int, target_bytes: int = STORE_BYTES
) -> dict[str, Spread]:
    """Bytes per second of writing (flushed, with checksums) and reading a bf16 store in a folder.

    ``read`` finds the files in the system's memory; before ``read from disk`` the system is asked to drop them, where
    that is possible.
    """
    values = sum(elements(position.rows) for position in positions)
    images = max(1, target_bytes // (2 * values))
    if images > _READ_IMAGES:
        images -= images % _READ_IMAGES
    data = [
        torch.randn(images, *stored_size(position.rows), position.rows[0]).to(torch.bfloat16) for position in positions
    ]
    identity = StoreIdentity(
        network="bench",
        dataset="random",
        weights="",
        data="",
        normalisation={},
        dtype="bf16",
        compute="bf16",
        compress="none",
    )
    cpu = torch.device("cpu")
    speeds: dict[str, list[float]] = {"store write": [], "store read": [], "store read from disk": []}
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-", dir=scratch) as folder:
        for attempt in range(repeats):
            path = Path(folder) / str(attempt)

            def write(path: Path = path) -> None:
                with writing(path, identity, positions, {"train": images}) as writer:
                    for position, start in itertools.product(positions, range(0, images, writer.block_images)):
                        block = data[position.index][start : start + writer.block_images]
                        step = writer.chunk_images(position)
                        assert start % step == 0
                        writer.write("train", position.index, start, block)
                    writer.write_samples("train", torch.zeros(images, dtype=torch.int64), torch.arange(images))

            def read(path: Path = path) -> None:
                store = ActivationStore.open(path)
                for position, start in itertools.product(positions, range(0, images, _READ_IMAGES)):
                    store.read("train", position.index, start, min(start + _READ_IMAGES, images))

            total = 2 * values * images
            speeds["store write"].append(total / seconds(write, cpu))
            speeds["store read"].append(total / seconds(read, cpu))
            if _drop_from_memory(path):
                speeds["store read from disk"].append(total / seconds(read, cpu))
    return {name: Spread.of(values) for name, values in speeds.items() if values}


def _drop_from_memory(folder: Path) -> bool:
    """Ask the system to drop the files from its memory; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
