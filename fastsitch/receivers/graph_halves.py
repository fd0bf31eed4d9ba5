"""A frozen graph and the gradient of its images, as two programs with as little kept between them as can be."""

from dataclasses import dataclass
from typing import Any, cast

import networkx as nx
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils._pytree import tree_leaves, tree_map_only

from fastsitch.receivers.frozen_graph import FrozenGraph

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
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._softmax.default,
)
"""Operations that take too long to be run again on the way back."""


@dataclass(frozen=True)
class GraphHalves:
    """Programs for a fixed number of images.

    ``infer(*constants, x)`` gives the output, ``forward`` the same and a tuple of what is kept, ``backward(*constants,
    x, *kept, g)`` the gradient of x. With ``rectifies``, g is that of the input of the ReLU which the graph ends in.
    """

    infer: fx.GraphModule
    forward: fx.GraphModule
    backward: fx.GraphModule
    rectifies: bool
    kept_bytes: int


def halve(frozen: FrozenGraph, device: torch.device) -> GraphHalves:
    """Both programs of a graph; what cannot be differentiated raises whatever it raises."""
    infer = fx.GraphModule({}, frozen.graph)
    last = frozen.output
    rectifies = last.target is aten.relu.default
    joint = _joint(frozen, last.args[0] if rectifies else last, device)
    graph, constants, x, g, (y, g_x) = joint
    specs = {node: _spec(node.meta["tensor_meta"]) for node in graph.nodes if "tensor_meta" in node.meta}
    behind = _reached_from([g])
    _forget_shapes(graph, specs, behind, device)
    graph.eliminate_dead_code()
    kept = _kept(graph, constants, x, behind, specs)
    forward = _extract(graph, [*constants, x], (y, tuple(kept)))
    backward = _extract(graph, [*constants, x, *kept, g], g_x)
    return GraphHalves(infer, forward, backward, rectifies, sum(_bytes(specs[node]) for node in kept))


def _joint(
    frozen: FrozenGraph, end: Any, device: torch.device
) -> tuple[fx.Graph, list[fx.Node], fx.Node, fx.Node, tuple[fx.Node, fx.Node]]:
    both = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    output = both.graph_copy(frozen.graph, mapped)
    both.output((output, mapped[end]))
    program = fx.GraphModule({}, both)

    def run(constants: list[Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
            y, before = program(*constants, x)
            return before, y

        _, gradient, y = cast(Any, torch.func.vjp(outputs, x, has_aux=True))
        return y, gradient(g)[0]

    def empty(node: fx.Node) -> Tensor:
        spec = frozen.specs[node]
        return torch.empty_strided(spec.shape, spec.stride(), dtype=spec.dtype, device=device)

    # on real tensors, whose strides are those of the work
    given = [empty(node) for node in frozen.constants()], empty(frozen.x), empty(end)
    traced = make_fx(torch.func.functionalize(run, remove="mutations"))(*given)
    graph = fx.Graph()
    y, g_x = cast(Any, graph.graph_copy(traced.graph, {}))
    graph.output((y, g_x))
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise NotImplementedError(f"{node.target} changes a tensor in place")
        if node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
    (last,) = (node for node in graph.nodes if node.op == "output")
    *constants, x, g = [node for node in graph.nodes if node.op == "placeholder"]
    return graph, constants, x, g, cast(tuple[fx.Node, fx.Node], last.args[0])


def _reached_from(starts: list[fx.Node]) -> set[fx.Node]:
    reached = set(starts)
    waiting = list(starts)
    while waiting:
        for user in waiting.pop().users:
            if user not in reached:
                reached.add(user)
                waiting.append(user)
    return reached


def _forget_shapes(graph: fx.Graph, specs: dict[fx.Node, Any], behind: set[fx.Node], device: torch.device) -> None:
    """Give gradients that take the shape of a value alone an empty tensor instead of it."""
    for node in list(graph.nodes):
        place = _SHAPE_ONLY.get(node.target)
        if place is None or (node.target is aten.convolution_backward.default and any(node.args[-1][1:])):
            continue
        like = specs[node.args[place]]
        with graph.inserting_before(node):
            empty = graph.call_function(
                aten.empty_strided.default, (tuple(like.shape), like.stride()), {"dtype": like.dtype, "device": device}
            )
        specs[empty] = like
        behind.add(empty)
        node.args = tuple(empty if index == place else argument for index, argument in enumerate(node.args))


def _kept(
    graph: fx.Graph, constants: list[fx.Node], x: fx.Node, behind: set[fx.Node], specs: dict[fx.Node, Any]
) -> list[fx.Node]:
    """The values of least size from which the way back can be computed, together with x: a minimum cut.

    Among cuts of one size the one that leaves the least to be run again.
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
            for parent in node.all_input_nodes:
                if parent is not x and parent not in constants and parent in from_images:
                    network.add_edge((node, "in"), (parent, "out"))
    if "start" not in network or "end" not in network:
        return []
    _, (near, _) = nx.minimum_cut(network, "start", "end")
    return [node for node in ahead if (node, "out") in near and (node, "in") not in near]


def _spec(found: Any) -> Any:
    """Meta tensors in the place of what the tracer recorded of tensors."""
    if isinstance(found, TensorMetadata):
        return torch.empty_strided(found.shape, found.stride, dtype=found.dtype, device="meta")
    return [_spec(each) for each in found] if isinstance(found, list | tuple) else None


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(value) if isinstance(tensor, Tensor))


def _extract(graph: fx.Graph, inputs: list[fx.Node], output: Any) -> fx.GraphModule:
    """What computes ``output`` from ``inputs``."""
    part = fx.Graph()
    made = {node: part.placeholder(f"given_{index}") for index, node in enumerate(inputs)}
    needed: set[fx.Node] = set()
    waiting = [node for node in tree_leaves(output) if isinstance(node, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in made and node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    for node in graph.nodes:
        if node in needed:
            made[node] = part.node_copy(node, lambda argument: made[argument])
            # strides may be others than those of the traced tensors
            if node.target in (aten.view.default, aten._unsafe_view.default):
                made[node].target = aten.reshape.default
    part.output(tree_map_only(fx.Node, made.__getitem__, output))
    return fx.GraphModule({}, part)
