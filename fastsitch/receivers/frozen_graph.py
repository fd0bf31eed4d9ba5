"""A frozen segment as a graph of tensor operations, with what does not depend on the images computed once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

from fastsitch.chains.same_values import same_bits
from fastsitch.receivers.any_batch import TRACED, trace_any_batch

aten = torch.ops.aten

_OF_SHAPES = (
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
)
"""Operations that read no value of their first argument."""


@dataclass
class FrozenGraph:
    """Operations from ``images``, their number, and ``x`` to one output; constants are the other placeholders.

    ``exact`` are the values of the constants in the dtype that they are folded in, ``specs`` what every node gives for
    two images: a meta tensor, or several, in the dtype of the work, or a number.
    """

    graph: fx.Graph
    images: fx.Node
    x: fx.Node
    exact: dict[fx.Node, Tensor]
    specs: dict[fx.Node, Any] = field(default_factory=dict)
    traced: dict[fx.Node, tuple[Any, Any]] = field(default_factory=dict)
    """What the nodes that were traced give for two and for three images, in the dtype of the trace."""
    _made: int = 0

    @property
    def output(self) -> fx.Node:
        (last,) = (node for node in self.graph.nodes if node.op == "output")
        return cast(fx.Node, last.args[0])

    def constant(self, value: Tensor, like: torch.dtype) -> fx.Node:
        """A new constant of the given value, which is used in dtype ``like``."""
        with self.graph.inserting_before(self.x):
            node = self.graph.placeholder(f"folded_{self._made}")
        self._made += 1
        self.exact[node] = value
        self.specs[node] = torch.empty_strided(value.shape, value.stride(), dtype=like, device="meta")
        return node

    def values(self) -> list[Tensor]:
        """Of the constants, in the order of the placeholders, in the dtype of the work."""
        return [self.exact[node].to(self.specs[node].dtype) for node in self.constants()]

    def constants(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder" and node not in (self.images, self.x)]

    def fixed_shape(self, node: fx.Node) -> list[int]:
        """The shape of what a traced node gives, -1 where it grows with the images."""
        few, more = self.traced[node]
        return [size if size == other else -1 for size, other in zip(few.shape, more.shape, strict=True)]

    def drop_unused(self) -> None:
        """Remove operations and constants that nothing needs."""
        for node in reversed(list(self.graph.nodes)):
            if node.op != "output" and node not in (self.images, self.x) and not node.users:
                self.graph.erase_node(node)
                self.exact.pop(node, None)

    def call(self, before: fx.Node, target: Any, *arguments: Any) -> fx.Node:
        """A new operation in front of a node."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, arguments)
        self.specs[node] = target(*tree_map_only(fx.Node, self.specs.__getitem__, arguments))
        return node

    def replace(self, node: fx.Node, other: fx.Node) -> None:
        """Let what uses a node use another, and remove it."""
        node.replace_all_uses_with(other)
        self.graph.erase_node(node)


def trace_frozen(working: nn.Module, exact: nn.Module, x: Tensor) -> FrozenGraph:
    """The graph of a frozen module for any number of images; ``x`` are three or more, in rows one after another.

    ``working`` and ``exact`` are the same module in the dtypes of the work and of folding. What fails to be traced
    raises whatever it raises.
    """
    tensors = dict(_tensors(working))
    names = list(tensors)
    kept: list[fx.GraphModule] = []

    def run(values: list[Tensor], x: Tensor) -> Tensor:
        return cast(Tensor, torch.func.functional_call(working, dict(zip(names, values, strict=True)), (x,)))

    def trace(images: int) -> fx.Graph:
        with torch.no_grad():
            traced = make_fx(torch.func.functionalize(run, remove="mutations"))([*tensors.values()], x[:images])
        kept.append(traced)
        # without what packs its arguments
        graph = fx.Graph()
        output = graph.graph_copy(traced.graph, {})
        graph.output(output[0] if isinstance(output, list | tuple) else output)
        return graph

    joined = trace_any_batch(trace)
    graph = joined.graph
    images, *weights, image = [node for node in graph.nodes if node.op == "placeholder"]
    precise = dict(_tensors(exact))
    frozen = FrozenGraph(graph, images, image, {node: precise[name] for node, name in zip(weights, names, strict=True)})
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        value, other = (getattr(traced, str(node.target)).detach() for traced in kept)
        if not same_bits(value, other):
            raise NotImplementedError("a constant depends on the number of images")
        constant = frozen.constant(value, value.dtype)
        node.replace_all_uses_with(constant)
        graph.erase_node(node)
    frozen.traced |= joined.specs
    _compute_constants(frozen, x[: TRACED[0]], {node for node, specs in joined.specs.items() if _differ(*specs)})
    return frozen


def _differ(few: Any, more: Any) -> bool:
    return [each.shape for each in tree_leaves(few) if isinstance(each, Tensor)] != [
        each.shape for each in tree_leaves(more) if isinstance(each, Tensor)
    ]


def _tensors(module: nn.Module) -> Mapping[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _compute_constants(frozen: FrozenGraph, x: Tensor, of_images: set[fx.Node]) -> None:
    """Fill ``specs``; what depends on constants alone becomes one, but for ``of_images``, of which each has its own."""
    results: dict[fx.Node, Any] = {}
    exact = next((value.dtype for value in frozen.exact.values() if value.is_floating_point()), x.dtype)
    for node in list(frozen.graph.nodes):
        if node is frozen.images:
            frozen.specs[node] = len(x)
        elif node is frozen.x:
            frozen.specs[node] = _meta(x)
        elif node.op == "placeholder":
            results[node] = frozen.exact[node]
            if node not in frozen.specs:
                value = frozen.exact[node]
                # weights are used in the dtype of the images
                dtype = x.dtype if value.is_floating_point() else value.dtype
                frozen.specs[node] = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device="meta")
        elif node.op == "call_function":
            given = tree_map_only(fx.Node, frozen.specs.__getitem__, (node.args, dict(node.kwargs)))
            frozen.specs[node] = _on_meta(node.target, *given)
            if node in of_images:
                continue
            if node.target in _OF_SHAPES:
                like = frozen.specs[node.all_input_nodes[0]]
                nothing = torch.empty((), dtype=exact if like.is_floating_point() else like.dtype, device=x.device)
                results[node] = node.target(nothing.expand(like.shape), *node.args[1:], **node.kwargs)
            elif all(parent in results for parent in node.all_input_nodes):
                args, kwargs = tree_map_only(fx.Node, results.__getitem__, (node.args, dict(node.kwargs)))
                with torch.no_grad():
                    results[node] = cast(Any, node.target)(*args, **kwargs)
    for node, value in results.items():
        if node.op != "placeholder" and isinstance(value, Tensor) and any(user not in results for user in node.users):
            constant = frozen.constant(value, frozen.specs[node].dtype)
            node.replace_all_uses_with(constant)
    frozen.drop_unused()


def _meta(value: Any) -> Any:
    def meta(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    return tree_map_only(Tensor, meta, value)


def _on_meta(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("meta")}
    return target(*args, **kwargs)
