"""A network as a chain of segments, so that it can be cut between any two of them."""

import copy
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastsitch.errors import NetworkError
from fastsitch.networks.layout import Layout
from fastsitch.networks.position import Position as Position


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
        positions: Sequence[str] | None = None,
        layouts: Mapping[str, Layout] | None = None,
    ) -> "Chain":
        """Make a chain of ``model``: a Chain as it is, an nn.Sequential cut after the children in ``positions``.

        A Sequential is copied, with in-place activations turned off: they would change a representation after it was
        captured. ``positions`` are names of its children; None cuts after every child but the last, which then is the
        head. The example input (B, C, H, W) fixes the shapes; ``layouts`` are those of the chain. Raises NetworkError
        for other modules.
        """
        if isinstance(model, Chain):
            return model
        if not isinstance(model, nn.Sequential):
            raise NetworkError(
                f"cannot cut a {type(model).__name__}: expected a Chain or an nn.Sequential; "
                "wrap the model's stages in an nn.Sequential"
            )
        model = copy.deepcopy(model)
        for module in model.modules():
            if hasattr(module, "inplace"):
                module.__dict__["inplace"] = False
        children = list(model.named_children())
        names = [name for name, _ in children[:-1]] if positions is None else list(positions)
        known = [name for name, _ in children]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise NetworkError(f"no position named {', '.join(unknown) or '(none given)'}: expected some of {known}")
        segments: list[nn.Module] = []
        collected: list[nn.Module] = []
        for name, child in children:
            collected.append(child)
            if name in names:
                segments.append(nn.Sequential(*collected))
                collected = []
        ordered = [name for name in known if name in names]
        channels, height, width = example_input.shape[1:]
        return cls(segments, nn.Sequential(*collected), ordered, (channels, height, width), layouts)


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
