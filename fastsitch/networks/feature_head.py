"""How a network ends that gives features instead of one output per class: bare, or in a linear probe on them."""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastsitch.chains.chain import Chain
from fastsitch.chains.logits import logits_key, output_part, returning_logits
from fastsitch.chains.node_values import run_model
from fastsitch.errors import NetworkError, argument
from fastsitch.identity import torch_generator
from fastsitch.networks.head_layers import head_layers
from fastsitch.vocabulary import HeadChoice

log = logging.getLogger(__name__)

_POOLED: dict[int, tuple[int, ...]] = {2: (), 3: (1,), 4: (2, 3)}
"""By the dimensions of what a network gives, those over which the mean is taken: none of (B, D), the tokens of
(B, N, D), the map of (B, D, H, W)."""


@dataclass(frozen=True, kw_only=True)
class FeatureHead:
    """The end of a network that gives features; ``to_dict`` is what its definition holds."""

    kind: Literal["none", "probe"]
    """A probe has one output per class; without it the network can only be a sender."""
    width: int
    """Features per image."""
    outputs: int
    """Of the network as its code builds it."""
    left_out: tuple[str, ...] = ()
    """Its last layers, in whose place there is nothing."""
    pooled: tuple[int, ...] = ()
    """Dimensions of what it gives over which the mean is taken."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "FeatureHead":
        """The inverse of :meth:`to_dict`, also from JSON; raises KeyError or TypeError."""
        lists = {key: tuple(content[key]) for key in ("left_out", "pooled")}
        return cls(**{**content, **lists})

    def body(self, module: nn.Module, output: str | None) -> nn.Module:
        """The same module, which from now on returns its features (B, width); names of its weights stay as they are."""
        leave_out(module, self.left_out)
        module = returning_logits(module, output)
        if self.pooled:
            module.register_forward_hook(partial(_mean, self.pooled))
        return module

    def ended(self, module: nn.Module, output: str | None, classes: int, key: Any) -> nn.Module:
        """The body alone, or with a probe whose weights are drawn from a generator seeded by ``key``."""
        body = self.body(module, output)
        return body if self.kind == "none" else ProbedNetwork(body, self.width, classes, key)


class ProbedNetwork(nn.Module):
    """A network that gives features (B, width), and a linear layer on them: the probe.

    The layer starts as torch's own linear layers do.
    """

    def __init__(self, body: nn.Module, width: int, classes: int, key: Any) -> None:
        super().__init__()
        self.body = body
        with torch.random.fork_rng(devices=[]):
            self.probe = nn.Linear(width, classes)
        generator, bound = torch_generator("probe", key), 1 / math.sqrt(width)
        for parameter in self.probe.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.probe(self.body(x))
        return logits


def body_of(module: nn.Module) -> nn.Module:
    """A network without its probe, if it has one."""
    return module.body if isinstance(module, ProbedNetwork) else module


class _Mean(nn.Module):
    """The mean over some dimensions."""

    def __init__(self, dimensions: tuple[int, ...]) -> None:
        super().__init__()
        self.dimensions = dimensions

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dimensions)


def ending(chain: Chain, module: nn.Module, features: FeatureHead) -> Chain:
    """The chain of a network's body, which then gives its features or, if it has a probe, what that makes of them."""
    if chain is body_of(module):
        # a chain of the user's own, which is to stay as it is, and whose head knows no hook of the whole
        names = [position.name for position in chain.positions]
        layouts = {position.name: position.kind for position in chain.positions}
        head = nn.Sequential(chain.head, _Mean(features.pooled)) if features.pooled else chain.head
        chain = Chain(list(chain.segments), head, names, chain.input_shape, layouts).eval()
    if isinstance(module, ProbedNetwork):
        chain.head = nn.Sequential(chain.head, copy.deepcopy(module.probe))
    return chain


def features_and_probe(chain: Chain) -> tuple[nn.Module, nn.Linear]:
    """The parts of a chain that ends in a probe: what gives the features, and the probe."""
    assert isinstance(chain.head, nn.Sequential)
    *_, before, probe = chain.head
    assert isinstance(probe, nn.Linear)
    return nn.Sequential(*chain.segments, before), probe


def find_end(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    *,
    classes: int,
    outputs: int,
    head: HeadChoice | None,
    output: str | int | None,
    required: bool,
    what: str,
) -> tuple[str | None, FeatureHead | None]:
    """Where a network's logits or features are in what it returns, and its features' end; None: it has a classifier.

    With ``head`` ``probe`` or ``none`` its last layers are left out of ``module``, if they have as many outputs as the
    network was asked for. Otherwise a network without one output per class is one of features, unless a classifier is
    ``required``. Raises NetworkError, also for what is neither.
    """
    kind: Literal["none", "probe"] = "probe" if head == "probe" else "none"
    chosen = head in ("none", "probe")
    with torch.no_grad():
        left_out = tuple(head_layers(module, outputs, input_shape)) if chosen and outputs else ()
        leave_out(module, left_out)
        given = run_model(module, torch.zeros(2, *input_shape))
    alone = isinstance(given, Tensor) and given.dim() in _POOLED
    key = None if alone and output is None else logits_key(given, what, output, classes)
    found = output_part(given, key)
    if not (isinstance(found, Tensor) and found.dim() in _POOLED and found.is_floating_point()):
        raise NetworkError(f"{what}: expected logits (B, classes), or features (B, D), (B, N, D) or (B, D, H, W)")
    shape = tuple(found.shape)
    if chosen and outputs and not left_out and shape == (2, outputs):
        log.warning(
            "no layer with %d outputs was found that runs last: all that it gives is taken for features", outputs
        )
    if not chosen:
        if shape == (2, classes):
            return key, None
        parts = (part for part in _tensors(given) if tuple(part.shape) == (2, classes))
        if required or next(parts, None) is not None:
            raise NetworkError(
                f"{what}: it gives {shape[1:]} outputs per image: expected {classes}, one per class; "
                f"{argument('head', 'probe')} puts a linear probe on what it gives"
            )
    pooled = _POOLED[len(shape)]
    width = shape[1] if len(shape) != 3 else shape[2]
    if not width:
        raise NetworkError(f"{what}: it gives no features, {shape[1:]} per image: expected some")
    return key, FeatureHead(kind=kind, width=width, outputs=outputs, left_out=left_out, pooled=pooled)


def leave_out(module: nn.Module, layers: Sequence[str]) -> None:
    """Put nothing in the place of the layers with these names."""
    for name in layers:
        module.set_submodule(name, nn.Identity())


def _mean(dimensions: tuple[int, ...], module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return outputs.mean(dimensions)


def _tensors(given: Any) -> list[Tensor]:
    values = list(given.values()) if isinstance(given, Mapping) else given if isinstance(given, tuple | list) else []
    return [value for value in values if isinstance(value, Tensor)]
