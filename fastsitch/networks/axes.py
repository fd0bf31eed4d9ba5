"""What the axes of a representation mean, followed through a traced graph."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastsitch.networks.layout import Layout

Shapes = Mapping[fx.Node, tuple[int, ...]]
"""Of all nodes that are tensors, without the batch."""


@dataclass(frozen=True)
class Axes:
    """Letters of the axes behind the batch: C channels, H and W of a map, N tokens; of these also prefix and grid."""

    letters: str
    prefix: int = 0
    grid: tuple[int, int] | None = None

    @property
    def layout(self) -> Layout | None:
        """The layout of a representation with these axes, where it has one."""
        name = {"CHW": "map", "HWC": "map-last", "NC": "tokens", "C": "vector"}.get(self.letters)
        if name == "tokens":
            return None if self.grid is None else Layout(name, self.prefix, self.grid)
        return None if name is None else Layout(name)


def follow_axes(nodes: Sequence[fx.Node], root: nn.Module, shapes: Shapes) -> dict[fx.Node, Axes]:
    """The axes of every node whose meaning is known; the first of ``nodes``, which are in order, is the image."""
    known = {nodes[0]: Axes("CHW")}
    for node in nodes[1:]:
        parents = [parent for parent in node.all_input_nodes if parent in known]
        # of several operands the one that looks like the result: the others may be broadcast
        parent = min(parents, key=lambda own: shapes.get(own) != shapes.get(node), default=None)
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        axes = _axes(node, module, parent, None if parent is None else known[parent], shapes)
        if axes is not None:
            known[node] = axes
    return known


def _axes(
    node: fx.Node, module: nn.Module | None, parent: fx.Node | None, before: Axes | None, shapes: Shapes
) -> Axes | None:
    shape = shapes.get(node)
    if shape is None:
        # several tensors in one: as what they were made of
        return before
    if len(shape) == 1:
        return Axes("C")
    if isinstance(module, nn.Conv2d) or node.target is F.conv2d:
        return Axes("CHW")
    if before is None or parent is None:
        return _opaque(module, shape)
    order = _permutation(node, 1 + len(before.letters))
    if order is not None:
        letters = "".join(("B" + before.letters)[axis] for axis in order)
        return replace(before, letters=letters[1:]) if letters[0] == "B" else None
    if len(shape) != len(before.letters):
        return _reshaped(before, shapes.get(parent, ()), shape) or _opaque(module, shape)
    if parent not in shapes or shapes[parent] == shape:
        return before
    if node.target in ("view", "reshape", torch.reshape) or before.letters == "CN":
        return None
    if before.letters == "NC" and shape[0] != shapes[parent][0]:
        return _other_tokens(node, parent, before, shape[0] - shapes[parent][0])
    return before


def _opaque(module: nn.Module | None, shape: tuple[int, ...]) -> Axes | None:
    """Of what a module gives that is run as a whole: a map, or a square of tokens with at most one class token."""
    if module is None:
        return None
    if len(shape) == 2:
        for prefix in (0, 1):
            side = math.isqrt(shape[0] - prefix)
            if side > 0 and side * side == shape[0] - prefix:
                return Axes("NC", prefix, (side, side))
    return Axes("CHW") if len(shape) == 3 else None


def _permutation(node: fx.Node, dimensions: int) -> list[int] | None:
    """The order of axes that a permute or transpose brings about."""
    arguments = [*node.args[1:], *node.kwargs.values()]
    flat = [axis for own in arguments for axis in (own if isinstance(own, list | tuple) else [own])]
    axes = [axis for axis in flat if isinstance(axis, int)]
    if len(axes) != len(flat):
        return None
    if node.target in ("permute", torch.permute) and len(axes) == dimensions:
        return axes
    if node.target in ("transpose", "swapaxes", torch.transpose, torch.swapaxes) and len(axes) == 2:
        order = list(range(dimensions))
        order[axes[0]], order[axes[1]] = order[axes[1]], order[axes[0]]
        return order
    return None


def _reshaped(before: Axes, shape: tuple[int, ...], after: tuple[int, ...]) -> Axes | None:
    """Maps laid out as tokens, and back."""
    if before.letters == "CHW" and after == (shape[0], shape[1] * shape[2]):
        return Axes("CN", grid=(shape[1], shape[2]))
    if before.letters == "HWC" and after == (shape[0] * shape[1], shape[2]):
        return Axes("NC", grid=(shape[0], shape[1]))
    if before.letters == "CN" and len(after) == 3 and after[0] == shape[0] and before.grid == after[1:]:
        return Axes("CHW")
    if before.letters == "NC" and len(after) == 3 and after[2] == shape[1] and before.grid == after[:2]:
        return Axes("HWC")
    return None


def _other_tokens(node: fx.Node, parent: fx.Node, before: Axes, more: int) -> Axes | None:
    """Tokens put in front of those of ``parent``, or taken away from there."""
    joined = node.args[0] if node.target in (torch.cat, torch.concat) else ()
    if more > 0 and isinstance(joined, list | tuple) and joined and joined[-1] is parent:
        return replace(before, prefix=before.prefix + more)
    if -before.prefix <= more < 0 and node.target is operator.getitem:
        return replace(before, prefix=before.prefix + more)
    return None
