"""A network as a chain of segments, so that it can be cut between any two of them."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn

from fastsitch.chains.cut_points import PROBABILITIES
from fastsitch.chains.kept_state import require_no_first_pass, require_weights, state_kept
from fastsitch.chains.layout import Layout, token_layout
from fastsitch.chains.module_between_cuts import cut_module, protect_inputs
from fastsitch.chains.module_copies import copy_modules
from fastsitch.chains.node_values import run_segment
from fastsitch.chains.position import Position
from fastsitch.chains.trace import CannotCut
from fastsitch.chains.vet_chain import require_same_values, vet_chain
from fastsitch.chains.wrappers import unwrapped
from fastsitch.errors import NetworkError, plain
from fastsitch.vocabulary import separated


class Chain(nn.Module):
    """Segments 0 ... p, each followed by a position, then a head that ends in logits.

    Inputs are (B, C, H, W); a representation is the output of a segment, as the network itself uses it. By their
    dimensions representations are read as a map (4), tokens on a square grid (3) or a vector (2). Chains come from
    :meth:`from_module` and :meth:`from_segments`.

    Attributes:
        segments: the modules between the positions, in order.
        head: what follows the last position.
        positions: where the network can be cut, in order, with their shapes.
        input_shape: channels, height and width of the images.

    Raises:
        NetworkError: a layout of a position that there is not, or that does not fit its shape.
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
        """The representation at every position, from one forward pass.

        Args:
            x: images (B, C, H, W), normalised.

        Returns:
            One tensor (B, ...) per position, in the shapes of ``positions``.
        """
        outputs = []
        for segment in self.segments:
            x = segment(x)
            outputs.append(x)
        return outputs

    def tail(self, representation: Tensor, j: int) -> Tensor:
        """The network from a position on.

        Args:
            representation: stands for the output of position ``j``, (B, ...).
            j: index of the position.

        Returns:
            Logits (B, classes).

        Raises:
            NetworkError: there is no such position.
        """
        self.position(j)
        for segment in list(self.segments)[j + 1 :]:
            representation = segment(representation)
        return cast(Tensor, self.head(representation))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.representations(x)[-1], len(self.positions) - 1)

    def position(self, index: int) -> Position:
        """The position with this index.

        Raises:
            NetworkError: there is none.
        """
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
        output: str | int | None = None,
        logits: bool = True,
    ) -> "Chain":
        """Make a chain of any network that torch.fx or torch.export can trace; a Chain comes back as it is.

        The network is copied, in eval mode, with in-place activations turned off: they would change a representation
        after it was captured. Inside DataParallel, DistributedDataParallel or torch.compile the network itself is
        taken.

        Args:
            model: the network.
            example_input: images (B, C, H, W) that fix the shapes, on the network's device; cast to its dtype.
            positions: names of modules whose output lies on every path, or patterns of them such as ``layer*.?``, in a
                list or separated by commas. None takes the input of the first block and the outputs of all blocks; of
                an nn.Sequential the outputs of all children but the last, which then is the head.
            layouts: by name of the position, where the one that was found is wrong.
            output: name or index of the logits, for a network that returns several tensors; None: ``logits``, then
                ``out``, then the first tensor (B, classes).
            logits: whether they are logits; False for features (B, D) of a network that is to be a sender.

        Returns:
            The chain, in eval mode.

        Raises:
            NetworkError: the network cannot be traced or cut, or has no such position; see :meth:`from_segments` then.
        """
        model = unwrapped(model)
        what = f"the {plain(type(model).__name__)}"
        if not isinstance(model, Chain):
            require_weights([model], what)
            require_no_first_pass([model], _as_weights(example_input, [model]), what)
        chain = cut_chain(cls, model, example_input, positions, layouts, output)
        vet_chain(chain, what, logits=logits)
        return chain if chain is model else chain.eval()

    @classmethod
    def from_segments(
        cls,
        segments: Sequence[nn.Module],
        names: Sequence[str],
        head: nn.Module,
        example_input: Tensor,
        layouts: Mapping[str, Layout] | None = None,
    ) -> "Chain":
        """Make a chain of segments that you have cut yourself: run in order, then the head, they are the network.

        All modules are copied, with in-place activations turned off.

        Args:
            segments: each takes the output of the one before, a tensor with the batch first.
            names: of the positions, which are the outputs of the segments.
            head: takes the output of the last segment, and gives logits (B, classes).
            example_input: images (B, C, H, W) that fix the shapes.
            layouts: by name of the position, where the one that was found is wrong.

        Returns:
            The chain, in the modes of its modules.

        Raises:
            NetworkError: the segments do not fit together.
        """
        if not segments or len(segments) != len(names) or len(set(names)) != len(names):
            raise NetworkError(
                f"{len(segments)} segments and the names {list(names)}: expected at least one segment, and as many "
                "different names"
            )
        require_weights([*segments, head], "the chain")
        example_input = _as_weights(example_input, [*segments, head])
        require_no_first_pass([*segments, head], example_input, "the chain")
        copied = copy_modules([*segments, head])
        modes = [(child, child.training) for module in copied for child in module.modules()]
        for module in copied:
            module.eval()
        *copied, end = copied
        chain = _assembled(cls, copied, names, end, example_input, layouts)
        vet_chain(chain, "the chain")
        for module, training in modes:
            module.training = training
        return chain


def cut_chain(
    kind: type[Chain],
    model: nn.Module,
    example_input: Tensor,
    positions: Sequence[str] | str | None = None,
    layouts: Mapping[str, Layout] | None = None,
    output: str | int | None = None,
) -> Chain:
    """As :meth:`Chain.from_module`, without the checks that run a network several times."""
    if isinstance(model, Chain):
        return model
    example_input = _as_weights(example_input, [model])
    if isinstance(positions, str):
        positions = separated(positions)
    chain = None if output is not None else _of_children(kind, model, example_input, positions, layouts)
    return (chain or _traced(kind, model, example_input, positions, layouts, output)).eval()


def _of_children(
    kind: type[Chain],
    model: nn.Module,
    example_input: Tensor,
    positions: Sequence[str] | None,
    layouts: Mapping[str, Layout] | None,
) -> Chain | None:
    """The chain of an nn.Sequential that is no more than its children, some of which are named; None for others."""
    # a subclass that overrides forward is more than its children
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        return None
    known = [name for name, _ in _children(model)]
    probabilities = _ends_in_probabilities(model)
    names = known[: -2 if probabilities else -1] if positions is None else [name for name in known if name in positions]
    if not names or not (positions is None or set(positions) <= set(known)):
        return None
    if probabilities or model._forward_hooks or model._forward_pre_hooks:
        return _traced(kind, model, example_input, names, layouts)
    (copied,) = copy_modules([model])
    assert isinstance(copied, nn.Sequential)
    copied.eval()
    try:
        chain = _assembled(kind, *_split_children(copied, names), example_input, layouts)
    except CannotCut:
        # the last child gives more than logits, or another one several tensors to the next
        try:
            return _traced(kind, model, example_input, names, layouts)
        except NetworkError:
            if positions is not None:
                raise
            return _traced(kind, model, example_input, None, layouts)
    require_same_values(copied, list(chain.segments), chain.head, names, example_input)
    return chain


def _traced(
    kind: type[Chain],
    model: nn.Module,
    example_input: Tensor,
    positions: Sequence[str] | None,
    layouts: Mapping[str, Layout] | None,
    output: str | int | None = None,
) -> Chain:
    cut = cut_module(model, example_input, positions, layouts, output)
    channels, height, width = example_input.shape[1:]
    return kind(cut.segments, cut.head, cut.names, (channels, height, width), {**cut.layouts, **(layouts or {})})


def _assembled(
    kind: type[Chain],
    segments: Sequence[nn.Module],
    names: Sequence[str],
    head: nn.Module,
    example_input: Tensor,
    layouts: Mapping[str, Layout] | None,
) -> Chain:
    """The chain of segments in eval mode."""
    *segments, head = protect_inputs([*segments, head], example_input, names)
    channels, height, width = example_input.shape[1:]
    return kind(segments, head, names, (channels, height, width), layouts)


def _ends_in_probabilities(model: nn.Module) -> bool:
    while isinstance(model, nn.Sequential) and len(model):
        model = model[-1]
    return isinstance(model, PROBABILITIES)


def _children(model: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """All children in the order in which they run; named_children leaves out repeated ones."""
    return [(name, child) for name, child in model._modules.items() if child is not None]


def _split_children(model: nn.Sequential, names: Sequence[str]) -> tuple[list[nn.Module], list[str], nn.Module]:
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
    parameters = (parameter for module in modules for parameter in module.parameters())
    first = next((parameter for parameter in parameters if parameter.is_floating_point()), None)
    return x if first is None else x.to(first.dtype)


def _layout(x: Tensor, name: str, input_shape: tuple[int, int, int]) -> Layout | None:
    """By the number of dimensions alone; tokens have the proportions of the image."""
    if x.dim() != 3:
        return Layout.of(x.dim())
    layout = token_layout(x.shape[1], input_shape[1:], most_prefix_tokens=0)
    if layout is None:
        raise NetworkError(
            f"position {name!r} has {x.shape[1]} tokens, which form no grid in the proportions of an image of "
            f"{input_shape[1]}x{input_shape[2]}: give prefix_tokens and grid in its Layout"
        )
    return layout


def _positions(
    segments: nn.ModuleList,
    names: Sequence[str],
    input_shape: tuple[int, int, int],
    layouts: Mapping[str, Layout],
) -> tuple[Position, ...]:
    """Shapes by one forward pass of two zero images in eval mode (BatchNorm wants no statistics of them)."""
    unknown = [name for name in layouts if name not in names]
    if unknown:
        raise NetworkError(f"layouts of {', '.join(unknown)}: no such positions; the chain has {', '.join(names)}")
    parameter = next(segments.parameters(), torch.empty(0))
    x = parameter.new_zeros(2, *input_shape)
    modes = [module.training for module in segments.modules()]
    positions = []
    segments.eval()
    # of a network that was traced it is known
    made_by_hand = [segment for segment in segments if not isinstance(segment, fx.GraphModule)]
    with torch.no_grad(), state_kept(made_by_hand, "the chain"):
        for index, (segment, name) in enumerate(zip(segments, names, strict=True)):
            x = run_segment(segment, x, plain(name))
            if not x.is_floating_point():
                raise NetworkError(
                    f"position {name!r} is a tensor of {str(x.dtype).removeprefix('torch.')}: expected one of real "
                    "floating-point numbers; end the segment before or behind it"
                )
            kind = layouts.get(name) or _layout(x, name, input_shape)
            if kind is None:
                raise NetworkError(
                    f"position {name!r} is a tensor of {x.dim()} dimensions: expected a map (B, C, H, W), tokens "
                    "(B, N, C) or a vector (B, C)"
                )
            positions.append(Position(index, name, tuple(x.shape[1:]), kind.layout, kind.prefix_tokens, kind.grid))
    for module, training in zip(segments.modules(), modes, strict=True):
        module.training = training
    return tuple(positions)
