"""A graph for any number of images, from two that were traced for different numbers.

What tracers see of a batch are integers: sizes, and arguments of views. Those that differ between the two traces are
multiples of the number of images in a network that treats every image for itself.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import TensorMetadata

TRACED = (2, 3)
"""Numbers of images of the two traces; specs are those of the first."""


@dataclass
class AnyBatch:
    """A graph with ``images``, the number of images, as its first placeholder.

    ``specs`` are meta tensors, or several, for what every operation gave in the two traces.
    """

    graph: fx.Graph
    images: fx.Node
    specs: dict[fx.Node, tuple[Any, Any]]

    def sizes(self, node: fx.Node) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Shape and strides of a node's value, as arguments of another operation."""
        few, more = self.specs[node]
        return self._integers(few.shape, more.shape), self._integers(few.stride(), more.stride())

    def _integers(self, few: Any, more: Any) -> tuple[Any, ...]:
        return tuple(_integer(self.graph, self.images, *pair) for pair in zip(few, more, strict=True))


def trace_any_batch(trace: Callable[[int], fx.Graph]) -> AnyBatch:
    """Join the graphs that ``trace`` makes for two numbers of images.

    Raises NotImplementedError where they differ in something else than multiples of those numbers.
    """
    graph, other = (trace(images) for images in TRACED)
    nodes, others = list(graph.nodes), list(other.nodes)
    if [(node.op, node.target) for node in nodes] != [(node.op, node.target) for node in others]:
        raise NotImplementedError("the operations depend on the number of images")
    with graph.inserting_before(nodes[0]):
        images = graph.placeholder("images")
    partner = dict(zip(nodes, others, strict=True))
    joined = AnyBatch(graph, images, {})
    for node in nodes:
        twin = partner[node]
        node.args = _joined(graph, images, partner, node.args, twin.args)
        node.kwargs = _joined(graph, images, partner, dict(node.kwargs), dict(twin.kwargs))
        if "tensor_meta" in node.meta:
            joined.specs[node] = (_spec(node.meta["tensor_meta"]), _spec(twin.meta["tensor_meta"]))
    return joined


def _joined(graph: fx.Graph, images: fx.Node, partner: dict[fx.Node, fx.Node], few: Any, more: Any) -> Any:
    """An argument for any number of images."""
    if isinstance(few, fx.Node):
        if partner[few] is not more:
            raise NotImplementedError("the operations depend on the number of images")
        return few
    if isinstance(few, list | tuple) and isinstance(more, list | tuple) and len(few) == len(more):
        return type(few)(_joined(graph, images, partner, *pair) for pair in zip(few, more, strict=True))
    if isinstance(few, dict) and isinstance(more, dict) and few.keys() == more.keys():
        return {key: _joined(graph, images, partner, few[key], more[key]) for key in few}
    if type(few) is int and type(more) is int:
        return _integer(graph, images, few, more)
    # NaN is not itself
    if few != more and str(few) != str(more):
        raise NotImplementedError(f"an argument depends on the number of images: {few}, {more}")
    return few


def _integer(graph: fx.Graph, images: fx.Node, few: int, more: int) -> int | fx.Node:
    if few == more:
        return few
    factor = more - few
    # the numbers of images differ by one
    if few != factor * TRACED[0]:
        raise NotImplementedError(f"an argument is no multiple of the number of images: {few}, {more}")
    if factor == 1:
        return images
    for user in images.users:
        if user.target is operator.mul and user.args == (images, factor):
            return user
    with graph.inserting_after(images):
        return graph.call_function(operator.mul, (images, factor))


def _spec(found: Any) -> Any:
    """Meta tensors in the place of what the tracer recorded of tensors."""
    if isinstance(found, TensorMetadata):
        return torch.empty_strided(found.shape, found.stride, dtype=found.dtype, device="meta")
    return [_spec(each) for each in found] if isinstance(found, list | tuple) else None


def zeros_like(x: Tensor, images: int, device: torch.device) -> Tensor:
    """Zeros of the strides and dtype of x (meta, images outermost) for another number of images."""
    return torch.empty_strided((images, *x.shape[1:]), x.stride(), dtype=x.dtype, device=device).zero_()
