"""A mini-batch of sender representations, in the form that the stitch operator takes."""

from collections.abc import Mapping

from torch import Tensor

from fastsitch.activations.alignment import Alignment
from fastsitch.chains.layout import Shape as Shape
from fastsitch.chains.layout import grid_rows
from fastsitch.kernels import space_to_depth


class Batch:
    """The images ``index`` (int64) of representations in device memory, and their ``labels`` (B,).

    ``stacks`` holds, for each shape, the sender positions of that shape as one tensor of rows: (S, N, H, W, C) for
    maps, for others see :mod:`fastsitch.chains.layout`.
    """

    def __init__(self, stacks: Mapping[Shape, Tensor], index: Tensor, labels: Tensor) -> None:
        self.labels = labels
        self.stacks = stacks
        self.index = index
        self._features: dict[tuple[Shape, int] | Alignment, Tensor] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def address(self) -> object:
        """Where in memory it lies: equal for batches of the same size whose stacks are the same tensors."""
        stacks = tuple((shape, x.dtype, x.shape, x.stride(), x.data_ptr()) for shape, x in self.stacks.items())
        return len(self), stacks

    def of(self, index: Tensor, labels: Tensor) -> "Batch":
        """Other images of the same representations."""
        return Batch(self.stacks, index, labels)

    def values(self, shape: Shape, stack_index: int) -> Tensor:
        """All rows (B, H, W, C) of one position, tokens included: number ``stack_index`` in the stack of its shape."""
        return self._gathered(shape)[stack_index]

    def operand(self, shape: Shape, down: int, kernel: str) -> tuple[Tensor, Tensor | None, int]:
        """What to hand to the operator as x, index and down, to read the grid.

        Triton gathers and regroups while it loads, so it gets the resident tensors as they are. The torch path gets
        the gathered images, already brought from space to depth: one copy, shared by all stitches of that shape and
        ratio in this step.
        """
        if kernel == "triton":
            return grid_rows(self.stacks[shape], shape), self.index, down
        key = (shape, down)
        if key not in self._features:
            if down == 1:
                self._features[key] = grid_rows(self.stacks[shape], shape).index_select(1, self.index)
            else:
                self._features[key] = space_to_depth(self.operand(shape, 1, kernel)[0], down)
        return self._features[key], None, 1

    def aligned(self, alignment: Alignment) -> Tensor:
        """The inputs (S, B, rows, columns, features) of stitches with an alignment: one copy for all in this step."""
        if alignment not in self._features:
            self._features[alignment] = alignment.apply(self._gathered(alignment.sender))
        return self._features[alignment]

    def _gathered(self, shape: Shape) -> Tensor:
        """All rows of the batch, (S, B, H, W, C)."""
        # without prefix tokens the same as the operand of ratio 1
        key = (shape, 1 if len(shape) < 4 else 0)
        if key not in self._features:
            self._features[key] = self.stacks[shape].index_select(1, self.index)
        return self._features[key]
