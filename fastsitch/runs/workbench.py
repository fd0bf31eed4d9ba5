"""A run that is opened for work: its data set, its networks and their representations, on one device."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace

import torch

from fastsitch.activations.representations import Representations
from fastsitch.chains.chain import Chain
from fastsitch.data import Dataset, Transform, load_dataset
from fastsitch.errors import RunError, argument
from fastsitch.machine import DTYPES
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import Network, load_network, require_fit
from fastsitch.networks.find_network import models_folder
from fastsitch.networks.train_network import evaluate_network
from fastsitch.receivers.batch_statistics_network import BatchStatisticsNetwork
from fastsitch.receivers.compiled_blocks import compile_blocks
from fastsitch.receivers.contract import Receiver
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.receivers.graph_segment import use_graphs
from fastsitch.root import Root
from fastsitch.runs.continue_run import require_same_data
from fastsitch.runs.run import Run
from fastsitch.runs.run_record import NetworkInput
from fastsitch.vocabulary import Attention, SourceName

log = logging.getLogger(__name__)


class Networks:
    """Networks of one data set, each loaded once. Those of a ``run`` have to be the ones that it began with."""

    def __init__(self, root: Root, dataset: Dataset, run: Run | None = None) -> None:
        self.dataset = dataset
        self._root = root
        self._run = run
        self._loaded: dict[NetworkName, Network] = {}
        self._frozen: dict[tuple[NetworkName, torch.dtype, torch.device, Attention], FrozenNetwork] = {}

    def load(self, name: NetworkName) -> Network:
        """A network in memory; raises NetworkError, or RunError where it is not what the run began with."""
        if name not in self._loaded:
            network = load_network(models_folder(self._root, self.dataset.name, name), name)
            require_fit(network.record, self.dataset)
            if self._other_test_images(network):
                network = replace(network, record=replace(network.record, accuracy=None, loss=None))
            self._require_same(name, network)
            self._loaded[name] = network
        return self._loaded[name]

    def receiver(
        self, name: NetworkName, dtype: torch.dtype, device: torch.device, attention: Attention
    ) -> FrozenNetwork:
        """A network that gradients pass through, its segments as graphs; made once."""
        key = (name, dtype, device, attention)
        if key not in self._frozen:
            chain = self.load(name).chain
            self._frozen[key] = use_graphs(FrozenNetwork(chain, dtype=dtype, device=device), chain, attention)
        return self._frozen[key]

    def _other_test_images(self, network: Network) -> bool:
        """Whether the recorded accuracy is, or may be, on other images than the test images at hand."""
        whole = self.dataset.whole
        if whole is None or network.record.dataset != whole.name:
            return False
        return not whole.all_tested or whole.hash is None

    def _require_same(self, name: NetworkName, network: Network) -> None:
        recorded = None if self._run is None else self._run.networks.get(name)
        if self._run is not None and recorded is not None and network.record.weights_hash != recorded.weights_hash:
            raise RunError(
                f"{name} is not what run {self._run.name!r} began with: it was trained again, or this machine builds "
                f"it otherwise; use another {argument('run')} name, or the same versions everywhere"
            )

    def describe(self, name: NetworkName, device: torch.device) -> NetworkInput:
        """What a run records; the accuracy of an untrained control is measured here, as is one on other images."""
        record, chain = self.load(name).record, self.load(name).chain
        accuracy = record.accuracy
        if record.definition is not None and not record.definition.can_receive:
            accuracy = math.nan
        elif accuracy is None:
            accuracy, _ = evaluate_network(chain.to(device), self.dataset.test.to(device), record.transform)
            chain.cpu()
            log.info("%s: accuracy %.4f on the test images of %s", name, accuracy, self.dataset.name)
        size = self.dataset.size
        transform = record.transform.to_dict(size)
        # images of several sizes have no transform in common
        usual = None if size is None else Transform(self.dataset.normalisation).to_dict(size)
        return NetworkInput(
            weights_hash=record.weights_hash,
            width=record.width,
            accuracy=accuracy,
            positions=tuple((position.name, position.rows) for position in chain.positions),
            transform=None if transform == usual else transform,
            weights=record.recipe.get("pretrained"),
        )


class Workbench:
    """What training, measuring and generating images need of a run.

    ``source`` says where the representations of a network come from, if not from what is frozen into the run.
    """

    def __init__(
        self,
        root: Root,
        run: Run,
        networks: Networks,
        device: torch.device,
        source: Callable[[NetworkName], SourceName] | None = None,
    ) -> None:
        self.root = root
        self.run = run
        self.networks = networks
        self.source = source or run.resolved.source_of
        self.dataset = networks.dataset
        self.device = device
        self.dtype = DTYPES[run.resolved.precision]
        self.representations = Representations(
            root,
            self.dataset,
            networks.load,
            source=self.source,
            chosen=run.plan.chosen,
            dtype=self.dtype,
            device=device,
        )
        self._receivers: dict[NetworkName, Receiver] = {}

    @classmethod
    def open(
        cls, root: Root, run: Run, device: torch.device, source: Callable[[NetworkName], SourceName] | None = None
    ) -> "Workbench":
        """Load the run's data set; raises DataError, or RunError where it is not the one that the run began with."""
        dataset = load_dataset(run.config.dataset, root.data_dir)
        require_same_data(run, dataset.hash)
        return cls(root, run, Networks(root, dataset, run), device, source)

    def receiver(self, name: NetworkName) -> Receiver:
        """A network as the run's stitches see it when they are trained; made once."""
        if name not in self._receivers:
            self._receivers[name] = self._receiver(name)
        return self._receivers[name]

    def _receiver(self, name: NetworkName) -> Receiver:
        config = self.run.config
        if config.receiver_bn == "frozen" and config.loss == "task":
            attention = self.run.resolved.attention
            return self._compiled(self.networks.receiver(name, self.dtype, self.device, attention))
        chain = self.networks.load(name).chain
        if config.receiver_bn == "frozen":
            return self._compiled(FrozenNetwork(chain, dtype=self.dtype, device=self.device))
        return BatchStatisticsNetwork(chain, dtype=self.dtype, device=self.device)

    def freeze(self, chain: Chain) -> FrozenNetwork:
        """A chain in the run's precision, that gradients pass through; compiled where the run is."""
        frozen = FrozenNetwork(chain, dtype=self.dtype, device=self.device)
        return self._compiled(use_graphs(frozen, chain, self.run.resolved.attention))

    def _compiled(self, network: FrozenNetwork) -> FrozenNetwork:
        return compile_blocks(network) if self.run.resolved.compile == "on" else network
