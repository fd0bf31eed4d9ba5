"""Representations of the networks of one data set, from a store or from the running network."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastsitch.activations.live_source import LiveSource, LiveSplit, LiveSplitInOrder
from fastsitch.activations.ordered_split import OrderedSplit, ResidentSplitInOrder, StoredSplitInOrder
from fastsitch.activations.precompute import ensure_store, store_identity
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.activations.source import Source
from fastsitch.activations.store import ActivationStore
from fastsitch.activations.store_manifest import StoreIdentity, StoreManifest
from fastsitch.activations.streamed_source import StreamedSource
from fastsitch.data import Dataset, Split
from fastsitch.machine import DTYPES
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import Network
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.root import Root
from fastsitch.vocabulary import SourceName

log = logging.getLogger(__name__)

Load = Callable[[NetworkName], Network]


@dataclass(frozen=True)
class Origin:
    """What representations are, and where they come from: the store's path, or nothing where the network runs live."""

    identity: StoreIdentity
    store: str


class Representations:
    """Opens networks of one data set as senders, or as receivers whose representations are expected.

    ``source`` and ``chosen`` say where those of a network come from, and which of its positions are needed. Stores are
    made where they are missing, with the positions that are needed; with the live source there are none.
    """

    def __init__(
        self,
        root: Root,
        dataset: Dataset,
        load: Load,
        *,
        source: Callable[[NetworkName], SourceName],
        chosen: Callable[[NetworkName], Sequence[int]] | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._root = root
        self._dataset = dataset
        self._load = load
        self._source = source
        self._chosen = chosen or (lambda name: range(len(load(name).chain.positions)))
        self._dtype = dtype
        self._device = device

    def sender(self, name: NetworkName) -> tuple[Source, OrderedSplit, Origin]:
        """A network's source, and its training images in order."""
        source = self._source(name)
        if source == "live":
            live = LiveSource(self.live(name, self._dataset.train), self.live(name, self._dataset.test))
            return live, LiveSplitInOrder(live.train), self._live_origin(name)
        store = self._store(name)
        chosen = self._chosen(name)
        if source == "streamed":
            ordered = StoredSplitInOrder(store, dtype=self._dtype, device=self._device)
            streamed = StreamedSource(store, dtype=self._dtype, device=self._device, chosen=chosen)
            return streamed, ordered, _origin(store)
        resident = ResidentSource.load(store, dtype=self._dtype, device=self._device, chosen=chosen)
        return resident, ResidentSplitInOrder(resident), _origin(store)

    def expected(self, name: NetworkName, split: str = "train", *, make: bool = True) -> tuple[OrderedSplit, Origin]:
        """A network's own representations of the training or test images, in order.

        Without ``make`` a network that has no store, or one without the positions that are needed, runs live instead.
        """
        if self._source(name) == "live" or not (make or self._holds(name)):
            images = self._dataset.train if split == "train" else self._dataset.test
            return LiveSplitInOrder(self.live(name, images)), self._live_origin(name)
        store = self._store(name)
        return StoredSplitInOrder(store, split, dtype=self._dtype, device=self._device), _origin(store)

    def live(self, name: NetworkName, split: Split) -> LiveSplit:
        """Images as a network sees them that runs as it would for a store, with the store's rounding."""
        network, identity = self._load(name), self._identity(name)
        return LiveSplit(
            FrozenNetwork(network.chain, dtype=DTYPES[identity.compute], device=self._device),
            network.record.transform,
            split,
            stored=DTYPES[identity.dtype],
            dtype=self._dtype,
            chosen=self._chosen(name),
        )

    def _identity(self, name: NetworkName) -> StoreIdentity:
        """Of the store that a sweep would make."""
        return store_identity(self._dataset, self._load(name), dtype="bf16", compress="none", device=self._device)

    def _live_origin(self, name: NetworkName) -> Origin:
        return Origin(self._identity(name), "")

    def _holds(self, name: NetworkName) -> bool:
        """Whether there is a store with the positions that are needed."""
        folder = self._root.store(self._dataset.name, name)
        if not folder.exists():
            return False
        stored = {position.index for position in StoreManifest.read(folder).positions}
        return stored >= set(self._chosen(name))

    def _store(self, name: NetworkName) -> ActivationStore:
        path = self._root.store(self._dataset.name, name)
        if not path.exists():
            log.info("%s has no activation store yet: making %s", name, path)
        return ensure_store(
            path,
            self._dataset,
            self._load(name),
            device=self._device,
            content_only=True,
            positions=self._chosen(name),
        )[0]


class ExpectedSources:
    """The sources of the receivers that one sender is matched to by training, one at a time.

    A network that is matched to itself uses the sender's source for both.
    """

    def __init__(
        self,
        representations: Representations,
        sender: NetworkName,
        source: Source,
        ordered: OrderedSplit,
        origin: Origin,
    ) -> None:
        self._representations = representations
        self._sender = sender, (source, ordered, origin)
        self._held: tuple[NetworkName, tuple[Source, OrderedSplit, Origin]] | None = None

    def of(self, receiver: NetworkName) -> tuple[Source, OrderedSplit, Origin]:
        """A receiver's source, its training images in order and their origin; the one before is released first."""
        sender, opened = self._sender
        if receiver == sender:
            self._held = None
            return opened
        if self._held is None or self._held[0] != receiver:
            self._held = None
            self._held = receiver, self._representations.sender(receiver)
        return self._held[1]


def _origin(store: ActivationStore) -> Origin:
    return Origin(store.identity, str(store.path))
