"""What an added network is: where its module comes from, where it is cut, and what it sees of an image."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsitch.chains.chain import Chain, cut_chain
from fastsitch.chains.chain_flops import chain_flops
from fastsitch.chains.kept_state import not_finite, require_saved
from fastsitch.chains.layout import Layout
from fastsitch.chains.logits import returning_logits
from fastsitch.chains.module_copies import copy_modules
from fastsitch.chains.node_values import run_model
from fastsitch.chains.position import Position
from fastsitch.chains.vet_chain import gradient_faults
from fastsitch.checked_files import DamagedFile, read_json, with_hash
from fastsitch.data import Normalisation, Preprocessing
from fastsitch.errors import ConfigError, NetworkError, argument
from fastsitch.files import write_json
from fastsitch.network_names import NetworkName
from fastsitch.networks.feature_head import FeatureHead, body_of, ending, find_end
from fastsitch.networks.find_network import definitions_folder
from fastsitch.networks.model_source import ModelSource, foreign_code
from fastsitch.networks.weight_origin import draws_weights
from fastsitch.root import Root
from fastsitch.typed_fields import typed
from fastsitch.vocabulary import HeadChoice

log = logging.getLogger(__name__)

_FORMAT = 1

_ADD_AGAIN = f"add the network again with {argument('force', True)}"


@dataclass(frozen=True, kw_only=True)
class Definition:
    """An added network without its weights; ``to_dict`` is what files hold."""

    source: ModelSource
    classes: int
    """Outputs of the network; where it gives features, classes of the data set."""
    input_shape: tuple[int, int, int]
    """Channels, height, width that it is built for."""
    normalisation: Normalisation | None
    """Its own mean and standard deviation of pixels in [0, 1]; None: those of the data set."""
    positions: tuple[Position, ...]
    flops: tuple[float, ...]
    """Forward FLOPs per image of every segment, then of the head."""
    preprocessing: Preprocessing | None = None
    """Of a pretrained network: how its publishers resized and cropped images; None: they are only resized."""
    class_outputs: tuple[int, ...] | None = None
    """The outputs of its head that stand for the classes of the data set, in their order; None: the first ones."""
    draws_weights: bool = True
    """Whether its code draws its weights anew for every seed; False where it brings weights along, as trained ones."""
    output: str | None = None
    """Where its logits are in what it returns; None: it returns them alone."""
    features: FeatureHead | None = None
    """How it ends if its own code gives features; None: in a classifier of its own."""

    def to_dict(self) -> dict[str, Any]:
        positions = [position.to_dict() for position in self.positions]
        content = {
            **asdict(self),
            "source": self.source.to_dict(),
            "positions": [{**entry, "shape": list(entry["shape"])} for entry in positions],
        }
        content["features"] = None if self.features is None else self.features.to_dict()
        content["preprocessing"] = None if self.preprocessing is None else self.preprocessing.to_dict()
        # as in definitions that were made before there were others
        usual = {"draws_weights": True, "preprocessing": None, "class_outputs": None, "output": None, "features": None}
        for key, value in usual.items():
            if content[key] == value:
                del content[key]
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Definition":
        """The inverse of :meth:`to_dict`; raises KeyError or TypeError, or NetworkError."""
        given, preprocessing = content["normalisation"], content.get("preprocessing")
        class_outputs, features = content.get("class_outputs"), content.get("features")
        channels, height, width = content["input_shape"]
        return typed(
            cls(
                source=ModelSource.from_dict(content["source"]),
                classes=content["classes"],
                input_shape=(channels, height, width),
                normalisation=None if given is None else Normalisation(tuple(given["mean"]), tuple(given["std"])),
                positions=tuple(Position.from_dict(entry) for entry in content["positions"]),
                flops=tuple(content["flops"]),
                preprocessing=None if preprocessing is None else Preprocessing.from_dict(preprocessing),
                class_outputs=None if class_outputs is None else tuple(class_outputs),
                draws_weights=content.get("draws_weights", True),
                output=content.get("output"),
                features=None if features is None else FeatureHead.from_dict(features),
            )
        )

    @property
    def width(self) -> int:
        """Channels at the first position, as of the small ResNets."""
        return self.positions[0].rows[0]

    @property
    def can_receive(self) -> bool:
        """Whether it gives one output per class, by a classifier of its own or a probe."""
        return self.features is None or self.features.kind == "probe"

    def build(self, key: Any = 0) -> nn.Module:
        """The module with the weights that its own code draws with this seed; see :meth:`ModelSource.build`.

        It returns logits, whatever else its code returns beside them, or features where it has no classifier.
        """
        if self.features is None:
            return returning_logits(self.source.build(self.classes, self.input_shape, key), self.output)
        module = self.source.build(self.features.outputs, self.input_shape, key)
        return self.features.ended(module, self.output, self.classes, key)

    def cut(self, module: nn.Module) -> Chain:
        """The chain of a module that :meth:`build` made; raises NetworkError when its positions are no longer these."""
        layouts = {position.name: position.kind for position in self.positions}
        with foreign_code(self.source.text), _naming(self.source.text):
            chain = _chain(body_of(module), self.input_shape, list(layouts), layouts, logits=self.features is None)
        if [cut.to_dict() for cut in chain.positions] != [recorded.to_dict() for recorded in self.positions]:
            raise NetworkError(
                f"{self.source.text} has changed since it was added: it has positions "
                f"{_listed(chain.positions)}, expected {_listed(self.positions)}; {_ADD_AGAIN}"
            )
        if self.class_outputs is not None:
            chain.head = nn.Sequential(chain.head, ChosenOutputs(self.class_outputs))
        return chain if self.features is None else ending(chain, module, self.features)


class ChosenOutputs(nn.Module):
    """Some of the outputs (B, N) of a head, as the classes of a data set."""

    index: torch.Tensor

    def __init__(self, outputs: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor(outputs), persistent=False)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_select(-1, self.index)


def define(
    source: ModelSource,
    *,
    classes: int,
    input_shape: tuple[int, int, int],
    normalisation: Normalisation | None = None,
    preprocessing: Preprocessing | None = None,
    class_outputs: tuple[int, ...] | None = None,
    positions: Sequence[str] | str | None = None,
    layouts: Mapping[str, Layout] | None = None,
    output: str | int | None = None,
    grey: bool = False,
    head: HeadChoice | None = None,
    outputs: int | None = None,
    classifier: bool = False,
) -> Definition:
    """Build a network and find its positions and FLOPs; the options are those of :meth:`Chain.from_module`.

    With ``grey``, a network that does not run on images of this shape, but on those of one channel, is taken for them.
    With ``head`` ``probe`` or ``none`` it is built for so many ``outputs``, and its last layers are left out. Raises
    NetworkError when it cannot be built, run or cut, or does not have one output per class where a ``classifier`` is
    wanted.
    """
    outputs = classes if outputs is None else outputs
    module = source.build(outputs, input_shape)
    with foreign_code(source.text), _naming(source.text), torch.no_grad():
        # a first pass may set what stays
        grey = grey and _takes_grey_alone(copy_modules([module])[0], input_shape)
    if grey:
        log.info("%s takes images of one channel: it sees images in grey", source.text)
        input_shape = (1, *input_shape[1:])
        module = source.build(outputs, input_shape)
    if isinstance(module, Chain) and positions is not None:
        raise ConfigError(
            f"{source.text} returns a Chain, whose positions are fixed: leave out {argument('positions')}"
        )
    with foreign_code(source.text), _naming(source.text), torch.no_grad():
        if source.file_hash is None:
            _require_size(copy_modules([module])[0], input_shape)
        key, features = find_end(
            copy_modules([module])[0],
            input_shape,
            classes=classes,
            outputs=outputs,
            head=head,
            output=output,
            required=classifier,
            what=f"cannot cut a {type(module).__name__}",
        )
        body = _body(module, features, key)
        chain = _chain(body, input_shape, positions, layouts, logits=features is None)
    wrong = not_finite(module)
    if wrong:
        raise NetworkError(f"{source.text} has initial weights that are not finite ({wrong}): expected finite ones")
    require_saved(module, source.text)
    other = _body(source.build(outputs, input_shape, 1), features, key)
    kinds = {position.name: position.kind for position in chain.positions}
    with foreign_code(source.text), _naming(source.text):
        drawn = draws_weights(
            source.text,
            body,
            other,
            chain,
            lambda: _chain(other, input_shape, list(kinds), kinds, logits=False, vet=False),
        )
    definition = Definition(
        source=source.with_neighbours(),
        classes=classes,
        input_shape=input_shape,
        normalisation=_of_channels(normalisation, input_shape[0]),
        preprocessing=preprocessing,
        class_outputs=class_outputs,
        positions=tuple(chain.positions),
        flops=chain_flops(chain),
        draws_weights=drawn,
        output=key,
        features=features,
    )
    without, zero = gradient_faults(chain, range(len(chain.positions)))
    if without:
        log.warning("%s: no gradient gets to %s: no receiver positions", source.text, ", ".join(without))
    if zero:
        log.warning("%s: the gradient at %s is zero: stitches there cannot learn", source.text, ", ".join(zero))
    # exactly as it comes back from a file
    return Definition.from_dict(definition.to_dict())


def _body(module: nn.Module, features: FeatureHead | None, key: str | None) -> nn.Module:
    return returning_logits(module, key) if features is None else features.body(module, key)


def _require_size(module: nn.Module, input_shape: tuple[int, int, int]) -> None:
    """Raise NetworkError, with what to do, where a library's network does not run on images of some size."""
    try:
        run_model(module, torch.zeros(2, *input_shape))
    except NetworkError as error:
        raise NetworkError(f"{error.message}; give {argument('resolution')} with a size that it takes") from error


def _takes_grey_alone(module: nn.Module, input_shape: tuple[int, int, int]) -> bool:
    """Whether a module runs on images of one channel, and not on those of this shape."""
    try:
        run_model(module, torch.zeros(2, *input_shape))
    except NetworkError:
        try:
            run_model(module, torch.zeros(2, 1, *input_shape[1:]))
        except NetworkError:
            return False
        return True
    return False


def _of_channels(normalisation: Normalisation | None, channels: int) -> Normalisation | None:
    """One number for all channels where a network has but one."""
    if normalisation is None or len(normalisation.mean) == channels:
        return normalisation
    if len({*normalisation.mean}) > 1 or len({*normalisation.std}) > 1:
        raise ConfigError(
            f"{argument('mean', normalisation.mean)} {argument('std', normalisation.std)}: expected one number of each "
            "for a network that sees images in grey"
        )
    return Normalisation(normalisation.mean[:1] * channels, normalisation.std[:1] * channels)


def read_definition(folder: Path, architecture: str) -> Definition | None:
    """The definition of an added network, None when there is none; raises NetworkError when its file is damaged."""
    path = folder / f"{architecture}.json"
    if path.exists() and not path.is_file():
        raise NetworkError(f"{path} is no regular file: expected the definition of a network; remove it")
    try:
        content = read_json(path, "definition_hash")
        if content["format"] != _FORMAT:
            raise NetworkError(f"{path} has format {content['format']}: expected {_FORMAT}; {_ADD_AGAIN}")
        if content["name"] != architecture:
            raise NetworkError(f"{path} defines {content['name']}: expected {architecture}; {_ADD_AGAIN}")
        return Definition.from_dict(content["definition"])
    except FileNotFoundError:
        return None
    except (DamagedFile, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NetworkError(f"cannot read {path} as the definition of a network ({error}): {_ADD_AGAIN}") from None


def defined_for(folder: Path, architecture: str) -> str | None:
    """The data set that a network was added for; version 0.1 did not write it. Raises what reading the file raises."""
    dataset = read_json(folder / f"{architecture}.json", "definition_hash").get("dataset")
    return dataset if isinstance(dataset, str) else None


def write_definition(folder: Path, architecture: str, definition: Definition, dataset: str) -> None:
    """Write a definition, and the data set that it is for, atomically."""
    content = {"format": _FORMAT, "name": architecture, "dataset": dataset, "definition": definition.to_dict()}
    write_json(folder / f"{architecture}.json", with_hash(content, "definition_hash"))


def require_definition(folder: Path, architecture: str) -> Definition:
    """The definition of an added network; raises NetworkError that lists the names that there are."""
    definition = read_definition(folder, architecture)
    if definition is None:
        known = ", ".join(sorted(path.stem for path in folder.glob("*.json"))) or "none"
        raise NetworkError(
            f"unknown network {architecture!r}: expected R1111 ... R2222, ResNet18, ResNet34, or one that was added "
            f"for {folder.name} ({known}); add it with fastsitch add {architecture} --from torchvision:NAME, timm:NAME "
            "or FILE.py:FACTORY"
        )
    return definition


def require_can_receive(definition: Definition | None, name: NetworkName, what: str) -> None:
    """Raise NetworkError, which says what cannot be, where an added network has no classifier."""
    if definition is not None and not definition.can_receive:
        raise NetworkError(
            f"{name} {what}: it has no classifier, only features; add it with {argument('head', 'probe')}, or have it "
            "as a sender alone"
        )


def require_defined(root: Root, dataset: str, names: Iterable[NetworkName]) -> None:
    """Raise NetworkError when one of these networks is neither built in nor added to the data set."""
    for name in names:
        if not name.built_in:
            require_definition(definitions_folder(root, dataset, name.architecture), name.architecture)


def _chain(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    positions: Sequence[str] | str | None,
    layouts: Mapping[str, Layout] | None,
    *,
    logits: bool,
    vet: bool = True,
) -> Chain:
    # all values differ, so that nothing cancels where the segments are compared with the whole network
    example = torch.linspace(-1, 1, math.prod(input_shape)).view(1, *input_shape)
    if not vet:
        return cut_chain(Chain, module, example, positions, layouts)
    return Chain.from_module(module, example, positions, layouts, logits=logits)


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Begin what is said of a network with where it comes from."""
    try:
        yield
    except NetworkError as error:
        raise NetworkError(f"{source}: {error.message}") from error


def _listed(positions: Sequence[Position]) -> str:
    return ", ".join(f"{position.name} {position.shape}" for position in positions)
