"""Adding a network that somebody else defined, with or without its weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn

from fastsitch.chains.layout import Layout
from fastsitch.data import Dataset, DatasetSize, Normalisation, known_size, load_dataset
from fastsitch.errors import ConfigError, NetworkError, argument
from fastsitch.files import exclusive
from fastsitch.identity import tensors_hash
from fastsitch.machine import versions
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import NetworkRecord, read_record, require_fit, save_network
from fastsitch.networks.foreign_weights import load_weights, read_weights
from fastsitch.networks.model_source import ModelSource
from fastsitch.networks.network_definition import Definition, define, read_definition, write_definition
from fastsitch.networks.train_network import evaluate_network
from fastsitch.root import Root
from fastsitch.vocabulary import require_whole

_MAX_SIDE = 4096

_MOST_CLASSES = 100_000
"""Beyond it the last layer alone takes gigabytes."""


@dataclass(frozen=True, kw_only=True)
class NewNetwork:
    """What is to be added; checked on construction. Where a field is None, the data set's own is taken."""

    name: NetworkName
    source: ModelSource
    weights: Path | None = None
    positions: Sequence[str] | str | None = None
    """Names or patterns; None: the default ones, see :meth:`fastsitch.chains.chain.Chain.from_module`."""
    classes: int | None = None
    normalisation: Normalisation | None = None
    layouts: Mapping[str, Layout] | None = None
    """By name of the position, where the one that is found is wrong, or none."""
    resolution: tuple[int, int] | None = None
    """Height and width that the network is built for."""
    channels: int | None = None
    """3, or 1 for a network that sees grey images; None: as it takes them."""
    output: str | int | None = None
    """Name or index of the logits in what it returns; None: see :func:`fastsitch.chains.logits.logits_key`."""

    def __post_init__(self) -> None:
        if self.name.built_in or self.name.random:
            kind = "an untrained control" if self.name.random else "built in"
            raise ConfigError(f"{self.name} is {kind}: expected a new name of letters, digits and _, such as resnet50")
        if self.name.seed and self.weights is None:
            raise ConfigError(
                f"{self.name}: all seeds share one definition; add {self.name.architecture}, or give "
                f"{argument('weights')} of this seed"
            )
        if self.classes is not None:
            require_whole("classes", self.classes, 1, _MOST_CLASSES)
        if self.channels not in (None, 1, 3):
            raise ConfigError(f"{argument('channels', self.channels)}: expected 3, or 1 for grey images")
        if self.resolution is not None and not 1 <= min(self.resolution) <= max(self.resolution) <= _MAX_SIDE:
            raise ConfigError(
                f"{argument('resolution', '{}x{}'.format(*self.resolution))}: expected sides from 1 to {_MAX_SIDE}"
            )


def add_network(
    root: Root, dataset: str, new: NewNetwork, *, device: torch.device, force: bool = False
) -> tuple[Definition, NetworkRecord | None]:
    """Define a network for a data set and, given weights, save it as one that is trained; returns both.

    The module is built, traced and cut. Without weights only the definition is kept, and the network can be trained
    under its name; with weights, which its own code may bring, its accuracy on the test images is measured. What is
    already saved and equal is left alone; nothing is written unless everything worked. Raises ConfigError, DataError,
    or NetworkError, also when the name is registered for another network and ``force`` is not set.
    """
    images = None
    size = known_size(dataset)
    if size is None or new.weights is not None:
        images = load_dataset(dataset, root.data_dir)
        _, height, width = images.input_shape
        size = DatasetSize(len(images.train), len(images.test), images.classes, height, width)
    classes = size.classes if new.classes is None else new.classes
    if classes < size.classes:
        raise ConfigError(
            f"{argument('classes', classes)}: {dataset} has {size.classes} classes; expected at least that many"
        )
    height, width = new.resolution or (size.height, size.width)
    name, folder = new.name, root.networks(dataset)
    definition = define(
        new.source,
        classes=classes,
        input_shape=(new.channels or 3, height, width),
        grey=new.channels is None,
        normalisation=new.normalisation,
        positions=new.positions,
        layouts=new.layouts,
        output=new.output,
    )
    known = None if force else read_definition(folder, name.architecture)
    if known is not None:
        _require_same(name, known, definition)
    record = module = None
    if new.weights is not None or not definition.draws_weights:
        images = images or load_dataset(dataset, root.data_dir)
        module = definition.build()
        record = _evaluated(new, definition, module, images, device)
    models = root.models(dataset)
    if known is not None and _is_saved(models, name, record):
        # nothing is to be written, not even a lock
        return definition, record
    with (
        exclusive(folder / f"{name.architecture}.lock", f"the definition of {name.architecture}"),
        exclusive(models / f"{name}.lock", f"network {name}"),
    ):
        existing = read_record(models, name)
        if record is not None and existing is not None and not force:
            if (existing.weights_hash, existing.definition) != (record.weights_hash, definition):
                raise NetworkError(
                    f"{name} already has other weights on {existing.dataset} ({existing.recipe['name']}): use "
                    f"{argument('force', True)} to replace them, or another seed, such as "
                    f"{name.architecture}@{name.seed + 1}"
                )
            if (existing.data_hash, existing.normalisation) == (record.data_hash, record.normalisation):
                record, module = existing, None
        # once more, now that no other process can add it
        known = None if force else read_definition(folder, name.architecture)
        if known is not None:
            _require_same(name, known, definition)
        write_definition(folder, name.architecture, definition, dataset)
        if record is not None and module is not None:
            save_network(models, module, record)
    return definition, record


def _is_saved(models: Path, name: NetworkName, record: NetworkRecord | None) -> bool:
    """Whether a network with these weights, on this data, is there already; without any, there is nothing to save."""
    if record is None:
        return True
    existing = read_record(models, name)
    if existing is None:
        return False
    kept = ("weights_hash", "definition", "data_hash", "normalisation")
    return all(getattr(existing, field) == getattr(record, field) for field in kept)


def _evaluated(
    new: NewNetwork, definition: Definition, module: nn.Module, images: Dataset, device: torch.device
) -> NetworkRecord:
    """Load the weights into ``module``, unless it brings its own, and measure its accuracy."""
    if new.weights is not None:
        load_weights(module, read_weights(new.weights), new.weights)
    draft = NetworkRecord(
        name=str(new.name),
        dataset=images.name,
        data_hash=images.hash,
        width=definition.width,
        classes=definition.classes,
        input_shape=definition.input_shape,
        normalisation=definition.normalisation or images.normalisation_for(definition.input_shape[0]),
        recipe={"name": "added", "weights": new.source.text if new.weights is None else new.weights.name},
        accuracy=None,
        loss=None,
        weights_hash=tensors_hash(module.state_dict()),
        versions=versions(),
        definition=definition,
    )
    require_fit(draft, images)
    accuracy, loss = evaluate_network(module.to(device), images.test.to(device), draft.transform)
    module.cpu()
    if not math.isfinite(loss):
        given = new.source.text if new.weights is None else argument("weights", new.weights)
        raise NetworkError(f"{given}: the test loss of {new.name} is {loss}; expected usable weights")
    return replace(draft, accuracy=accuracy, loss=loss)


def _require_same(name: NetworkName, known: Definition, wanted: Definition) -> None:
    names = [field.name for field in fields(Definition)]
    differing = [field for field in names if getattr(known, field) != getattr(wanted, field)]
    if differing:
        raise NetworkError(
            f"{name.architecture} is already registered for another network, from {known.source.text} (different "
            f"{', '.join(differing)}): use another name, or {argument('force', True)} to replace it"
        )
