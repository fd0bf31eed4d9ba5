"""What the axes of a representation mean, derived by following a traced graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from fastsitch.chains.layout import Layout, token_layout
from fastsitch.chains.trace import operation

Shapes = Mapping[fx.Node, tuple[int, ...]]
"""Of all nodes that are tensors, without the batch."""


_LETTERS = {"map": "CHW", "map-last": "HWC", "tokens": "NC", "vector": "C"}


@dataclass(frozen=True)
class Axes:
    """Letters of the axes behind the batch: C channels, H and W of a map, N tokens; of these also prefix and grid."""

    letters: str
    prefix: int = 0
    grid: tuple[int, int] | None = None
    guessed: bool = False
    """Whether the grid has the proportions of the image, and nothing else shows it."""

    @classmethod
    def of(cls, layout: Layout) -> "Axes":
        """Those of a layout that is known."""
        return cls(_LETTERS[layout.layout], layout.prefix_tokens, layout.grid)

    @property
    def layout(self) -> Layout | None:
        """The layout of a representation with these axes, where it has one."""
        name = {letters: layout for layout, letters in _LETTERS.items()}.get(self.letters)
        if name == "tokens":
            return None if self.grid is None else Layout(name, self.prefix, self.grid)
        return None if name is None else Layout(name)


def follow_axes(
    nodes: Sequence[fx.Node],
    root: nn.Module,
    shapes: Shapes,
    batches: Mapping[fx.Node, int],
    given: Mapping[fx.Node, Layout],
) -> dict[fx.Node, Axes]:
    """The axes of every node whose meaning is known; the first of ``nodes``, which are in order, is the image.

    ``batches`` are the axes of the images, 0 or 1, where there are any; the layouts ``given`` are right.
    """
    known = {nodes[0]: Axes("CHW")}
    # where the meaning was lost, the last node that has one
    lost: dict[fx.Node, fx.Node] = {}
    image_size = shapes[nodes[0]][1:]
    for node in nodes[1:]:
        parents = [parent for parent in node.all_input_nodes if parent in known]
        # of several operands the one that looks like the result: the others may be broadcast
        parent = min(parents, key=lambda node_before: shapes.get(node_before) != shapes.get(node), default=None)
        if parents and (joined := _joined(node)) and joined[-1] in parents:
            # behind class tokens
            parent = joined[-1]
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        before = None if parent is None else known[parent]
        guess = _module_axes(module, shapes.get(node), image_size)
        if module is not None and any(one in lost for one in node.all_input_nodes) and _keeps_axes(module):
            # such as windows of a map, in which these work on the last axis
            guess = None if guess == Axes("CHW") else guess
        axes = Axes.of(given[node]) if node in given else _axes(node, module, parent, before, guess, shapes, batches)
        earlier = [lost.get(one, one) for one in node.all_input_nodes if one in lost or one in known]
        if axes is None and parent not in known:
            # windows, and groups of channels, that are put together again
            alike = (
                one for one in earlier if shapes.get(one) == shapes.get(node) and batches.get(one) == batches.get(node)
            )
            axes = next((known[one] for one in alike if node in shapes), None)
        if axes is not None:
            known[node] = axes
        elif earlier:
            lost[node] = earlier[0]
    return known


def _axes(
    node: fx.Node,
    module: nn.Module | None,
    parent: fx.Node | None,
    before: Axes | None,
    guess: Axes | None,
    shapes: Shapes,
    batches: Mapping[fx.Node, int],
) -> Axes | None:
    shape = shapes.get(node)
    if shape is None:
        # a tuple of tensors: as what they were made of, unless a module that is run as a whole made it
        return None if node.op == "call_module" else before
    if len(shape) == 1:
        return Axes("C")
    if isinstance(module, nn.Conv2d) or operation(node) == "conv2d":
        return Axes("CHW")
    if before is None or parent is None:
        return guess
    order = _permutation(node, 1 + len(before.letters))
    if order is not None:
        batch = batches.get(parent)
        if batch is None or node not in batches:
            return None
        letters = before.letters[:batch] + "B" + before.letters[batch:]
        return replace(before, letters="".join(letters[axis] for axis in order if letters[axis] != "B"))
    if len(shape) != len(before.letters):
        return _reshaped(before, shapes.get(parent, ()), shape) or guess
    if parent not in shapes or shapes[parent] == shape:
        return before
    if operation(node) in ("view", "reshape") or before.letters == "CN":
        return None
    if before.letters == "NC" and shape[0] != shapes[parent][0]:
        return _other_tokens(node, parent, before, shape[0] - shapes[parent][0])
    return before


def _module_axes(module: nn.Module | None, shape: tuple[int, ...] | None, image_size: tuple[int, ...]) -> Axes | None:
    """Of the output of a module that is run as a whole: a map, or tokens on a grid in the image's proportions."""
    if module is None or shape is None:
        return None
    if len(shape) == 2:
        height, width = image_size
        layout = token_layout(shape[0], (height, width))
        return None if layout is None else Axes("NC", layout.prefix_tokens, layout.grid, guessed=True)
    return Axes("CHW") if len(shape) == 3 else None


def _keeps_axes(module: nn.Module) -> bool:
    """Whether a module is one of torch's own whose output is laid out as its input."""
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Unflatten | nn.Fold)


def _permutation(node: fx.Node, dimensions: int) -> list[int] | None:
    """The order of axes after a permute or transpose."""
    arguments = [*node.args[1:], *node.kwargs.values()]
    flat = [axis for value in arguments for axis in (value if isinstance(value, list | tuple) else [value])]
    axes = [axis for axis in flat if isinstance(axis, int)]
    if len(axes) != len(flat):
        return None
    if operation(node) == "permute" and len(axes) == dimensions:
        return axes
    if operation(node) in ("transpose", "swapaxes") and len(axes) == 2:
        order = list(range(dimensions))
        order[axes[0]], order[axes[1]] = order[axes[1]], order[axes[0]]
        return order
    return None


def _reshaped(before: Axes, shape: tuple[int, ...], after: tuple[int, ...]) -> Axes | None:
    """Maps flattened to tokens, and back."""
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
    """Tokens put before those of ``parent``, or removed from there."""
    joined = _joined(node)
    if more > 0 and joined and joined[-1] is parent:
        return replace(before, prefix=before.prefix + more)
    if -before.prefix <= more < 0 and operation(node) in ("getitem", "slice"):
        return replace(before, prefix=before.prefix + more)
    return None


def _joined(node: fx.Node) -> Sequence[fx.Node]:
    """The tensors that a node concatenates."""
    joined = node.args[0] if node.args and operation(node) in ("cat", "concat") else ()
    return [one for one in joined if isinstance(one, fx.Node)] if isinstance(joined, list | tuple) else ()
