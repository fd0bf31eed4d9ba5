"""Adding a network that somebody else defined, with or without its weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn

from fastsitch.data import Dataset, DatasetSize, Normalisation, known_size, load_dataset
from fastsitch.errors import ConfigError, NetworkError
from fastsitch.files import exclusive
from fastsitch.identity import tensors_hash
from fastsitch.machine import versions
from fastsitch.networks.checkpoint import NetworkRecord, read_record, require_fit, save_network
from fastsitch.networks.definition import Definition, define, read_definition, write_definition
from fastsitch.networks.foreign_weights import load_weights, read_weights
from fastsitch.networks.model_source import ModelSource
from fastsitch.networks.names import NetworkName
from fastsitch.networks.training import evaluate_network
from fastsitch.root import Root

_MAX_SIDE = 4096


@dataclass(frozen=True, kw_only=True)
class NewNetwork:
    """What is to be added; checked on construction. None stands for what the data set has."""

    name: NetworkName
    source: ModelSource
    weights: Path | None = None
    positions: Sequence[str] | str | None = None
    """Names or patterns; None: the default ones, see :meth:`fastsitch.networks.chain.Chain.from_module`."""
    classes: int | None = None
    normalisation: Normalisation | None = None
    resolution: tuple[int, int] | None = None
    """Height and width that the network is built for."""

    def __post_init__(self) -> None:
        if self.name.built_in or self.name.random:
            kind = "an untrained control" if self.name.random else "built in"
            raise ConfigError(f"{self.name} is {kind}: expected a new name of letters, digits and _, such as resnet50")
        if self.name.seed and self.weights is None:
            raise ConfigError(
                f"{self.name}: a definition serves all seeds; add {self.name.architecture}, or name "
                "--weights of this seed"
            )
        if self.classes is not None and self.classes < 1:
            raise ConfigError(f"--classes {self.classes}: expected at least 1")
        if self.resolution is not None and not 1 <= min(self.resolution) <= max(self.resolution) <= _MAX_SIDE:
            raise ConfigError(
                f"--resolution {self.resolution[0]}x{self.resolution[1]}: expected sides from 1 to {_MAX_SIDE}"
            )


def add_network(
    root: Root, dataset: str, new: NewNetwork, *, device: torch.device, force: bool = False
) -> tuple[Definition, NetworkRecord | None]:
    """Define a network for a data set and, given weights, save it as one that is trained; returns both.

    The module is built, traced and cut once. Without weights only the definition is kept, and the network can be
    trained under its name; with weights its accuracy on the test images is measured. What is there already just so is
    left alone. Nothing is written unless all of it worked. Raises ConfigError, DataError, or NetworkError, also when
    the name stands for something else and ``force`` is not set.
    """
    images = None
    size = known_size(dataset)
    if size is None or new.weights is not None:
        images = load_dataset(dataset, root.data_dir)
        _, height, width = images.input_shape
        size = DatasetSize(len(images.train), len(images.test), images.classes, height, width)
    classes = size.classes if new.classes is None else new.classes
    if classes < size.classes:
        raise ConfigError(f"--classes {classes}: {dataset} has {size.classes} classes; expected at least as many")
    height, width = new.resolution or (size.height, size.width)
    name, folder = new.name, root.networks(dataset)
    definition = define(
        new.source,
        classes=classes,
        input_shape=(3, height, width),
        normalisation=new.normalisation,
        positions=new.positions,
    )
    known = None if force else read_definition(folder, name.architecture)
    if known is not None:
        _require_same(name, known, definition)
    record = module = None
    if new.weights is not None:
        assert images is not None
        module = definition.build()
        record = _evaluated(new, definition, module, images, device)
    models = root.models(dataset)
    with (
        exclusive(folder / f"{name.architecture}.lock", f"the definition of {name.architecture}"),
        exclusive(models / f"{name}.lock", f"network {name}"),
    ):
        existing = read_record(models, name)
        if record is not None and existing is not None and not force:
            if (existing.weights_hash, existing.definition) != (record.weights_hash, definition):
                raise NetworkError(
                    f"{name} has other weights already on {existing.dataset} ({existing.recipe['name']}): use --force "
                    f"to replace them, or another seed, such as {name.architecture}@{name.seed + 1}"
                )
            if (existing.data_hash, existing.normalisation) == (record.data_hash, record.normalisation):
                record, module = existing, None
        # again, now that nobody else adds it
        known = None if force else read_definition(folder, name.architecture)
        if known is not None:
            _require_same(name, known, definition)
        write_definition(folder, name.architecture, definition)
        if record is not None and module is not None:
            save_network(models, module, record)
    return definition, record


def _evaluated(
    new: NewNetwork, definition: Definition, module: nn.Module, images: Dataset, device: torch.device
) -> NetworkRecord:
    """Load the weights into ``module``, and measure its accuracy."""
    assert new.weights is not None
    load_weights(module, read_weights(new.weights), new.weights)
    draft = NetworkRecord(
        name=str(new.name),
        dataset=images.name,
        data_hash=images.hash,
        width=definition.width,
        classes=definition.classes,
        input_shape=definition.input_shape,
        normalisation=definition.normalisation or images.normalisation,
        recipe={"name": "added", "weights": new.weights.name},
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
        raise NetworkError(f"--weights {new.weights}: the test loss of {new.name} is {loss}; expected usable weights")
    return replace(draft, accuracy=accuracy, loss=loss)


def _require_same(name: NetworkName, known: Definition, wanted: Definition) -> None:
    differing = [own.name for own in fields(Definition) if getattr(known, own.name) != getattr(wanted, own.name)]
    if differing:
        raise NetworkError(
            f"{name.architecture} stands for another network already, from {known.source.text} (other "
            f"{', '.join(differing)}): use another name, or --force to define it anew"
        )
