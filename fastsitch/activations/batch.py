"""A mini-batch of sender representations, in the form that the stitch operator wants."""

from collections.abc import Mapping

from torch import Tensor

from fastsitch.kernels import space_to_depth

Shape = tuple[int, int, int]


class Batch:
    """The images ``index`` (int64) of representations in device memory, and their ``labels`` (B,).

    ``stacks`` holds, for each shape (C, H, W), the sender positions of that shape as one tensor (S, N, H, W, C).
    """

    def __init__(self, stacks: Mapping[Shape, Tensor], index: Tensor, labels: Tensor) -> None:
        self.labels = labels
        self._stacks = stacks
        self._index = index
        self._features: dict[tuple[Shape, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def values(self, shape: Shape, place: int) -> Tensor:
        """The representations (B, H, W, C) at one position: the ``place``-th of those of this shape."""
        return self.operand(shape, 1, "torch")[0][place]

    def operand(self, shape: Shape, down: int, kernel: str) -> tuple[Tensor, Tensor | None, int]:
        """What to hand to the operator as x, index and down.

        Triton gathers and regroups while it loads, so it gets the resident tensors as they are. The torch path gets
        the gathered images, already brought from space to depth: one copy, shared by all stitches of that shape and
        ratio in this step.
        """
        if kernel == "triton":
            return self._stacks[shape], self._index, down
        key = (shape, down)
        if key not in self._features:
            if down == 1:
                self._features[key] = self._stacks[shape].index_select(1, self._index)
            else:
                self._features[key] = space_to_depth(self.operand(shape, 1, kernel)[0], down)
        return self._features[key], None, 1
