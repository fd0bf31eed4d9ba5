"""Adding a network that somebody else defined, with or without its weights."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsitch.chains.chain import Chain
from fastsitch.chains.layout import Layout
from fastsitch.data import Dataset, DatasetSize, Normalisation, known_size, load_dataset
from fastsitch.errors import ConfigError, NetworkError, argument
from fastsitch.files import exclusive
from fastsitch.identity import tensors_hash
from fastsitch.machine import versions
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import NetworkRecord, read_record, require_fit, save_network
from fastsitch.networks.class_names import examples, fits_some, matched_outputs, read_class_outputs
from fastsitch.networks.feature_head import ProbedNetwork, body_of
from fastsitch.networks.fit_probe import fit_probe, require_finite_features
from fastsitch.networks.foreign_weights import WeightsFile, load_weights
from fastsitch.networks.head_layers import head_layers
from fastsitch.networks.model_source import ModelSource, foreign_code
from fastsitch.networks.network_definition import Definition, define, read_definition, write_definition
from fastsitch.networks.pretrained_network import PretrainedNetwork, load_pretrained
from fastsitch.networks.put_weights import put_weights
from fastsitch.networks.train_network import evaluate_network
from fastsitch.root import Root
from fastsitch.vocabulary import HeadChoice, require_choice, require_whole

log = logging.getLogger(__name__)

_MAX_SIDE = 4096

_MOST_CLASSES = 100_000
"""Beyond it the last layer alone takes gigabytes."""

_CHANCE = 2.0
"""A pretrained network that is not this many times as good as guessing sees other classes than it was trained on."""


@dataclass(frozen=True, kw_only=True)
class NewNetwork:
    """What is to be added; checked on construction. Where a field is None, the data set's own is taken."""

    name: NetworkName
    source: ModelSource
    weights: Path | None = None
    """A file, an index of shards, or a folder with one of them."""
    weights_key: str | None = None
    """Which weights in the file, see :class:`WeightsFile`."""
    head: HeadChoice | None = None
    """What stands in the place of its last layer; None: that of the weights."""
    pretrained: bool = False
    """With the weights and the preprocessing that its library publishes."""
    classes_from: Path | None = None
    """Says which output of a pretrained network each class is, where names do not."""
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
        for other in ("weights", "classes", "channels", "output") if self.pretrained else ():
            if getattr(self, other) is not None:
                raise ConfigError(
                    f"{argument('pretrained', True)} brings all weights along: leave out {argument(other)}"
                )
        if self.classes_from is not None and not self.pretrained:
            raise ConfigError(f"{argument('classes_from')} is for networks with {argument('pretrained', True)}")
        if self.name.seed and self.weights is None and not self.pretrained:
            raise ConfigError(
                f"{self.name}: all seeds share one definition; add {self.name.architecture}, or give "
                f"{argument('weights')} of this seed"
            )
        if self.head is not None:
            require_choice("head", self.head, HeadChoice)
        for option, value in (("weights_key", self.weights_key), ("head", self.head)):
            if value not in (None, "probe", "none") and self.weights is None:
                raise ConfigError(f"{argument(option, value)}: expected {argument('weights')} too")
        if self.features_only and self.classes_from is not None:
            raise ConfigError(
                f"{argument('head', self.head)} has no outputs of its own: leave out {argument('classes_from')}"
            )
        if self.classes is not None:
            require_whole("classes", self.classes, 1, _MOST_CLASSES)
        if self.channels not in (None, 1, 3):
            raise ConfigError(f"{argument('channels', self.channels)}: expected 3, or 1 for grey images")
        if self.resolution is not None and not 1 <= min(self.resolution) <= max(self.resolution) <= _MAX_SIDE:
            raise ConfigError(
                f"{argument('resolution', '{}x{}'.format(*self.resolution))}: expected sides from 1 to {_MAX_SIDE}"
            )

    @property
    def features_only(self) -> bool:
        """Whether its own classifier is left out."""
        return self.head in ("probe", "none")


def add_network(
    root: Root, dataset: str, new: NewNetwork, *, device: torch.device, force: bool = False
) -> tuple[Definition, NetworkRecord | None]:
    """Define a network for a data set and, given weights, save it as one that is trained; returns both.

    The module is built, traced and cut. Without weights only the definition is kept, and the network can be trained
    under its name; with weights, which its own code may bring, its accuracy on the test images is measured. What is
    already saved and equal is left alone; nothing is written unless everything worked. Raises ConfigError, DataError,
    or NetworkError, also when the name is registered for another network and ``force`` is not set.
    """
    name, folder = new.name, root.networks(dataset)
    published = load_pretrained(new.source, new.resolution) if new.pretrained else None
    images = None
    if known_size(dataset) is None or new.weights is not None or published is not None or new.head == "probe":
        images = load_dataset(dataset, root.data_dir)
    definition = (
        _define(new, dataset, known_size(dataset) or _size(images), images)
        if published is None or images is None
        else _define_pretrained(new, published, images)
    )
    known = None if force else read_definition(folder, name.architecture)
    if known is not None:
        _require_same(name, known, definition)
    record = module = None
    drawn = new.weights is None and published is None and definition.draws_weights
    if drawn and not definition.can_receive:
        raise NetworkError(
            f"{new.source.text} has neither a classifier nor weights, and nothing to train them: give "
            f"{argument('weights')} or {argument('pretrained', True)}, or {argument('head', 'probe')}"
        )
    if definition.features is not None and new.head is None:
        log.warning(
            "%s gives %d features, not one output for each of %d classes: without --head probe it is a sender only",
            new.source.text,
            definition.features.width,
            definition.classes,
        )
    if not drawn or new.head == "probe":
        images = images or load_dataset(dataset, root.data_dir)
        # what its head keeps, if that is new, depends on the seed
        key = ["network", str(name), definition.classes] if drawn or new.head == "new" else 0
        module = definition.build(key)
        record = _evaluated(new, definition, module, images, published, device)
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


def _size(images: Dataset | None) -> DatasetSize:
    assert images is not None
    _, height, width = images.input_shape if images.size is not None else (3, 0, 0)
    return DatasetSize(len(images.train), len(images.test), images.classes, height, width)


def _define(new: NewNetwork, dataset: str, size: DatasetSize, images: Dataset | None) -> Definition:
    classes = size.classes if new.classes is None else new.classes
    if classes < size.classes and not new.features_only:
        raise ConfigError(
            f"{argument('classes', classes)}: {dataset} has {size.classes} classes; expected at least that many"
        )
    if new.resolution is None and images is not None:
        # raises where the images have several
        _, height, width = images.input_shape
    height, width = new.resolution or (size.height, size.width)
    return define(
        new.source,
        classes=size.classes if new.features_only else classes,
        outputs=classes,
        head=new.head,
        classifier=new.classes is not None or new.head == "new",
        input_shape=(new.channels or 3, height, width),
        grey=new.channels is None,
        normalisation=new.normalisation,
        positions=new.positions,
        layouts=new.layouts,
        output=new.output,
    )


def _define_pretrained(new: NewNetwork, published: PretrainedNetwork, images: Dataset) -> Definition:
    features = new.features_only or not published.classes
    return define(
        published.source,
        classes=images.classes if features else published.classes,
        outputs=published.classes,
        head=new.head or ("none" if features else None),
        input_shape=published.input_shape,
        normalisation=new.normalisation or published.normalisation,
        preprocessing=published.preprocessing,
        class_outputs=None if features else _class_outputs(new, published, images),
        positions=new.positions,
        layouts=new.layouts,
    )


def _class_outputs(new: NewNetwork, published: PretrainedNetwork, images: Dataset) -> tuple[int, ...] | None:
    """The outputs of a pretrained network for the classes of a data set; None where they are its first ones."""
    given = {} if new.classes_from is None else read_class_outputs(new.classes_from)
    names, known = images.class_names, published.labels
    if given and names is None:
        names = tuple(map(str, range(images.classes)))
    if names is not None and (given or (known is not None and fits_some(names, known.names))):
        labels = tuple((str(k),) for k in range(published.classes)) if known is None else known.names
        outputs = matched_outputs(names, labels, given, new.source.text)
        return None if outputs == tuple(range(published.classes)) else outputs
    stated = None if known is None or known.guessed or names is None else known.names
    if images.classes != published.classes or stated is not None:
        such_as = "" if stated is None else f", such as {examples(stated)},"
        raise NetworkError(
            f"{new.source.text} has {published.classes} outputs{such_as} and {images.name} {images.classes} classes, "
            f"whose names are not those of its outputs: say which is which in a file for {argument('classes_from')}, "
            f"a line each such as 'class,output', or take a linear probe: {argument('head', 'probe')}"
        )
    return None


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
    new: NewNetwork,
    definition: Definition,
    module: nn.Module,
    images: Dataset,
    published: PretrainedNetwork | None,
    device: torch.device,
) -> NetworkRecord:
    """Load the weights into ``module``, unless it brings its own, and measure its accuracy."""
    recipe: dict[str, Any] = {
        "name": "added",
        "weights": new.source.text if new.weights is None else new.weights.name,
    }
    body, end = body_of(module), definition.features
    left_out = () if end is None else end.left_out
    if published is not None:
        beside = tuple(f"{layer}." for layer in left_out)
        weights = published.module.state_dict()
        put_weights(body, {key: tensor for key, tensor in weights.items() if not key.startswith(beside)})
        recipe = {"name": "pretrained", "weights": new.source.text, "pretrained": published.provenance}
    elif new.weights is not None:
        file = WeightsFile(path=new.weights, key=new.weights_key, head=new.head)
        recipe |= load_weights(body, file, lambda: list(left_out) if end else _head(module, definition))
    elif definition.draws_weights:
        recipe["weights"] += ", as drawn"
    draft = NetworkRecord(
        name=str(new.name),
        dataset=images.name,
        data_hash=images.hash,
        width=definition.width,
        classes=definition.classes,
        input_shape=definition.input_shape,
        normalisation=definition.normalisation or images.normalisation_for(definition.input_shape[0]),
        recipe=recipe,
        accuracy=None,
        loss=None,
        weights_hash=tensors_hash(module.state_dict()),
        versions=versions(),
        definition=definition,
    )
    require_fit(draft, images)
    evaluated = module if definition.class_outputs is None and end is None else definition.cut(module)
    # a module may override these, and return nothing
    nn.Module.to(evaluated, device)
    if isinstance(module, ProbedNetwork):
        assert isinstance(evaluated, Chain)
        probe = fit_probe(module, evaluated, images.train.to(device), draft.transform)
        draft = replace(
            draft, recipe={**recipe, "probe": probe.to_dict()}, weights_hash=tensors_hash(module.state_dict())
        )
    elif end is not None:
        require_finite_features(evaluated, images.test.to(device), draft.transform, str(new.name))
        nn.Module.cpu(module)
        return draft
    accuracy, loss = evaluate_network(evaluated, images.test.to(device), draft.transform)
    nn.Module.cpu(module)
    if published is not None and accuracy < _CHANCE / images.classes:
        log.warning(
            "%s is right on %.1f %% of the test images, near chance: are the classes its outputs (--classes-from)?",
            new.source.text,
            100 * accuracy,
        )
    if not math.isfinite(loss):
        given = new.source.text if new.weights is None else argument("weights", new.weights)
        raise NetworkError(f"{given}: the test loss of {new.name} is {loss}; expected usable weights")
    return replace(draft, accuracy=accuracy, loss=loss)


def _head(module: nn.Module, definition: Definition) -> list[str]:
    with foreign_code(definition.source.text):
        return head_layers(module, definition.classes, definition.input_shape)


def _require_same(name: NetworkName, known: Definition, wanted: Definition) -> None:
    names = [field.name for field in fields(Definition)]
    differing = [field for field in names if getattr(known, field) != getattr(wanted, field)]
    if differing:
        raise NetworkError(
            f"{name.architecture} is already registered for another network, from {known.source.text} (different "
            f"{', '.join(differing)}): use another name, or {argument('force', True)} to replace it"
        )
