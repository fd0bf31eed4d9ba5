"""Run a network once over a data set and keep its representations."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from fastsitch.activations.live import PASS_IMAGES
from fastsitch.activations.store import ActivationStore, StoreIdentity, remedy, stale
from fastsitch.activations.writer import StoreWriter, writing
from fastsitch.data import Dataset, Split
from fastsitch.errors import StoreError
from fastsitch.files import exclusive
from fastsitch.machine import DTYPES, native_bf16
from fastsitch.networks.checkpoint import Network, require_fit
from fastsitch.networks.frozen import FrozenNetwork

Report = Callable[[int, int], None]
"""report(images done, images in all)."""


def store_identity(
    dataset: Dataset, network: Network, *, dtype: str, compress: str, device: torch.device
) -> StoreIdentity:
    """What a store of this network on this data set would hold; raises NetworkError where the two do not fit."""
    require_fit(network, dataset)
    record = network.record
    return StoreIdentity(
        network=record.name,
        dataset=dataset.name,
        weights=record.weights_hash,
        data=dataset.hash,
        normalisation={key: list(value) for key, value in asdict(record.normalisation).items()},
        dtype=dtype,
        # fp16 convolutions are very slow on CPUs, and no more exact than a cast at the end
        compute="bf16" if dtype == "bf16" and native_bf16(device) else "fp32",
        compress=compress,
    )


@torch.no_grad()
def ensure_store(
    path: Path,
    dataset: Dataset,
    network: Network,
    *,
    dtype: str = "bf16",
    compress: str = "none",
    device: torch.device,
    force: bool = False,
    content_only: bool = False,
    report: Report | None = None,
) -> tuple[ActivationStore, bool]:
    """Open the store at ``path``, or make it when there is none; returns it and whether it was made now.

    A store that is up to date is left alone; with ``content_only`` its dtype and compression may be others. Raises
    StoreError with the reason when the store is stale or damaged and ``force`` is not set, BusyError when another
    process is writing it (``content_only`` waits instead: any store of this content will do).
    """
    identity = store_identity(dataset, network, dtype=dtype, compress=compress, device=device)
    if path.exists() and not force:
        return open_fitting(path, identity, content_only=content_only), False
    with exclusive(path.with_name(path.name + ".lock"), f"the store of {network.record.name}", wait=content_only):
        if path.exists() and not force:
            return open_fitting(path, identity, content_only=content_only), False
        sizes = {"train": len(dataset.train), "test": len(dataset.test)}
        frozen = FrozenNetwork(network.chain, dtype=DTYPES[identity.compute], device=device)
        done, total = 0, sum(sizes.values())
        with writing(path, identity, network.chain.positions, sizes) as writer:
            for name, split in (("train", dataset.train), ("test", dataset.test)):
                for start in range(0, len(split), writer.block_images):
                    end = min(start + writer.block_images, len(split))
                    _write_block(writer, frozen, network, name, split, start, end)
                    done += end - start
                    if report is not None:
                        report(done, total)
                writer.write_samples(name, split.labels, torch.arange(len(split)))
        return ActivationStore.open(path), True


def open_fitting(path: Path, identity: StoreIdentity, *, content_only: bool) -> ActivationStore:
    """Open an existing store; raises StoreError when it is damaged or not the one that ``identity`` describes."""
    store = ActivationStore.open(path)
    reason = stale(store, identity, content_only=content_only)
    if reason is not None:
        raise StoreError(f"{path} is stale: {reason}; {remedy(path)}")
    return store


def _write_block(
    writer: StoreWriter,
    frozen: FrozenNetwork,
    network: Network,
    name: str,
    split: Split,
    start: int,
    end: int,
) -> None:
    """Forward images start ... end - 1 in batches and write whole chunks at every position."""
    outputs: list[list[torch.Tensor]] = [[] for _ in frozen.positions]
    for first in range(start, end, PASS_IMAGES):
        images = split.images[first : min(first + PASS_IMAGES, end)].to(frozen.device)
        x = network.record.normalisation.apply(images)
        for collected, representation in zip(outputs, frozen.representations(x), strict=True):
            collected.append(representation.permute(0, 2, 3, 1).to(DTYPES[writer.identity.dtype]))
    for position, collected in zip(frozen.positions, outputs, strict=True):
        block = torch.cat(collected)
        step = writer.chunk_images(position)
        assert start % step == 0
        writer.write(name, position.index, start, block)
