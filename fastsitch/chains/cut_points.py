"""Where a network can be cut: the nodes of its graph on every path from the image to the logits."""

import builtins
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastsitch.chains.axes import follow_axes
from fastsitch.chains.layout import Layout
from fastsitch.chains.node_values import TensorSpec, node_values
from fastsitch.chains.trace import FROM_SEGMENTS, SIZES, CannotCut, Trace, first_line, operation
from fastsitch.errors import NetworkError, argument

log = logging.getLogger(__name__)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

PROBABILITIES = (nn.Softmax, nn.Softmax2d, nn.Sigmoid)
"""Modules whose output is no logits."""

_CLASSES = (None, 1, -1)
"""The dimension of the classes in (B, classes), as operations are given it."""

_QUERIES = ("size", "dim", "ndimension", "numel", "nelement", "stride", "get_device", "is_floating_point")
"""Methods whose result depends on the kind of a tensor, not on its values; so do attributes such as ``shape``."""


@dataclass(frozen=True)
class CutPoint:
    """A node at which the whole network can be cut, with all names of its tensor."""

    node: fx.Node
    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    """Without the batch."""
    layout: Layout
    guessed: bool = False
    """Whether the layout follows from the shape of the image alone."""


class CutGraph:
    """A traced network in eval mode, the values of its nodes for batches of 2 and 3 images, and all its cut points.

    ``example`` are images of it, as many as the larger batch.

    ``data`` are the nodes, in order, whose values the logits depend on; sizes and other properties of tensors do not
    count. ``points`` are the cut points at which the layout of the representation is known, from the graph or from
    ``layouts``, by name. ``output`` is what the network returns: the logits, or what it computes from them alone.
    """

    def __init__(self, model: nn.Module, trace: Trace, example: Tensor, layouts: Mapping[str, Layout]) -> None:
        self.model = model
        self.trace = trace
        self.example = example
        self._layouts = layouts
        try:
            with torch.no_grad():
                self.values = [node_values(trace, example[:images]) for images in SIZES]
        # the network's code on the path that the tracer took: it may raise anything
        except Exception as error:
            raise CannotCut(f"cannot cut a {self}: its traced graph does not run ({first_line(error)})") from error
        self.output = self._output()
        self.data = self._data()
        self.order = {node: index for index, node in enumerate(self.data)}
        self.cuts = _on_every_path(self.data, self.order)
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
        for path, reason in self.left_out().items():
            log.warning("%s: block %s is no position: %s", self, path, reason)
        if not ends:
            return self._layers()
        first = min(self._first_node(path) for path in self.blocks.values())
        before = [point for point in self.points if self.order[point.node] < first]
        chosen = before[-1:] + ends
        self._log_guesses(chosen)
        return chosen

    def choose(self, patterns: Sequence[str]) -> list[CutPoint]:
        """The cut points with these names, or that match these patterns (``layer*.?``), in the network's order.

        Each has the name that was asked for. Raises NetworkError when a pattern matches none.
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
                raise NetworkError(f"no position of {self} matches {pattern!r}; it has {self._listed()}")
        if not chosen:
            raise NetworkError(
                f"{argument('positions', list(patterns))}: expected names or patterns of positions of {self}; it has "
                f"{self._listed()}"
            )
        points = [chosen[point.node] for point in self.points if point.node in chosen]
        self._log_guesses(points)
        return points

    def batch_axis(self, node: fx.Node) -> int | None:
        """The axis of the images: 0, or 1 where tokens come first; None where a tensor has none of its own."""
        few, more = (values[node] for values in self.values)
        if not isinstance(few, TensorSpec) or not isinstance(more, TensorSpec):
            return None
        for axis in range(min(2, len(few.shape))):
            if few.shape[axis] == SIZES[0] and more.shape == _with_size(few.shape, axis, SIZES[1]):
                return axis
        return None

    def left_out(self) -> dict[str, str]:
        """The blocks that are no positions, and why."""
        kinds = {type(self.model.get_submodule(path)) for path in self.blocks.values()}
        named = {name for point in self.points if point.node in self.blocks for name in point.aliases}
        cut = {path for node in self.cuts for path in self.trace.outputs.get(node, ())}
        reasons = {}
        for path, module in self.model.named_modules():
            if type(module) not in kinds or path in named or self._inside(path, self.blocks.values()):
                continue
            known = path in cut
            reasons[path] = "what its output means is not known" if known else "its output is not on every path"
        return reasons

    def _log_guesses(self, points: Sequence[CutPoint]) -> None:
        """One line for all positions of one shape and grid."""
        alike: dict[tuple[int, Layout], list[str]] = {}
        for point in points:
            if point.guessed and point.layout.grid is not None:
                alike.setdefault((point.shape[0], point.layout), []).append(point.name)
        for (tokens, layout), names in alike.items():
            assert layout.grid is not None
            rows, columns = layout.grid
            log.warning(
                "%s: the %d tokens at %s are taken for %sa grid of %dx%d, in the proportions of the image; if that is "
                "wrong, say what is right: add --layout, or layouts of Chain.from_module",
                self,
                tokens,
                names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} positions)",
                f"{layout.prefix_tokens} class token and " if layout.prefix_tokens else "",
                rows,
                columns,
            )

    def _output(self) -> fx.Node:
        (end,) = self.trace.graph.find_nodes(op="output")
        last = end.args[0]
        if not isinstance(last, fx.Node) or not _is_logits(self.values[0][last]):
            raise CannotCut(f"cannot cut a {self}: expected one output, logits (B, classes) computed from the image")
        return last

    def _logits(self) -> fx.Node:
        """The output, or what a softmax or sigmoid at the end is given."""
        last = self.output
        while self._gives_probabilities(last) and last.all_input_nodes:
            last = last.all_input_nodes[0]
        if last is not self.output:
            log.warning("%s ends in probabilities (%s): its logits before that are used", self, self.output.name)
        return last

    def _gives_probabilities(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.trace.root.get_submodule(str(node.target))
            return isinstance(module, PROBABILITIES) and getattr(module, "dim", None) in _CLASSES
        # over the images it would be no probabilities of classes
        dimension = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        name = operation(node)
        return name == "sigmoid" or (name in ("softmax", "_softmax") and dimension in _CLASSES)

    def _listed(self) -> str:
        names = ", ".join(point.name for point in self.points)
        opaque = "; ".join(f"{path} is run as a whole: {reason}" for path, reason in self.trace.opaque.items())
        return f"{names} ({opaque})" if opaque else names

    def _data(self) -> list[fx.Node]:
        """Nodes on a path of data from the image to the logits."""
        values = self.values[0]
        carries = {self.trace.input}
        for node in self.trace.graph.nodes:
            from_data = any(parent in carries for parent in node.all_input_nodes)
            if from_data and node.op != "output" and not _is_query(node) and values[node] is not None:
                carries.add(node)
        last = self._logits()
        if last not in carries or not _is_logits(values[last]):
            raise CannotCut(f"cannot cut a {self}: expected one output, logits (B, classes) computed from the image")
        live, waiting = set(), [last]
        while waiting:
            node = waiting.pop()
            if node not in live and node in carries:
                live.add(node)
                waiting += node.all_input_nodes
        return [node for node in self.trace.graph.nodes if node in live]

    def _points(self) -> list[CutPoint]:
        few = self.values[0]
        batches = {node: axis for node in self.data if (axis := self.batch_axis(node)) is not None}
        shapes = {
            node: _without(value.shape, batches.get(node, 0))
            for node in self.data
            if isinstance(value := few[node], TensorSpec) and value.shape
        }
        names = self._names()
        named = {name: node for node, all_names in names.items() for name in all_names}
        given = {named[name]: layout for name, layout in self._layouts.items() if name in named}
        axes = follow_axes(self.data, self.trace.root, shapes, batches, given)
        points = []
        for node in self.cuts:
            value = few[node]
            # numbers that are not real carry no gradient, or would be rounded
            if node not in batches or not isinstance(value, TensorSpec) or not value.dtype.is_floating_point:
                continue
            known = axes.get(node)
            layout = given.get(node) or (None if known is None else known.layout)
            if known is not None and layout is not None and (batches[node] == 0 or layout.layout == "tokens"):
                points.append(CutPoint(node, names[node][0], tuple(names[node]), shapes[node], layout, known.guessed))
        if not points:
            nothing = f"cannot cut a {self}: no tensor between its image and its logits lies on every path"
            if not self.trace.opaque:
                # whoever traces it
                raise NetworkError(f"{nothing}; {FROM_SEGMENTS}")
            opaque = "; ".join(f"{path} cannot be traced: {reason}" for path, reason in self.trace.opaque.items())
            raise CannotCut(f"{nothing}; {opaque}")
        return points

    def _names(self) -> dict[fx.Node, list[str]]:
        """All names of every cut: its block, the modules whose output it is, or the operation in its module."""
        taken = {name for name, _ in self.model.named_modules()}
        calls: dict[str, int] = {}
        names: dict[fx.Node, list[str]] = {}
        for node in self.data:
            paths = []
            for path in self.trace.outputs.get(node, ()):
                calls[path] = calls.get(path, -1) + 1
                paths.append(path if not calls[path] else _unused_name(path, taken))
            if all((node, path) in self.trace.of_several for path in self.trace.outputs.get(node, ())):
                # one that is also the first of several outputs of a module has this name too
                paths.append(_unused_name(f"{self.trace.owners[node]}.{operation(node)}".removeprefix("."), taken))
            block = self.blocks.get(node)
            names[node] = [block, *(path for path in paths if path != block)] if block in paths else paths
        return {node: names[node] for node in self.cuts}

    def _blocks(self) -> dict[fx.Node, str]:
        """The outermost modules that are blocks and whose output is a cut: their names, by their output."""
        joins = []
        for before, after in pairwise([self.trace.input, *self.cuts, self.data[-1]]):
            within = self.data[self.order[before] + 1 : self.order[after] + 1]
            if len(within) > 1:
                # parallel paths: they belong to the innermost module that has all of them
                joins.append((_innermost_module([self.trace.owners[node] for node in within]), after))
        # where there are no others, gates such as squeeze-and-excitation are parts of blocks
        alone = all(self._is_gate(after) for _, after in joins)
        paths = {self._around(path) if alone else path for path, _ in joins}
        kinds = {type(self.model.get_submodule(path)) for path in paths}
        kinds -= {type(self.model), *_CONTAINERS}
        blocks: dict[fx.Node, str] = {}
        ends = {path: node for node in self.cuts for path in self.trace.outputs.get(node, ())}
        for path, module in self.model.named_modules():
            if type(module) in kinds and path in ends and not self._inside(path, blocks.values()):
                blocks[ends[path]] = path
        # one that blocks share may be named before them
        return {node: path for node, path in blocks.items() if not self._inside(path, blocks.values())}

    def _is_gate(self, node: fx.Node) -> bool:
        """Whether a node multiplies a tensor by a smaller one."""
        factors = [self.values[0].get(parent) for parent in node.all_input_nodes]
        shapes = {factor.shape for factor in factors if isinstance(factor, TensorSpec)}
        return operation(node) in ("mul", "mul_") and len(shapes) > 1

    def _around(self, path: str) -> str:
        """The module around a gate, if it is one of several of its kind; else the gate."""
        kinds = Counter(type(module) for module in self.model.modules())
        around = path.rpartition(".")[0]
        while around and type(self.model.get_submodule(around)) in _CONTAINERS:
            around = around.rpartition(".")[0]
        return around if around and kinds[type(self.model.get_submodule(around))] > 1 else path

    def _inside(self, path: str, blocks: Collection[str]) -> bool:
        """Whether a module belongs to one of these blocks, by its name or by where it is called."""
        called = self.trace.callers.get(path, set())
        return any(path.startswith(f"{block}.") or (block != path and block in called) for block in blocks)

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


def _is_query(node: fx.Node) -> bool:
    """Whether a node asks for a property of a tensor that does not depend on its values."""
    if node.op == "call_function" and node.target is builtins.getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")
    return (node.op == "call_method" and node.target in _QUERIES) or operation(node).startswith("sym_")


def _is_logits(value: Any) -> bool:
    return isinstance(value, TensorSpec) and len(value.shape) == 2


def _with_size(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _on_every_path(data: Sequence[fx.Node], order: Mapping[fx.Node, int]) -> list[fx.Node]:
    """The nodes between the first and the last that lie on every path.

    In any order of the graph, these are the nodes after which no earlier one is used.
    """
    last_use = [max((order[user] for user in node.users if user in order), default=0) for node in data]
    crossed, open_until = [], 0
    for index, node in enumerate(data):
        if 0 < index < len(data) - 1 and open_until <= index:
            crossed.append(node)
        open_until = max(open_until, last_use[index])
    return crossed


def _innermost_module(paths: Sequence[str]) -> str:
    """The innermost module that contains all of these modules."""
    split = [path.split(".") if path else [] for path in paths]
    shared = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _unused_name(name: str, taken: set[str]) -> str:
    """This name, or with a number; from now on it is taken."""
    found, number = name, 0
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())
