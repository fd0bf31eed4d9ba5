"""Symbolic tracing of a network: its graph, and the module of every node."""

import logging
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastsitch.chains import example_tracer
from fastsitch.chains.example_tracer import ExampleTracer
from fastsitch.errors import NetworkError, plain

log = logging.getLogger(__name__)

MODEL = "model"
"""The name of the traced network in the root of its graph."""

FROM_SEGMENTS = "give its segments yourself: Chain.from_segments(segments, names, head, example_input)"
"""What errors advise where a network cannot be cut automatically."""

SIZES = (2, 3)
"""Numbers of images that a network is run on: sizes that depend on the batch then differ, others do not."""

_TORCH = str(Path(torch.__file__).parent) + os.sep
_TRACERS = (__file__, example_tracer.__file__)


class CannotCut(NetworkError):
    """A network that cannot be cut in the way that was tried."""


class OneInput(nn.Module):
    """A network as a function of its first argument alone; all others keep their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


@dataclass(frozen=True)
class Trace:
    """A network's graph. Modules are named as in the network itself, which is ``""``."""

    root: OneInput
    graph: fx.Graph
    outputs: dict[fx.Node, list[str]]
    """The modules whose output a node is, innermost first."""
    of_several: set[tuple[fx.Node, str]]
    """Those of them that have more outputs, of which the node is the first."""
    owners: dict[fx.Node, str]
    """The module in whose ``forward`` a node was made."""
    callers: dict[str, set[str]] = field(default_factory=dict)
    """The modules during whose ``forward`` a module was called: not always those that its name is made of."""
    opaque: dict[str, str] = field(default_factory=dict)
    """Modules that could not be traced and are run as a whole, and why."""
    exported: bool = False
    """Whether torch.export made it."""

    @property
    def input(self) -> fx.Node:
        first: fx.Node = next(iter(self.graph.nodes))
        return first


def trace_module(model: nn.Module, example: Tensor) -> Trace:
    """Trace a network in the mode that it is in, along example images: at least as many as the largest of SIZES.

    What the images fix, such as sizes, is a constant; their number is not. A module inside it whose ``forward`` cannot
    be traced is run as a whole. Raises CannotCut, which names the module and the line, where the network itself cannot
    be traced.
    """
    root = OneInput(model)
    opaque: dict[str, str] = {}
    while True:
        tracer = _Tracer([example[:images] for images in SIZES], frozenset(opaque))
        try:
            graph = tracer.trace(root)
        # the network's code runs here, on symbols: it may raise anything
        except Exception as error:
            path = tracer.failed(error)
            reason = f"{_line(error)}{type(error).__name__}: {first_line(error)}"
            if not path:
                raise CannotCut(f"cannot trace {type(model).__name__}, {reason}") from error
            opaque[path] = f"{type(model.get_submodule(path)).__name__}, {reason}"
            log.info("module %s is run as a whole, it cannot be traced: %s", path, opaque[path])
        else:
            return Trace(root, graph, tracer.outputs, tracer.of_several, tracer.owners, tracer.callers, opaque)


class _Tracer(ExampleTracer):
    def __init__(self, examples: Sequence[Tensor], opaque: frozenset[str]) -> None:
        super().__init__(examples)
        self.outputs: dict[fx.Node, list[str]] = {}
        self.of_several: set[tuple[fx.Node, str]] = set()
        self.owners: dict[fx.Node, str] = {}
        self.callers: dict[str, set[str]] = {}
        self._opaque = opaque
        self._stack: list[str] = []
        self._failed: tuple[Exception, str] | None = None

    def failed(self, error: Exception) -> str:
        """The innermost module in which this error arose."""
        return self._failed[1] if self._failed is not None and self._failed[0] is error else ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        name = name_in_network(module_qualified_name)
        return name in self._opaque or super().is_leaf_module(m, module_qualified_name)

    def record_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        name, leaf = name_in_network(path), self.is_leaf_module(m, path)
        self.callers.setdefault(name, set()).update(self._stack)
        if not leaf:
            self._stack.append(name)
        try:
            output = super().record_module(m, forward, args, kwargs)
        except Exception as error:
            if self._failed is None or self._failed[0] is not error:
                self._failed = error, self._stack[-1] if self._stack else ""
            raise
        finally:
            if not leaf:
                self._stack.pop()
        # of several outputs the first carries on, as where blocks also return their attention
        several = isinstance(output, tuple | list) and bool(output)
        first = output[0] if several else output
        if isinstance(first, fx.Proxy):
            self.outputs.setdefault(first.node, []).append(name)
            if several:
                self.of_several.add((first.node, name))
        return output

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.owners[node] = self._stack[-1] if self._stack else ""
        return node


def name_in_network(path: str) -> str:
    """A module's name in the network, given that in the root."""
    return path.removeprefix(MODEL).removeprefix(".")


def _line(error: Exception) -> str:
    """``FILE:LINE 'source', `` of the innermost code outside torch that raised the error."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_TORCH) and frame.filename not in _TRACERS:
            return f"{frame.filename}:{frame.lineno} {frame.line!r}, "
    return ""


def first_line(error: BaseException) -> str:
    """The message of an error that other code raised, in one line."""
    try:
        text = str(error).strip()
    # it may be of a class of the user
    except Exception:
        text = ""
    return plain((text or "no reason given").splitlines()[0])


def operation(node: fx.Node) -> str:
    """What a node calls, without the overload of an exported operation."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))
