"""Gradients of parts of a tensor, put side by side instead of added up among zeros."""

from typing import cast

import torch
from torch import fx

aten = torch.ops.aten

_SELECTED = aten.select_backward.default


def stack_selected(graph: fx.Graph) -> None:
    """Let sums of the gradients of all indices along one axis, as of queries, keys and values, be one stack of them."""
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or all(user.target is aten.add.Tensor for user in node.users):
            continue
        parts = _summands(node)
        if len({str(part.args[1:3]) for part in parts}) != 1 or any(part.target is not _SELECTED for part in parts):
            continue
        sizes, axis = cast(list[int], parts[0].args[1]), cast(int, parts[0].args[2])
        found = {cast(int, part.args[3]): cast(fx.Node, part.args[0]) for part in parts}
        if len(parts) != sizes[axis] or sorted(found) != list(range(sizes[axis])):
            continue
        with graph.inserting_before(node):
            stacked = graph.call_function(aten.stack.default, ([found[index] for index in sorted(found)], axis))
        stacked.meta = dict(node.meta)
        node.replace_all_uses_with(stacked)
    graph.eliminate_dead_code()


def _summands(node: fx.Node) -> list[fx.Node]:
    """What a tree of sums adds up, each of which nothing else reads."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return [node]
    return [
        part
        for argument in node.args
        if isinstance(argument, fx.Node)
        for part in (_summands(argument) if len(argument.users) == 1 else [argument])
    ]
