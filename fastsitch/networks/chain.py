"""A network as a chain of segments, so that it can be cut between any two of them."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastsitch.errors import NetworkError
from fastsitch.networks.layout import Layout
from fastsitch.networks.position import Position as Position
from fastsitch.networks.segments import copies, cut_module, protected
from fastsitch.networks.trace import first_line


class Chain(nn.Module):
    """Segments 0 ... p, each followed by a position, then a head that ends in logits.

    Inputs are (B, C, H, W); a representation is the output of a segment, as the network itself uses it. ``positions``
    lists the cuts in order. ``layouts`` says, by name, how representations are to be read that are not what their
    dimensions suggest: 4 a map, 3 tokens on a square grid, 2 a vector.
    """

    def __init__(
        self,
        segments: Sequence[nn.Module],
        head: nn.Module,
        names: Sequence[str],
        input_shape: tuple[int, int, int],
        layouts: Mapping[str, Layout] | None = None,
    ) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)
        self.head = head
        self.input_shape = input_shape
        self.positions = _positions(self.segments, names, input_shape, layouts or {})

    def representations(self, x: Tensor) -> list[Tensor]:
        """The representation at every position, from one forward pass."""
        outputs = []
        for segment in self.segments:
            x = segment(x)
            outputs.append(x)
        return outputs

    def tail(self, representation: Tensor, j: int) -> Tensor:
        """Logits (B, classes) when ``representation`` stands for the output of position ``j``."""
        self.position(j)
        for segment in list(self.segments)[j + 1 :]:
            representation = segment(representation)
        return cast(Tensor, self.head(representation))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.representations(x)[-1], len(self.positions) - 1)

    def position(self, index: int) -> Position:
        """The position with this index; raises NetworkError when there is none."""
        if not 0 <= index < len(self.positions):
            raise NetworkError(
                f"position {index} does not exist: expected an index from 0 to {len(self.positions) - 1}"
            )
        return self.positions[index]

    def with_input(self) -> "Chain":
        """The same network, its weights shared, with the image itself as position 0, named ``input``."""
        names = [position.name for position in self.positions]
        layouts = {position.name: position.kind for position in self.positions}
        return Chain([nn.Identity(), *self.segments], self.head, ["input", *names], self.input_shape, layouts)

    @classmethod
    def from_module(
        cls,
        model: nn.Module,
        example_input: Tensor,
        positions: Sequence[str] | str | None = None,
        layouts: Mapping[str, Layout] | None = None,
    ) -> "Chain":
        """Make a chain of any network that torch.fx can trace; a Chain comes back as it is.

        The network is copied, in eval mode, with in-place activations turned off: they would change a representation
        after it was captured. The example input (B, C, H, W) fixes the shapes, on the network's device; it is taken in
        the network's own dtype.

        ``positions`` are names of modules whose output every path crosses, or patterns of them such as ``layer*.?``,
        also as a text with commas. None takes what leads into the first block and the outputs of all blocks; of an
        nn.Sequential the outputs of all children but the last, which then is the head. ``layouts`` correct what the
        axes of representations are taken for.

        Raises NetworkError when the network cannot be traced or cut, or has no such position; see
        :meth:`from_segments` then.
        """
        if isinstance(model, Chain):
            return model
        channels, height, width = example_input.shape[1:]
        if isinstance(positions, str):
            positions = [part.strip() for part in positions.split(",") if part.strip()]
        example_input = _as_weights(example_input, [model])
        # one with a forward of its own is more than its children
        if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
            known = [name for name, _ in _children(model)]
            names = known[:-1] if positions is None else [name for name in known if name in positions]
            if names and (positions is None or set(positions) <= set(known)):
                return cls.from_segments(*_pieces(model, names), example_input, layouts).eval()
        parts = cut_module(model, example_input, positions)
        size = (channels, height, width)
        return cls(parts.segments, parts.head, parts.names, size, {**parts.layouts, **(layouts or {})})

    @classmethod
    def from_segments(
        cls,
        segments: Sequence[nn.Module],
        names: Sequence[str],
        head: nn.Module,
        example_input: Tensor,
        layouts: Mapping[str, Layout] | None = None,
    ) -> "Chain":
        """Make a chain of parts that are named by hand: segment after segment, then the head, is the network.

        Every segment takes what the one before it gives, one tensor with the batch first; its output is the position of
        that name. Parts are copied, with in-place activations turned off; ``layouts`` are those of the chain. Raises
        NetworkError where the parts do not fit together.
        """
        if not segments or len(segments) != len(names) or len(set(names)) != len(names):
            raise NetworkError(
                f"{len(segments)} segments and the names {list(names)}: expected at least one segment, and as many "
                "different names"
            )
        example_input = _as_weights(example_input, [*segments, head])
        channels, height, width = example_input.shape[1:]
        *copied, end = copies([*segments, head])
        modes = [(module, module.training) for part in (*copied, end) for module in part.modules()]
        for part in (*copied, end):
            part.eval()
        try:
            *kept, end = protected([*copied, end], example_input)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise NetworkError(
                f"the segments do not fit together ({first_line(error)}): expected each to take what "
                "the one before it gives, one tensor (B, ...)"
            ) from error
        chain = cls(kept, end, names, (channels, height, width), layouts)
        for module, training in modes:
            module.training = training
        return chain


def _children(model: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """All children in the order in which they run; named_children leaves out those that were there before."""
    return [(name, child) for name, child in model._modules.items() if child is not None]


def _pieces(model: nn.Sequential, names: Sequence[str]) -> tuple[list[nn.Module], list[str], nn.Module]:
    """The children of a network up to each of those named, and the others, which are the head."""
    segments: list[nn.Module] = []
    collected: list[nn.Module] = []
    for name, child in _children(model):
        collected.append(child)
        if name in names:
            segments.append(nn.Sequential(*collected))
            collected = []
    return segments, list(names), nn.Sequential(*collected)


def _as_weights(x: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """Images in the dtype of a network's weights."""
    weights = (own for module in modules for own in module.parameters() if own.is_floating_point())
    first = next(weights, None)
    return x if first is None else x.to(first.dtype)


def _positions(
    segments: nn.ModuleList,
    names: Sequence[str],
    input_shape: tuple[int, int, int],
    layouts: Mapping[str, Layout],
) -> tuple[Position, ...]:
    """Shapes by one forward pass of two zero images in eval mode (BatchNorm wants no statistics of them)."""
    unknown = [name for name in layouts if name not in names]
    if unknown:
        raise NetworkError(f"layouts of {', '.join(unknown)}: expected some of the positions {', '.join(names)}")
    parameter = next(segments.parameters(), torch.empty(0))
    x = parameter.new_zeros(2, *input_shape)
    modes = [module.training for module in segments.modules()]
    positions = []
    segments.eval()
    with torch.no_grad():
        for index, (segment, name) in enumerate(zip(segments, names, strict=True)):
            x = segment(x)
            kind = layouts.get(name, Layout.of(x.dim()))
            if kind is None:
                raise NetworkError(
                    f"position {name!r} gives a tensor of {x.dim()} dimensions: expected a map (B, C, H, W), tokens "
                    "(B, N, C) or a vector (B, C)"
                )
            positions.append(Position(index, name, tuple(x.shape[1:]), kind.layout, kind.prefix_tokens, kind.grid))
    for module, training in zip(segments.modules(), modes, strict=True):
        module.training = training
    return tuple(positions)
