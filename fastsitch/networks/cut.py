"""Where a network can be cut: the nodes of its graph that every path from the image to the logits crosses."""

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastsitch.errors import NetworkError
from fastsitch.networks.axes import follow_axes
from fastsitch.networks.layout import Layout
from fastsitch.networks.trace import Trace, first_line, trace_module

_QUERIES = ("size", "dim", "ndimension", "numel", "nelement", "stride", "get_device", "is_floating_point")
"""Methods whose result depends on the kind of a tensor, not on its values; so do attributes such as ``shape``."""

SIZES = (2, 3)
"""Numbers of images that a network is run on, to tell sizes that depend on the batch from those that do not."""


@dataclass(frozen=True)
class Seen:
    """What a node was when the network ran: shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class CutPoint:
    """A place where the whole network can be cut, by its name and other names of the same tensor."""

    node: fx.Node
    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    """Without the batch."""
    layout: Layout


class CutGraph:
    """A traced network in eval mode, its nodes as they were for batches of 2 and 3 images, and all its cut points.

    ``data`` are the nodes, in order, that carry what the logits depend on; sizes and other properties of tensors are no
    data. ``points`` are the cut points at which the layout of the representation is known.
    """

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        self.model = model
        self.example = torch.cat([example_input[:1]] * max(SIZES))
        with torch.no_grad():
            self.logits = _run(model, self.example)
            self.trace: Trace = trace_module(model)
            try:
                self.seen = [_values(self.trace, self.example[:images]) for images in SIZES]
            # the network's own code, on a path that the tracer took
            except Exception as error:
                raise NetworkError(
                    f"cannot cut a {self}: what was traced of it does not run ({first_line(error)}); name its parts "
                    "yourself: Chain.from_segments(segments, names, head, example_input)"
                ) from error
        self.data = self._data()
        self.order = {node: index for index, node in enumerate(self.data)}
        self.cuts = _crossed(self.data, self.order)
        self.blocks = self._blocks()
        self.points = self._points()

    def __str__(self) -> str:
        return type(self.model).__name__

    def default(self) -> list[CutPoint]:
        """The input of the first block and the outputs of all blocks.

        Blocks are modules of a kind that joins parallel paths somewhere in the network, the outermost ones. Where there
        are none: every layer with weights, together with the normalisation and activation that follow it.
        """
        ends = [point for point in self.points if point.node in self.blocks]
        if not ends:
            return self._layers()
        first = min(self._first_node(path) for path in self.blocks.values())
        before = [point for point in self.points if self.order[point.node] < first]
        return before[-1:] + ends

    def choose(self, patterns: Sequence[str]) -> list[CutPoint]:
        """The cut points with these names, or that match these patterns (``layer*.?``), in the network's order.

        Each is named as it was asked for. Raises NetworkError when a pattern fits none.
        """
        chosen: dict[fx.Node, CutPoint] = {}
        for pattern in patterns:
            found = False
            for point in self.points:
                name = next((name for name in point.aliases if fnmatchcase(name, pattern)), None)
                if name is not None:
                    found = True
                    chosen.setdefault(point.node, replace(point, name=name))
            if not found:
                raise NetworkError(f"no position named {pattern} in {self}: expected some of {self._listed()}")
        if not chosen:
            raise NetworkError(f"no position named for {self}: expected some of {self._listed()}")
        return [chosen[point.node] for point in self.points if point.node in chosen]

    def _listed(self) -> str:
        names = ", ".join(point.name for point in self.points)
        opaque = "; ".join(f"{path} is run as a whole: {reason}" for path, reason in self.trace.opaque.items())
        return f"{names} ({opaque})" if opaque else names

    def _data(self) -> list[fx.Node]:
        """Nodes on a path of data from the image to the logits."""
        seen = self.seen[0]
        carries = {self.trace.input}
        for node in self.trace.graph.nodes:
            from_data = any(parent in carries for parent in node.all_input_nodes)
            if from_data and node.op != "output" and not _is_query(node) and seen[node] is not None:
                carries.add(node)
        (end,) = self.trace.graph.find_nodes(op="output")
        last = end.args[0]
        if not isinstance(last, fx.Node) or last not in carries or not _is_logits(seen[last]):
            raise NetworkError(f"cannot cut a {self}: expected one output, logits (B, classes) made of the image")
        live, waiting = set(), [last]
        while waiting:
            node = waiting.pop()
            if node not in live and node in carries:
                live.add(node)
                waiting += node.all_input_nodes
        return [node for node in self.trace.graph.nodes if node in live]

    def _points(self) -> list[CutPoint]:
        few, more = self.seen
        shapes = {node: own.shape[1:] for node in self.data if isinstance(own := few[node], Seen)}
        axes = follow_axes(self.data, self.trace.root, shapes)
        names = self._names()
        points = []
        for node in self.cuts:
            small, large = few[node], more[node]
            layout = axes[node].layout if node in axes else None
            if layout is None or not isinstance(small, Seen) or not isinstance(large, Seen):
                continue
            if small.shape == (SIZES[0], *small.shape[1:]) and large.shape == (SIZES[1], *small.shape[1:]):
                points.append(CutPoint(node, names[node][0], tuple(names[node]), small.shape[1:], layout))
        if not points:
            opaque = "".join(f"; {path} cannot be traced: {reason}" for path, reason in self.trace.opaque.items())
            raise NetworkError(
                f"cannot cut a {self}: nothing between its image and its logits is crossed by every path{opaque}; name "
                "its parts yourself: Chain.from_segments(segments, names, head, example_input)"
            )
        return points

    def _names(self) -> dict[fx.Node, list[str]]:
        """All names of every cut: its block, the modules whose output it is, or the operation in its module."""
        taken = {name for name, _ in self.model.named_modules()}
        calls: dict[str, int] = {}
        names: dict[fx.Node, list[str]] = {}
        for node in self.data:
            own = []
            for path in self.trace.outputs.get(node, ()):
                calls[path] = calls.get(path, -1) + 1
                own.append(path if not calls[path] else _unused(path, taken))
            if not own:
                operation = getattr(node.target, "__name__", str(node.target))
                own = [_unused(f"{self.trace.owners[node]}.{operation}".removeprefix("."), taken)]
            block = self.blocks.get(node)
            names[node] = [block, *(name for name in own if name != block)] if block in own else own
        return {node: names[node] for node in self.cuts}

    def _blocks(self) -> dict[fx.Node, str]:
        """The outermost modules that are blocks and whose output is a cut: their names, by their output."""
        kinds = set()
        for before, after in pairwise([self.trace.input, *self.cuts, self.data[-1]]):
            within = self.data[self.order[before] + 1 : self.order[after] + 1]
            if len(within) > 1:
                # parallel paths: they belong to the innermost module that has all of them
                kinds.add(type(self.model.get_submodule(_common([self.trace.owners[node] for node in within]))))
        kinds -= {type(self.model), nn.Sequential, nn.ModuleList, nn.ModuleDict}
        blocks: dict[fx.Node, str] = {}
        ends = {path: node for node in self.cuts for path in self.trace.outputs.get(node, ())}
        for path, module in self.model.named_modules():
            inside = any(path.startswith(f"{block}.") for block in blocks.values())
            if type(module) in kinds and path in ends and not inside:
                blocks[ends[path]] = path
        return blocks

    def _first_node(self, path: str) -> int:
        """The index of the first node that belongs to a module."""
        return next(
            self.order[node]
            for node in self.data
            if f"{self.trace.owners[node]}.".startswith(f"{path}.") or path in self.trace.outputs.get(node, ())
        )

    def _layers(self) -> list[CutPoint]:
        """For every layer with weights, the last cut of its size before the next one; all cuts where there is none."""
        layers: list[CutPoint] = []
        by_node = {point.node: point for point in self.points}
        current: CutPoint | None = None
        for node in self.data[:-1]:
            point = by_node.get(node)
            if node.op == "call_module" and _has_weights(self.trace.root.get_submodule(str(node.target))):
                layers += [current] if current is not None else []
                current = point
            elif current is not None and point is not None:
                if point.shape == current.shape:
                    current = point
                else:
                    layers.append(current)
                    current = None
        layers += [current] if current is not None else []
        return layers or self.points


def _run(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of some images."""
    try:
        logits = model(x)
    # a network's own code: it may raise anything
    except Exception as error:
        raise NetworkError(
            f"cannot cut a {type(model).__name__}: it does not run on images {tuple(x.shape[1:])} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise NetworkError(f"cannot cut a {type(model).__name__}: expected logits (B, classes), found {found}")
    return logits


def _values(trace: Trace, x: Tensor) -> dict[fx.Node, Any]:
    recorder = _Recorder(trace)
    recorder.run(x)
    return recorder.found


class _Recorder(fx.Interpreter):
    def __init__(self, trace: Trace) -> None:
        super().__init__(fx.GraphModule(trace.root, trace.graph))
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.found[n] = _described(value)
        return value


def _described(value: Any) -> Any:
    """Tensors by shape and dtype, also inside of tuples and lists, which become tuples; everything else as it is."""
    if isinstance(value, Tensor):
        return Seen(tuple(value.shape), value.dtype)
    return tuple(_described(own) for own in value) if isinstance(value, list | tuple) else value


def _is_query(node: fx.Node) -> bool:
    """Whether a node asks for a property of a tensor that its values have no part in."""
    if node.op == "call_function" and node.target is builtins.getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")
    return node.op == "call_method" and node.target in _QUERIES


def _is_logits(value: Any) -> bool:
    return isinstance(value, Seen) and len(value.shape) == 2


def _crossed(data: Sequence[fx.Node], order: Mapping[fx.Node, int]) -> list[fx.Node]:
    """The nodes after the first and before the last that every path crosses.

    In any order of the graph, these are the nodes after which nothing older is used any more.
    """
    last_use = [max((order[user] for user in node.users if user in order), default=0) for node in data]
    crossed, open_until = [], 0
    for index, node in enumerate(data):
        if 0 < index < len(data) - 1 and open_until <= index:
            crossed.append(node)
        open_until = max(open_until, last_use[index])
    return crossed


def _common(paths: Sequence[str]) -> str:
    """The innermost module that contains all of these."""
    split = [path.split(".") if path else [] for path in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _unused(name: str, taken: set[str]) -> str:
    """This name, or with a number; from now on it is taken."""
    found, number = name, 0
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())
