"""How much memory a graph takes while it runs, from the shapes of its values alone."""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

SPEC = "fastsitch_spec"
"""What nodes' ``meta`` holds of their values: meta tensors, or several, for two numbers of images that differ by 1."""


def bytes_per_image(specs: tuple[Any, Any] | None) -> int:
    """What one image adds to a value."""
    few, more = (0, 0) if specs is None else map(_bytes, specs)
    return more - few


def working_bytes(program: fx.GraphModule) -> int:
    """Bytes per image that a run holds at most at a time, beside its arguments; its results are counted.

    A tensor lives as long as an operation is to read it, or a view of it.
    """
    nodes = list(program.graph.nodes)
    owners: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for place, node in enumerate(nodes):
        owners[node] = owners[node.all_input_nodes[0]] if is_view(node) else node
        for read in (node, *node.all_input_nodes):
            last[owners[read]] = place
    sizes = {node: 0 if node.op == "placeholder" else bytes_per_image(node.meta.get(SPEC)) for node in nodes}
    done: dict[int, list[fx.Node]] = {}
    for node, place in last.items():
        done.setdefault(place, []).append(node)
    held = most = 0
    for place, node in enumerate(nodes):
        held += sizes[node] if owners[node] is node else 0
        most = max(most, held)
        held -= sum(sizes[each] for each in done.get(place, ()))
    return most


def is_view(node: fx.Node) -> bool:
    """Whether a node's value is another's, or a part of it."""
    if not node.all_input_nodes:
        return False
    if node.target in (operator.getitem, torch.ops.aten.reshape.default):
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(value) if isinstance(tensor, Tensor))
