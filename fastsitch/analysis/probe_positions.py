"""Linear probes at every position of a network: what can be read from its representations of the data set's labels."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsitch.activations.ordered_split import OrderedSplit
from fastsitch.activations.represent import PASS_IMAGES
from fastsitch.activations.representations import Representations
from fastsitch.chains.position import Position
from fastsitch.data import load_dataset
from fastsitch.errors import NetworkError
from fastsitch.machine import configure, resolve_device
from fastsitch.network_names import NetworkName
from fastsitch.networks.linear_probe import LinearProbe, fit_probes
from fastsitch.progress import Progress, Report, ignore
from fastsitch.root import Root
from fastsitch.runs.run_record import known_accuracy
from fastsitch.runs.workbench import Networks
from fastsitch.vocabulary import SPLITS

_MOST_FEATURES = 1 << 26
"""Values of positions of one width that are probed at once: half a gigabyte in fp64."""


@dataclass(frozen=True, kw_only=True)
class PositionProbe:
    """The linear probe at one position.

    Attributes:
        index: of the position.
        position: its name.
        features: numbers per image that the probe sees: the mean of the representation over its map or tokens.
        strength: of the L2 regularisation, chosen on a fifth of the training images.
        train_accuracy: on all training images, 0 to 1.
        test_accuracy: on all test images.
        test_loss: cross-entropy on all test images.
    """

    index: int
    position: str
    features: int
    strength: float
    train_accuracy: float
    test_accuracy: float
    test_loss: float


@dataclass(frozen=True, kw_only=True)
class NetworkProbes:
    """The linear probes of one network.

    Attributes:
        network: its name.
        dataset: the data set.
        accuracy: of the network itself on the test images; NaN where it has no classifier.
        store: where its representations were read from; empty where the network was run.
        weights_hash: of the network.
        data_hash: of the data set.
        positions: a probe for each position, in order.
    """

    network: str
    dataset: str
    accuracy: float
    store: str
    weights_hash: str
    data_hash: str
    positions: tuple[PositionProbe, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the same fields; an accuracy that there is not is None."""
        return {**asdict(self), "accuracy": known_accuracy(self.accuracy)}


class PositionProber:
    """Fits probes to networks of one data set, on one device."""

    def __init__(self, root: Root, dataset: str, *, device: str) -> None:
        self._device = resolve_device(device)
        configure(self._device)
        self._dataset = load_dataset(dataset, root.data_dir)
        self._networks = Networks(root, self._dataset)
        # features are of the numbers that a store has, whether there is one or not
        self._representations = Representations(
            root,
            self._dataset,
            self._networks.load,
            source=lambda name: "streamed",
            dtype=torch.float32,
            device=self._device,
        )

    @torch.no_grad()
    def __call__(self, name: NetworkName, report: Report = ignore) -> NetworkProbes:
        """A probe at every position; ``report`` gets the images done."""
        network = self._networks.describe(name, self._device)
        positions = self._networks.load(name).chain.positions
        features, labels, store = {}, {}, ""
        sizes = {split: len(getattr(self._dataset, split)) for split in SPLITS}
        for split in SPLITS:
            ordered, origin = self._representations.expected(name, split, make=False)
            before = sizes["train"] if split == "test" else 0
            features[split] = _means(ordered, positions, name, before, sum(sizes.values()), report)
            labels[split], store = ordered.labels, origin.store
        probes = _fit(features["train"], labels["train"], self._dataset.classes, str(name))
        return NetworkProbes(
            network=str(name),
            dataset=self._dataset.name,
            accuracy=network.accuracy,
            store=store,
            weights_hash=network.weights_hash,
            data_hash=self._dataset.hash,
            positions=tuple(
                _result(position, probe, x, labels["test"])
                for position, probe, x in zip(positions, probes, features["test"], strict=True)
            ),
        )


def _means(
    ordered: OrderedSplit,
    positions: Sequence[Position],
    name: NetworkName,
    before: int,
    total: int,
    report: Report,
) -> list[Tensor]:
    """The mean over the map, or over all tokens, of every image at every position: (N, channels), fp64."""
    count = len(ordered.labels)
    means: list[list[Tensor]] = [[] for _ in positions]
    for start in range(0, count, PASS_IMAGES):
        stop = min(start + PASS_IMAGES, count)
        for position, blocks in zip(positions, means, strict=True):
            rows_NHWC = ordered.images(position.index, start, stop)
            blocks.append(rows_NHWC.mean((1, 2), dtype=torch.float64))
        report(Progress(before + stop, total, "images", f"probe {name}"))
    return [torch.cat(blocks) for blocks in means]


def _fit(features: Sequence[Tensor], labels: Tensor, classes: int, name: str) -> list[LinearProbe]:
    """Positions of one width are probed as one problem."""
    probes: dict[int, LinearProbe] = {}
    for width in dict.fromkeys(x.shape[1] for x in features):
        indices = [index for index, x in enumerate(features) if x.shape[1] == width]
        together = max(1, _MOST_FEATURES // (len(labels) * width))
        for start in range(0, len(indices), together):
            group = indices[start : start + together]
            try:
                found = fit_probes(torch.stack([features[index] for index in group]), labels, classes)
            except NetworkError as error:
                raise NetworkError(f"{name}: {error.message}") from None
            probes.update(zip(group, found, strict=True))
    return [probes[index] for index in range(len(features))]


def _result(position: Position, probe: LinearProbe, features: Tensor, labels: Tensor) -> PositionProbe:
    logits = probe.logits(features)
    return PositionProbe(
        index=position.index,
        position=position.name,
        features=features.shape[1],
        strength=probe.strength,
        train_accuracy=probe.train_accuracy,
        test_accuracy=(logits.argmax(-1) == labels).double().mean().item(),
        test_loss=F.cross_entropy(logits, labels).item(),
    )
