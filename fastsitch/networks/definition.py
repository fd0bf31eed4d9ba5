"""What an added network is: where its module comes from, where it is cut, and what it sees of an image."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastsitch.data import Normalisation
from fastsitch.errors import ConfigError, NetworkError
from fastsitch.files import write_json
from fastsitch.identity import stable_hash
from fastsitch.networks.chain import Chain
from fastsitch.networks.model_source import ModelSource
from fastsitch.networks.names import NetworkName
from fastsitch.networks.position import Position
from fastsitch.root import Root

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Definition:
    """An added network without its weights; ``to_dict`` is what files hold of it."""

    source: ModelSource
    classes: int
    """Outputs of the network."""
    input_shape: tuple[int, int, int]
    """Channels, height, width that it is built for."""
    normalisation: Normalisation | None
    """Its own mean and standard deviation of pixels in [0, 1]; None: those of the data set."""
    positions: tuple[Position, ...]
    flops: tuple[float, ...]
    """Forward FLOPs per image of every segment, then of the head."""

    def to_dict(self) -> dict[str, Any]:
        positions = [position.to_dict() for position in self.positions]
        return {**asdict(self), "positions": [{**own, "shape": list(own["shape"])} for own in positions]}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Definition":
        """The inverse of :meth:`to_dict`; raises KeyError or TypeError, or NetworkError."""
        given = content["normalisation"]
        channels, height, width = content["input_shape"]
        return cls(
            source=ModelSource(**content["source"]),
            classes=content["classes"],
            input_shape=(channels, height, width),
            normalisation=None if given is None else Normalisation(tuple(given["mean"]), tuple(given["std"])),
            positions=tuple(Position.from_dict(own) for own in content["positions"]),
            flops=tuple(content["flops"]),
        )

    @property
    def width(self) -> int:
        """Channels at the first position, as of the small ResNets."""
        return self.positions[0].rows[0]

    def build(self, key: Any = 0) -> nn.Module:
        """The module with the weights that its own code draws with this seed; see :meth:`ModelSource.build`."""
        return self.source.build(self.classes, self.input_shape, key)

    def cut(self, module: nn.Module) -> Chain:
        """The chain of a module that :meth:`build` made; raises NetworkError when it is not cut as it once was."""
        chain = _chain(module, self.input_shape, [position.name for position in self.positions])
        if [own.to_dict() for own in chain.positions] != [own.to_dict() for own in self.positions]:
            raise NetworkError(
                f"{self.source.text} is not what it was when it was added: it has positions "
                f"{_listed(chain.positions)}, expected {_listed(self.positions)}; add the network again with --force"
            )
        return chain


def define(
    source: ModelSource,
    *,
    classes: int,
    input_shape: tuple[int, int, int],
    normalisation: Normalisation | None = None,
    positions: Sequence[str] | str | None = None,
) -> Definition:
    """Build a network once and find out where it is cut; ``positions`` are those of :meth:`Chain.from_module`.

    Raises NetworkError when it cannot be built, run or cut, or has other outputs than so many classes.
    """
    module = source.build(classes, input_shape)
    if isinstance(module, Chain) and positions is not None:
        raise ConfigError(f"--positions: {source.text} gives a Chain, which has its positions; leave the option out")
    chain = _chain(module, input_shape, positions)
    with torch.no_grad():
        logits = chain(torch.zeros(2, *input_shape))
    if logits.shape != (2, classes):
        raise NetworkError(
            f"{source.text} gives {tuple(logits.shape[1:])} outputs per image: expected {classes}, one for each class"
        )
    if any(is_lazy(parameter) for parameter in module.parameters()):
        raise NetworkError(f"{source.text} has lazy modules: expected weights; run the network once in the factory")
    wrong = [name for name, parameter in module.named_parameters() if not parameter.isfinite().all()]
    if wrong:
        raise NetworkError(f"{source.text} gives first weights that are not finite ({wrong[0]}): expected finite ones")
    definition = Definition(
        source=source,
        classes=classes,
        input_shape=input_shape,
        normalisation=normalisation,
        positions=tuple(chain.positions),
        flops=_flops(chain),
    )
    # exactly as it comes back from a file
    return Definition.from_dict(definition.to_dict())


def read_definition(folder: Path, architecture: str) -> Definition | None:
    """The definition of an added network, None when there is none; raises NetworkError when its file is damaged."""
    path = folder / f"{architecture}.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        found_hash = content.pop("definition_hash")
        if content["format"] != _FORMAT:
            raise NetworkError(f"{path} has another format: expected {_FORMAT}; add the network again with --force")
        if stable_hash(content) != found_hash or content["name"] != architecture:
            raise NetworkError(f"{path} was altered (its own hash does not fit): add the network again with --force")
        return Definition.from_dict(content["definition"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NetworkError(f"{path} is no definition of a network ({error}): add it again with --force") from None


def write_definition(folder: Path, architecture: str, definition: Definition) -> None:
    """Write a definition atomically."""
    content = {"format": _FORMAT, "name": architecture, "definition": definition.to_dict()}
    write_json(folder / f"{architecture}.json", {**content, "definition_hash": stable_hash(content)})


def require_definition(folder: Path, architecture: str) -> Definition:
    """The definition of an added network; raises NetworkError with the names that there are."""
    definition = read_definition(folder, architecture)
    if definition is None:
        known = ", ".join(sorted(path.stem for path in folder.glob("*.json"))) or "none"
        raise NetworkError(
            f"unknown network {architecture!r}: expected R1111 ... R2222, ResNet18, ResNet34, or one that was added "
            f"for {folder.name} ({known}); add it with fastsitch add {architecture} --from torchvision:NAME, timm:NAME "
            "or FILE.py:FACTORY"
        )
    return definition


def require_defined(root: Root, dataset: str, names: Iterable[NetworkName]) -> None:
    """Raise NetworkError when one of these networks is neither built in nor added to the data set."""
    for name in names:
        if not name.built_in:
            require_definition(root.networks(dataset), name.architecture)


def _chain(module: nn.Module, input_shape: tuple[int, int, int], positions: Sequence[str] | str | None) -> Chain:
    # values that are no multiples of each other, so that nothing cancels where the parts are compared with the whole
    example = torch.linspace(-1, 1, math.prod(input_shape)).view(1, *input_shape)
    return Chain.from_module(module, example, positions)


def _flops(chain: Chain) -> tuple[float, ...]:
    """Of one image, as torch counts them: two per multiplication and addition in convolutions and products.

    With gradients enabled, because fused forms of attention that exist without them are not counted.
    """
    # brings Triton with it, which nothing imports before it is needed
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(1, *chain.input_shape)
    counts = []
    for part in (*chain.segments, chain.head):
        with FlopCounterMode(display=False) as counter:
            x = part(x)
        counts.append(float(counter.get_total_flops()))
    return tuple(counts)


def _listed(positions: Sequence[Position]) -> str:
    return ", ".join(f"{position.name} {position.shape}" for position in positions)
