"""Running a network once over a data set and storing its representations."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastsitch.activations.background_thread import Background
from fastsitch.activations.represent import PASS_IMAGES, represent
from fastsitch.activations.store import ActivationStore
from fastsitch.activations.store_manifest import StoreIdentity, remedy
from fastsitch.activations.store_writer import StoreWriter, writing
from fastsitch.chains.layout import stored_size
from fastsitch.chains.position import Position, chosen_positions
from fastsitch.data import Dataset, ImageFiles, load_dataset
from fastsitch.errors import ConfigError, StoreError, argument, plain
from fastsitch.files import exclusive
from fastsitch.folders import FolderLike, as_folder
from fastsitch.machine import DTYPES, configure, native_bf16, resolve_device
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import Network, load_network, require_fit
from fastsitch.networks.find_network import models_folder
from fastsitch.progress import Progress, Report, ignore
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.receivers.working_precision import working_network
from fastsitch.root import Root

log = logging.getLogger(__name__)


def store_identity(
    dataset: Dataset, network: Network, *, dtype: str, compress: str, device: torch.device
) -> StoreIdentity:
    """What a store of this network on this data set would hold; raises NetworkError where the two do not fit."""
    require_fit(network.record, dataset)
    record = network.record
    return StoreIdentity(
        network=record.name,
        dataset=dataset.name,
        weights=record.weights_hash,
        data=dataset.hash,
        normalisation=record.transform.to_dict(dataset.size),
        dtype=dtype,
        # fp16 convolutions are very slow on CPUs, and no more exact than a cast at the end
        compute="bf16" if dtype == "bf16" and native_bf16(device) else "fp32",
        compress=compress,
    )


@torch.no_grad()
def ensure_store(
    path: FolderLike,
    dataset: Dataset,
    network: Network,
    *,
    dtype: str = "bf16",
    compress: str = "none",
    device: torch.device,
    force: bool = False,
    content_only: bool = False,
    positions: Sequence[int] | None = None,
    report: Report = ignore,
) -> tuple[ActivationStore, bool]:
    """Open the store at ``path``, or make it when there is none; returns it and whether it was made now.

    It holds at least the ``positions`` that are wanted, by index; None: all. One that lacks some is made again, with
    those that it had too. A store that is up to date is left as it is; with ``content_only`` its dtype and compression
    may be others. Raises
    StoreError with the reason when the store is stale or damaged and ``force`` is not set, BusyError when another
    process is writing it (with ``content_only`` it waits instead: any store of this content will do).
    """
    identity = store_identity(dataset, network, dtype=dtype, compress=compress, device=device)
    folder = as_folder(path)
    wanted = set(range(len(network.chain.positions)) if positions is None else positions)
    if folder.exists() and not force:
        store = open_fitting(folder, identity, dataset, content_only=content_only)
        if wanted <= _indices(store):
            return store, False
    with exclusive(folder.lock_file, f"the store of {network.record.name}", wait=content_only):
        if folder.exists() and not force:
            store = open_fitting(folder, identity, dataset, content_only=content_only)
            if wanted <= _indices(store):
                return store, False
            lacking = ", ".join(network.chain.positions[index].name for index in sorted(wanted - _indices(store)))
            log.info("%s lacks %s: it is made again with what it has and them", store.path, lacking)
            wanted |= _indices(store)
            identity = store_identity(
                dataset, network, dtype=store.identity.dtype, compress=store.identity.compress, device=device
            )
        stored = tuple(position for position in network.chain.positions if position.index in wanted)
        sizes = {"train": len(dataset.train), "test": len(dataset.test)}
        frozen = storing_network(network, identity, device, f"use {argument('dtype', 'fp32')}")
        done, total = 0, sum(sizes.values())
        with (
            writing(folder, identity, stored, sizes, len(network.chain.positions)) as writer,
            Background("store-writer") as background,
        ):
            for name, split in (("train", dataset.train), ("test", dataset.test)):
                if isinstance(split.images, ImageFiles):
                    split.images.announce()
                for start in range(0, len(split), writer.block_images):
                    images = split.images[start : start + writer.block_images]
                    block = forward_block(frozen, network, images, DTYPES[identity.dtype], stored)
                    # at most two blocks are in memory: one being written, one being computed
                    background.run(block.write, writer, name, start)
                    done += len(images)
                    report(Progress(done, total, "images", f"precompute {network.record.name}"))
                background.run(writer.write_samples, name, split.labels, torch.arange(len(split)))
        return ActivationStore.open(folder), True


def storing_network(network: Network, identity: StoreIdentity, device: torch.device, remedy: str) -> FrozenNetwork:
    """The network that a store is computed with; raises NetworkError, with ``remedy``, where it does not work so."""
    return working_network(network.chain, network.record.name, remedy, dtype=DTYPES[identity.compute], device=device)


class StoreMaker:
    """Makes the stores of networks of one data set, as :func:`ensure_store` does, on the device of this machine.

    ``positions`` are names or patterns, of which every network has one, and all where one network is ``alone``; none:
    all positions.
    """

    def __init__(
        self,
        root: Root,
        dataset: str,
        *,
        device: str,
        dtype: str = "bf16",
        compress: str = "none",
        force: bool = False,
        content_only: bool = False,
        positions: Sequence[str] = (),
        alone: bool = False,
    ) -> None:
        self._root = root
        self._positions = positions
        self._alone = alone
        self._device = resolve_device(device)
        configure(self._device)
        self._dataset = load_dataset(dataset, root.data_dir)
        self._options: dict[str, Any] = {
            "dtype": dtype,
            "compress": compress,
            "force": force,
            "content_only": content_only,
        }

    def __call__(self, name: NetworkName, report: Report = ignore) -> tuple[ActivationStore, bool]:
        """The store of a network, and whether it was made now; ``report`` gets the images done."""
        path = self._root.store(self._dataset.name, name)
        network = load_network(models_folder(self._root, self._dataset.name, name), name)
        known = [position.name for position in network.chain.positions]
        chosen = chosen_positions(known, self._positions)
        unknown = [pattern for pattern in self._positions if not chosen_positions(known, [pattern])]
        if not chosen or (unknown and self._alone):
            raise ConfigError(
                f"{argument('positions', self._positions)}: {name} has no position {' or '.join(map(plain, unknown))}; "
                f"it has {', '.join(known)}"
            )
        return ensure_store(
            path,
            self._dataset,
            network,
            device=self._device,
            positions=chosen,
            report=report,
            **self._options,
        )


def _indices(store: ActivationStore) -> set[int]:
    """The positions that a store holds."""
    return {position.index for position in store.positions}


def open_fitting(path: FolderLike, identity: StoreIdentity, dataset: Dataset, *, content_only: bool) -> ActivationStore:
    """Open an existing store of a data set.

    Raises StoreError when it is damaged, not the one that ``identity`` describes, or holds other samples.
    """
    store = ActivationStore.open(path)
    reason = store.identity.difference(identity, content_only=content_only)
    if reason is not None:
        raise StoreError(f"{store.path} is stale: {reason}; {remedy(store.path)}")
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        for what, found, expected in (
            ("sample ids", store.ids(name), torch.arange(len(split))),
            ("labels", store.labels(name), split.labels.cpu()),
        ):
            if not torch.equal(found, expected):
                raise StoreError(
                    f"{store.path} holds other samples than {dataset.name}, or in another order: the {what} in {name} "
                    f"differ; {remedy(store.path)}"
                )
    return store


@dataclass(frozen=True)
class Block:
    """Rows (N, H, W, C) of consecutive images at some positions, by their index, in the memory of the host."""

    representations: dict[int, Tensor]
    copied: torch.cuda.Event | None
    """On CUDA: the moment from which the values are there."""

    def write(self, writer: StoreWriter, split: str, start: int) -> None:
        """Write whole chunks at these positions, from image ``start``."""
        if self.copied is not None:
            self.copied.synchronize()
        for index, x_NHWC in self.representations.items():
            writer.write(split, index, start, x_NHWC)


@torch.no_grad()
def forward_block(
    frozen: FrozenNetwork,
    network: Network,
    images: Tensor | ImageFiles,
    dtype: torch.dtype,
    positions: Sequence[Position] | None = None,
) -> Block:
    """Run images (N, H, W, 3), or files, through the network in batches; what it gives at all positions, or at some.

    On CUDA this returns while the device still computes.
    """
    device = frozen.device
    cuda = device.type == "cuda"
    # pinned memory and a second stream let the copies run beside the next batches
    copies = _copy_stream(device) if cuda else None
    positions = frozen.positions if positions is None else positions
    block = {}
    for position in positions:
        row = (*stored_size(position.rows), position.rows[0])
        block[position.index] = torch.empty(len(images), *row, dtype=dtype, pin_memory=cuda)
    for start in range(0, len(images), PASS_IMAGES):
        batch = images[start : start + PASS_IMAGES]
        if isinstance(batch, ImageFiles):
            batch = batch.to(device)
        elif cuda:
            batch = batch.pin_memory().to(device, non_blocking=True)
        raw = represent(frozen, network.record.transform, batch, stored=dtype, dtype=dtype)
        outputs = [position.to_rows(raw[position.index]) for position in positions]
        if copies is not None:
            copies.wait_stream(torch.cuda.current_stream(device))
        with nullcontext() if copies is None else torch.cuda.stream(copies):
            for host, x_NHWC in zip(block.values(), outputs, strict=True):
                host[start : start + len(batch)].copy_(x_NHWC, non_blocking=cuda)
                if copies is not None:
                    x_NHWC.record_stream(copies)
    return Block(block, None if copies is None else copies.record_event())


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
