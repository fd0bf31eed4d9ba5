"""The parts of a network between the places where it is cut, each a module of its own."""

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, map_arg

from fastsitch.errors import NetworkError
from fastsitch.networks.cut import SIZES, CutGraph, Seen
from fastsitch.networks.layout import Layout


@dataclass(frozen=True)
class Parts:
    """Segments, each of which ends in a position, and the head that follows the last one."""

    segments: list[nn.Module]
    head: nn.Module
    names: list[str]
    layouts: dict[str, Layout]


def cut_module(model: nn.Module, example_input: Tensor, positions: Sequence[str] | None = None) -> Parts:
    """Cut a copy of a traceable network at the positions with these names or patterns, None for the default ones.

    The parts are in eval mode, have no in-place activations and take any batch size. Raises NetworkError where the
    network cannot be cut.
    """
    (model,) = copies([model])
    model.eval()
    graph = CutGraph(model, example_input)
    points = graph.default() if positions is None else graph.choose(positions)
    ends = [graph.trace.input, *(point.node for point in points), graph.data[-1]]
    with torch.no_grad():
        *segments, head = protected([_extract(graph, *between) for between in pairwise(ends)], graph.example)
        x = graph.example
        for part in (*segments, head):
            x = part(x)
    # a network may depend on what its graph does not show, such as a tensor that is changed where it lies
    if not torch.allclose(x, graph.logits, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise NetworkError(
            f"cannot cut a {graph}: its parts do not give its output again; name them yourself: "
            "Chain.from_segments(segments, names, head, example_input)"
        )
    return Parts(segments, head, [own.name for own in points], {own.name: own.layout for own in points})


def copies(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Copies that share among each other what the modules share, with in-place activations turned off."""
    copied = copy.deepcopy(list(modules))
    for module in (own for each in copied for own in each.modules()):
        if hasattr(module, "inplace"):
            module.__dict__["inplace"] = False
    return copied


def protected(parts: Sequence[nn.Module], x: Tensor) -> list[nn.Module]:
    """The parts of a network that runs on ``x``; those that change their input where it lies work on a copy of it."""
    kept: list[nn.Module] = []
    for part in parts:
        given = x.clone()
        version = given._version
        with torch.no_grad():
            x = part(given)
        kept.append(part if given._version == version else _OnCopy(part))
    return kept


class _OnCopy(nn.Module):
    """A module that changes its input where it lies."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.module(x.clone()))


def _extract(graph: CutGraph, start: fx.Node, end: fx.Node) -> fx.GraphModule:
    """What computes ``end`` from ``start``, which every path to it crosses."""
    before = set(graph.data[: graph.order[start]])
    needed: set[fx.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        # sizes of what lies before the cut follow from what it gives
        if node is not start and node not in needed and not _asks(node, before):
            waiting += node.all_input_nodes
        needed.add(node)
    part = fx.Graph()
    x = part.placeholder("x")
    made: dict[fx.Node, Argument] = {start: x}
    for node in graph.trace.graph.nodes:
        if node in made or node not in needed:
            continue
        if _asks(node, before):
            made[node] = _again(graph, node, start, part, x)
            continue
        arguments, named = map_arg((node.args, node.kwargs), lambda own: made[own])
        if named.get("inplace") is True:
            named = {**named, "inplace": False}
        made[node] = part.create_node(node.op, node.target, arguments, named, node.name, node.type)
    part.output(made[end])
    return fx.GraphModule(graph.trace.root, part, "Segment").eval()


def _asks(node: fx.Node, before: set[fx.Node]) -> bool:
    """Whether a node asks for a property of data that lies before the cut."""
    return any(parent in before for parent in node.all_input_nodes)


def _again(graph: CutGraph, node: fx.Node, start: fx.Node, part: fx.Graph, x: fx.Node) -> Argument:
    """A property of data before the cut, from the input of the part: its images, device and dtype."""
    few, more = (seen[node] for seen in graph.seen)
    given = graph.seen[0][start]
    assert isinstance(given, Seen)

    def again(small: Any, large: Any) -> Argument:
        if isinstance(small, tuple) and isinstance(large, tuple) and len(small) == len(large):
            return tuple(again(*pair) for pair in zip(small, large, strict=True))
        if isinstance(small, torch.device):
            return part.call_function(getattr, (x, "device"))
        if small == large:
            return part.call_function(getattr, (x, "dtype")) if small == given.dtype else cast(Argument, small)
        if isinstance(small, int) and small % SIZES[0] == 0 and large == small // SIZES[0] * SIZES[1]:
            images = part.call_method("size", (x, 0))
            return images if small == SIZES[0] else part.call_function(operator.mul, (images, small // SIZES[0]))
        raise NetworkError(
            f"cannot cut a {graph} behind {start.name}: what follows needs {node.name} from before, which does not "
            "follow from the number of images; choose other positions"
        )

    return again(few, more)
