"""Cutting a network: what lies between two cuts becomes a module."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, map_arg

from fastsitch.chains.cut_points import CutGraph
from fastsitch.chains.export_trace import export_module
from fastsitch.chains.layout import Layout
from fastsitch.chains.logits import logits_key, returning_logits
from fastsitch.chains.module_copies import copy_modules
from fastsitch.chains.node_values import TensorSpec, run_model, run_segment
from fastsitch.chains.trace import FROM_SEGMENTS, SIZES, CannotCut, Trace, trace_module
from fastsitch.chains.vet_chain import require_same_values
from fastsitch.errors import NetworkError, plain


@dataclass(frozen=True)
class CutNetwork:
    """Segments, each of which ends in a position, and the head that follows the last one."""

    segments: list[nn.Module]
    head: nn.Module
    names: list[str]
    layouts: dict[str, Layout]
    graph: CutGraph


def cut_module(
    model: nn.Module,
    example_input: Tensor,
    positions: Sequence[str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    output: str | int | None = None,
) -> CutNetwork:
    """Cut a copy of a traceable network at the positions with these names or patterns, None for the default ones.

    The segments are in eval mode, have no in-place activations and take any batch size. ``layouts`` are those of
    positions where the one that would be found is wrong, or none; ``output`` is the name of the logits, where the
    network returns more. What torch.fx cannot trace, torch.export is given. Raises NetworkError where the network
    cannot be cut.
    """
    (model,) = copy_modules([model])
    example = torch.cat([example_input[:1]] * max(SIZES))
    # its own eval() may return nothing
    model.eval()
    model = _with_logits(model, example, output)
    given = example, positions, layouts or {}
    try:
        cut = _cut(model, trace_module, *given)
    except CannotCut as by_fx:
        try:
            return _cut(model, export_module, *given)
        except CannotCut as by_export:
            raise NetworkError(f"{by_fx.message}; {by_export.message}; {FROM_SEGMENTS}") from by_fx
    if most_weights_in(model, cut.graph.trace.opaque):
        with suppress(CannotCut):
            return _cut(model, export_module, *given)
    return cut


def _with_logits(model: nn.Module, example: Tensor, output: str | int | None) -> nn.Module:
    """The same module, which returns its logits alone; raises NetworkError where it has none."""
    what = f"cannot cut a {type(model).__name__}"
    with torch.no_grad():
        key = logits_key(run_model(model, example), what, output)
        model = returning_logits(model, key)
        logits = model(example) if key is not None else None
    if logits is not None and logits.dim() != 2:
        raise NetworkError(f"{what}: expected logits (B, classes), found {tuple(logits.shape)} at {key}")
    return model


def most_weights_in(model: nn.Module, paths: Iterable[str]) -> bool:
    """Whether more than half of a network's parameters lie in one of these modules."""
    every = sum(parameter.numel() for parameter in model.parameters())
    return any(2 * sum(x.numel() for x in model.get_submodule(path).parameters()) > every for path in paths)


def _cut(
    model: nn.Module,
    trace: Callable[[nn.Module, Tensor], Trace],
    example: Tensor,
    positions: Sequence[str] | None,
    layouts: Mapping[str, Layout],
) -> CutNetwork:
    with torch.no_grad():
        graph = CutGraph(model, trace(model, example), example, layouts)
    points = graph.default() if positions is None else graph.choose(positions)
    ends = [graph.trace.input, *(point.node for point in points), graph.data[-1]]
    with torch.no_grad():
        *segments, head = protect_inputs([_extract(graph, *pair) for pair in pairwise(ends)], graph.example)
    names = [point.name for point in points]
    after = _extract(graph, graph.data[-1], graph.output) if graph.output is not graph.data[-1] else None
    # a network may depend on what its graph does not show, such as a tensor that is changed in place
    require_same_values(model, segments, head, names, graph.example, after)
    kinds = {point.name: point.layout for point in points}
    return CutNetwork(segments, head, names, kinds, graph)


def protect_inputs(segments: Sequence[nn.Module], x: Tensor, names: Sequence[str] = ()) -> list[nn.Module]:
    """The segments of a network that runs on ``x``; those that change their input in place get a copy of it.

    By ``names``, those of all but the last, which is the head, errors name them.
    """
    protected: list[nn.Module] = []
    for index, segment in enumerate(segments):
        given = x.clone()
        version = given._version
        with torch.no_grad():
            x = run_segment(segment, given, plain(names[index]) if index < len(names) else "the head")
        protected.append(segment if given._version == version else _CopiesInput(segment))
    return protected


class _CopiesInput(nn.Module):
    """A module that changes its input in place, run on a copy."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.module(x.clone()))


def _extract(graph: CutGraph, start: fx.Node, end: fx.Node) -> fx.GraphModule:
    """What computes ``end`` from ``start``, which lies on every path to it."""
    before = set(graph.data[: graph.order[start]])
    needed: set[fx.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        # sizes of what lies before the cut are derived from the input
        if node is not start and node not in needed and not _queries_data_before(node, before):
            waiting += node.all_input_nodes
        needed.add(node)
    segment = fx.Graph()
    x = segment.placeholder("x")
    # representations have the images first, also where the network has them behind the tokens
    made: dict[fx.Node, Argument] = {start: _swapped(segment, x) if graph.batch_axis(start) == 1 else x}
    for node in graph.trace.graph.nodes:
        if node in made or node not in needed:
            continue
        if _queries_data_before(node, before):
            made[node] = _recomputed(graph, node, start, segment, x)
            continue
        arguments, named = map_arg((node.args, node.kwargs), lambda argument: made[argument])
        if named.get("inplace") is True:
            named = {**named, "inplace": False}
        made[node] = segment.create_node(node.op, node.target, arguments, named, node.name, node.type)
    last = made[end]
    segment.output(_swapped(segment, last) if graph.batch_axis(end) == 1 else last)
    return fx.GraphModule(graph.trace.root, segment, "Segment").eval()


def _swapped(segment: fx.Graph, node: Argument) -> fx.Node:
    return segment.call_method("transpose", (node, 0, 1))


def _queries_data_before(node: fx.Node, before: set[fx.Node]) -> bool:
    """Whether a node asks for a property of data that lies before the cut."""
    return any(parent in before for parent in node.all_input_nodes)


def _recomputed(graph: CutGraph, node: fx.Node, start: fx.Node, segment: fx.Graph, x: fx.Node) -> Argument:
    """A property of data before the cut, from the segment's input: its number of images, device and dtype."""
    few, more = (values[node] for values in graph.values)
    given = graph.values[0][start]
    assert isinstance(given, TensorSpec)

    def recomputed(small: Any, large: Any) -> Argument:
        if isinstance(small, tuple) and isinstance(large, tuple) and len(small) == len(large):
            return tuple(recomputed(*pair) for pair in zip(small, large, strict=True))
        if isinstance(small, torch.device):
            return segment.call_function(getattr, (x, "device"))
        if small == large:
            return segment.call_function(getattr, (x, "dtype")) if small == given.dtype else cast(Argument, small)
        if isinstance(small, int) and small % SIZES[0] == 0 and large == small // SIZES[0] * SIZES[1]:
            images = segment.call_method("size", (x, 0))
            return images if small == SIZES[0] else segment.call_function(operator.mul, (images, small // SIZES[0]))
        raise NetworkError(
            f"cannot cut a {graph} after {start.name}: what follows needs {node.name} from before, which the number "
            "of images does not determine; choose other positions"
        )

    return recomputed(few, more)
