"""A sender's representation brought onto the rows of a receiver's, where the stitch operator cannot do it by itself."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsitch.chains.layout import Shape, grid_rows, grid_size, prefix_tokens, stored_size
from fastsitch.kernels import space_to_depth


@dataclass(frozen=True)
class Alignment:
    """Inputs of stitches from one sender shape, one for each row of the receiver; hashable, and shared by all stitches.

    ``method`` is ``cells`` (``down`` x ``down`` of them side by side, as a strided convolution reads them), ``repeat``,
    ``mean`` (over the grid), ``area`` or ``bilinear``. ``receiver`` counts without its channels, which are set to 0.
    """

    sender: Shape
    receiver: Shape
    method: str
    down: int = 1
    class_token: str = ""
    """A ClassToken where the receiver has prefix tokens."""

    @property
    def features(self) -> int:
        """C * down * down."""
        return self.sender[0] * self.down**2

    @property
    def rows(self) -> int:
        """Per image: those of the receiver."""
        return math.prod(stored_size(self.receiver))

    @property
    def whole(self) -> bool:
        """Whether the inputs are the sender's rows as they are, its prefix tokens among them."""
        return self.class_token == "sender" and self.sender[1:] == self.receiver[1:]

    def apply(self, x_SBHWC: Tensor) -> Tensor:
        """(S, B, rows, columns, C) of the sender -> (S, B, rows, columns, features) of the receiver."""
        if self.whole:
            return x_SBHWC
        cells = space_to_depth(grid_rows(x_SBHWC, self.sender), self.down)
        grid = resample(cells, grid_size(self.receiver), self.method)
        tokens = prefix_tokens(self.receiver)
        if not tokens:
            return grid
        first = self._prefix(x_SBHWC, cells, tokens)
        return torch.cat([first, grid.flatten(2, 3)], 2).unsqueeze(2)

    def _prefix(self, x_SBHWC: Tensor, cells_SBHWF: Tensor, tokens: int) -> Tensor:
        """(S, B, tokens, features)."""
        mean = cells_SBHWF.mean((2, 3)).unsqueeze(2)
        if self.class_token == "zero":
            return torch.zeros_like(mean).expand(-1, -1, tokens, -1)
        provided = min(tokens, prefix_tokens(self.sender)) if self.class_token == "sender" else 0
        if provided == 0:
            return mean.expand(-1, -1, tokens, -1)
        # a stitch reads several cells at once: the token is repeated in each of them
        repeated = x_SBHWC[:, :, 0, :provided].repeat(1, 1, 1, self.down**2)
        return torch.cat([repeated, mean.expand(-1, -1, tokens - provided, -1)], 2)


def resample(x_SBHWC: Tensor, size: tuple[int, int], method: str) -> Tensor:
    """Maps (S, B, H, W, C) on a grid of another size (S, B, P, Q, C), by the method of an :class:`Alignment`.

    ``area`` and ``bilinear`` are F.interpolate, the latter with align_corners=False and antialias=True.
    """
    if x_SBHWC.shape[2:4] == size:
        return x_SBHWC
    if method == "mean":
        return x_SBHWC.mean((2, 3), keepdim=True)
    lead = x_SBHWC.shape[:2]
    x = x_SBHWC.flatten(0, 1).permute(0, 3, 1, 2)
    if method == "repeat":
        y = F.interpolate(x, size, mode="nearest")
    elif method == "area":
        y = F.interpolate(x, size, mode="area")
    else:
        assert method == "bilinear", method
        # torch has no such kernel for bf16 on the CPU
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        y = F.interpolate(exact, size, mode="bilinear", align_corners=False, antialias=True).to(x.dtype)
    return torch.unflatten(y.permute(0, 2, 3, 1).contiguous(), 0, lead)
