"""A frozen graph and the gradient of its images, as two programs with as little kept between them as can be."""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, cast

import networkx as nx
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

from fastsitch.receivers.any_batch import AnyBatch, trace_any_batch, zeros_like
from fastsitch.receivers.attention import FUSED_ATTENTION
from fastsitch.receivers.frozen_graph import FrozenGraph
from fastsitch.receivers.gradient_sums import stack_selected
from fastsitch.receivers.graph_memory import SPEC, bytes_per_image, is_view, working_bytes

aten = torch.ops.aten

_SHAPE_ONLY = {
    aten.convolution_backward.default: 1,
    aten.max_pool2d_with_indices_backward.default: 1,
    aten.avg_pool2d_backward.default: 1,
    aten._adaptive_avg_pool2d_backward.default: 1,
}
"""Gradients, and which of their arguments they take the shape of alone."""

_NEVER_TWICE = (
    aten.convolution.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.max_pool2d_with_indices.default,
    *FUSED_ATTENTION,
    aten._softmax.default,
)
"""Operations that take too long to be run again on the way back."""

_AGAIN = 0.1
"""What it costs to run a cheap operation again, over what it costs to keep its result."""


@dataclass(frozen=True)
class GraphHalves:
    """Programs for any number of images.

    ``infer(images, *constants, x)`` gives the output, ``forward`` the same and a tuple of what is kept,
    ``backward(images, *constants, x, *kept, g)`` the gradient of x. With ``rectifies`` the output is that before the
    ReLU which the graph ends in, and g is its gradient. ``kept_bytes`` and ``largest_bytes``, of the largest value, are
    those of one image, like ``working_bytes``, which a run of either holds beside what is kept.
    """

    infer: fx.GraphModule
    forward: fx.GraphModule
    backward: fx.GraphModule
    rectifies: bool
    kept_bytes: int
    largest_bytes: int
    working_bytes: int


def halve(frozen: FrozenGraph, device: torch.device) -> GraphHalves:
    """Both programs of a graph; what cannot be differentiated raises whatever it raises."""
    last = frozen.output
    rectifies = last.target is aten.relu.default
    end = cast(fx.Node, last.args[0]) if rectifies else last
    constants = frozen.constants()
    infer = _extract(frozen.graph, [frozen.images, *constants, frozen.x], end)
    joint = trace_any_batch(lambda images: _joint(frozen, infer, images, device))
    graph = joint.graph
    images, *constants, x, g = [node for node in graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in graph.nodes if node.op == "output")
    y, g_x = cast(tuple[fx.Node, fx.Node], output.args[0])
    specs = {node: few for node, (few, _) in joint.specs.items()}
    for node, both in joint.specs.items():
        node.meta[SPEC] = both
    behind = _reached_from([g])
    _forget_shapes(joint, specs, behind, device)
    stack_selected(graph)
    graph.eliminate_dead_code()
    kept = _kept(graph, constants, x, behind, specs)
    forward = _extract(graph, [images, *constants, x], (y, tuple(kept)))
    backward = _extract(graph, [images, *constants, x, *kept, g], g_x, behind)
    kept_bytes = sum(bytes_per_image(joint.specs[node]) for node in kept)
    return GraphHalves(
        infer,
        forward,
        backward,
        rectifies,
        kept_bytes,
        max(map(bytes_per_image, joint.specs.values())),
        max(working_bytes(forward) - kept_bytes, working_bytes(backward)),
    )


def _joint(frozen: FrozenGraph, program: fx.GraphModule, images: int, device: torch.device) -> fx.Graph:
    """From constants, x and g to the output and the gradient of x, for a number of images."""

    def run(constants: list[Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        y, gradient = cast(Any, torch.func.vjp(lambda x: program(images, *constants, x), x))
        return y, gradient(g)[0]

    # on real tensors, whose strides are those of the work; zeros, since some are indices
    constants = [torch.zeros_like(frozen.specs[node], device=device) for node in frozen.constants()]
    x = zeros_like(frozen.specs[frozen.x], images, device)
    with torch.no_grad():
        g = torch.zeros_like(program(images, *constants, x))
    traced = make_fx(torch.func.functionalize(run, remove="mutations"))(constants, x, g)
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise NotImplementedError(f"{node.target} changes a tensor in place")
        if node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
    return graph


def _reached_from(starts: list[fx.Node]) -> set[fx.Node]:
    reached = set(starts)
    waiting = list(starts)
    while waiting:
        for user in waiting.pop().users:
            if user not in reached:
                reached.add(user)
                waiting.append(user)
    return reached


def _forget_shapes(joint: AnyBatch, specs: dict[fx.Node, Any], behind: set[fx.Node], device: torch.device) -> None:
    """Give gradients that take the shape of a value alone an empty tensor instead of it."""
    graph = joint.graph
    for node in list(graph.nodes):
        place = _SHAPE_ONLY.get(node.target)
        if place is None or (node.target is aten.convolution_backward.default and any(node.args[-1][1:])):
            continue
        like = specs[node.args[place]]
        sizes = joint.sizes(node.args[place])
        with graph.inserting_before(node):
            empty = graph.call_function(aten.empty_strided.default, sizes, {"dtype": like.dtype, "device": device})
        specs[empty] = like
        # nothing is written into it, and memory that is not written takes none
        behind.add(empty)
        node.args = tuple(empty if index == place else argument for index, argument in enumerate(node.args))


def _kept(
    graph: fx.Graph, constants: list[fx.Node], x: fx.Node, behind: set[fx.Node], specs: dict[fx.Node, Any]
) -> list[fx.Node]:
    """The values from which the way back can be computed, together with x, at the least cost: a minimum cut.

    What is kept costs its size, what is run again a share of that. Among cuts of one cost the one that leaves the least
    to be run again.
    """
    ahead = [node for node in graph.nodes if node not in behind and node.op == "call_function"]
    from_images = _reached_from([x])
    network = nx.DiGraph()
    # backwards: from what the gradient reads to what cannot be run again
    for node in ahead:
        if node not in from_images:
            continue
        value = specs.get(node)
        capacity = {"capacity": _bytes(value)} if isinstance(value, Tensor) else {}
        network.add_edge((node, "out"), (node, "in"), **capacity)
        if any(user in behind and user.op != "output" for user in node.users):
            network.add_edge("start", (node, "out"))
        if node.target in _NEVER_TWICE:
            network.add_edge((node, "in"), "end")
        else:
            if not is_view(node):
                made = _bytes(value) if value is not None else sum(_bytes(specs.get(user)) for user in node.users)
                network.add_edge((node, "in"), "end", capacity=_AGAIN * made)
            for parent in node.all_input_nodes:
                if parent is not x and parent not in constants and parent in from_images:
                    network.add_edge((node, "in"), (parent, "out"))
    if "start" not in network or "end" not in network:
        return []
    _, (near, _) = nx.minimum_cut(network, "start", "end")
    return [node for node in ahead if (node, "out") in near and (node, "in") not in near]


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(value) if isinstance(tensor, Tensor))


def _extract(
    graph: fx.Graph, inputs: list[fx.Node], output: Any, in_order: Container[fx.Node] | None = None
) -> fx.GraphModule:
    """What computes ``output`` from ``inputs``.

    Operations that are not ``in_order``, where that is given, are run when their results are first needed, so that
    these are held no longer than that.
    """
    part = fx.Graph()
    made = {node: part.placeholder(f"given_{index}") for index, node in enumerate(inputs)}
    needed: set[fx.Node] = set()
    waiting = [node for node in tree_leaves(output) if isinstance(node, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in made and node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    order = [node for node in graph.nodes if node in needed]
    if in_order is not None:
        order = _when_needed(order, in_order)
    for node in order:
        made[node] = part.node_copy(node, lambda argument: made[argument])
        # strides may be others than those of the traced tensors
        if node.target in (aten.view.default, aten._unsafe_view.default):
            made[node].target = aten.reshape.default
    part.output(tree_map_only(fx.Node, made.__getitem__, output))
    return fx.GraphModule({}, part)


def _when_needed(nodes: list[fx.Node], in_order: Container[fx.Node]) -> list[fx.Node]:
    """The same nodes, those that are not ``in_order`` right before the first of the others that needs them."""
    place = {node: index for index, node in enumerate(nodes)}
    chosen: dict[fx.Node, None] = {}
    for node in nodes:
        if node not in in_order:
            continue
        late = {node}
        waiting = [node]
        while waiting:
            for needed in waiting.pop().all_input_nodes:
                if needed in place and needed not in chosen and needed not in late:
                    late.add(needed)
                    waiting.append(needed)
        chosen.update(dict.fromkeys(sorted(late, key=place.__getitem__)))
    return list(chosen)
