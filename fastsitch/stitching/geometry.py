"""What kind of stitch joins two representations."""

import math
from dataclasses import dataclass

from torch import Tensor

from fastsitch.activations.alignment import Alignment
from fastsitch.chains.layout import Shape as Shape
from fastsitch.chains.layout import grid_rows, grid_size, is_vector, prefix_tokens
from fastsitch.errors import ConfigError, argument
from fastsitch.kernels import space_to_depth
from fastsitch.vocabulary import ClassToken, Resample, require_choice


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a stitch does where two representations leave a choice; see the words in vocabulary.py."""

    resample: Resample = "none"
    """For grids whose sizes are no multiples."""
    class_token: ClassToken = "sender"
    """For receivers with class or register tokens."""

    def __post_init__(self) -> None:
        require_choice("resample", self.resample, Resample)
        require_choice("class_token", self.class_token, ClassToken)


DEFAULT_RULES = Rules()

Operand = int | Alignment
"""What the inputs of stitches from a sender position are: its grid, read at a ratio, or its rows, aligned first."""


@dataclass(frozen=True)
class Geometry:
    """Sender and receiver shapes, and the ratio between them: ``down`` = k, ``up`` = u, at most one above 1.

    Where the operator cannot read the sender's grid by itself, ``alignment`` maps it onto the receiver's rows first;
    then ``up`` is 1.
    """

    sender: Shape
    receiver: Shape
    down: int = 1
    up: int = 1
    alignment: Alignment | None = None

    @classmethod
    def between(cls, sender: Shape, receiver: Shape, rules: Rules = DEFAULT_RULES) -> "Geometry":
        """The stitch from one shape to another.

        A vector is repeated over the receiver's grid, and a receiver that is one gets the mean over the sender's grid.
        Otherwise sizes are multiples, or ``rules`` say how to resample; else raises ConfigError.
        Source: Hernandez et al. 2022, section 3 (strided convolution, 1x1 convolution, nearest upsampling).
        """
        tokens = prefix_tokens(receiver)
        method, down, up = _relation(sender, receiver, rules)
        if not tokens and (method == "cells" or up > 1):
            return cls(sender, receiver, down=down, up=up)
        rule = rules.class_token if tokens else ""
        return cls(sender, receiver, down, 1, Alignment(sender, (0, *receiver[1:]), method, down, rule))

    @property
    def kind(self) -> str:
        """``equal``, ``down k``, ``up u``, or how the grid is resampled, as shown to users."""
        method = "cells" if self.alignment is None else self.alignment.method
        if method not in ("cells", "repeat"):
            return method
        if self.down > 1:
            return f"down {self.down}"
        (height, width), (rows, columns) = grid_size(self.sender), grid_size(self.receiver)
        if (height, width) == (rows, columns):
            return "equal"
        return f"up {rows // height}" if rows // height == columns // width else "repeat"

    @property
    def features(self) -> int:
        """Inputs of the stitch's GEMM: C * k * k."""
        return self.sender[0] * self.down**2

    @property
    def parameters(self) -> int:
        """Weights and biases of one stitch."""
        return (self.features + 1) * self.receiver[0]

    @property
    def rows(self) -> int:
        """Rows of the stitch's GEMM per image: cells at the stitch's own resolution, or all that the receiver has."""
        if self.alignment is not None:
            return self.alignment.rows
        return math.prod(grid_size(self.sender)) // self.down**2

    @property
    def operand(self) -> Operand:
        """What the inputs of the GEMM are."""
        return self.down if self.alignment is None else self.alignment

    def inputs(self, x_NHWC: Tensor) -> Tensor:
        """The inputs of the GEMM (N, rows, columns, features) from all rows of the sender's representation."""
        return stitch_inputs(x_NHWC, self.sender, self.operand)


def stitch_inputs(x_NHWC: Tensor, sender: Shape, operand: Operand) -> Tensor:
    """The inputs of a stitch's GEMM, given the operand of its geometry."""
    if isinstance(operand, Alignment):
        return operand.apply(x_NHWC.unsqueeze(0))[0]
    return space_to_depth(grid_rows(x_NHWC, sender), operand)


def _relation(sender: Shape, receiver: Shape, rules: Rules) -> tuple[str, int, int]:
    """How the grid is mapped onto the receiver's: the method of an Alignment, ratio down, ratio up."""
    (height, width), (rows, columns) = grid_size(sender), grid_size(receiver)
    if is_vector(receiver) and (height, width) != (1, 1):
        return "mean", 1, 1
    if height % rows == 0 and width % columns == 0 and height // rows == width // columns:
        return "cells", height // rows, 1
    if rows % height == 0 and columns % width == 0 and rows // height == columns // width:
        return "repeat", 1, rows // height
    if is_vector(sender):
        return "repeat", 1, 1
    if rules.resample != "none":
        return rules.resample, 1, 1
    raise ConfigError(
        f"no stitch from {height}x{width} to {rows}x{columns}: expected sizes where one is the same whole multiple "
        f"of the other in both directions; resample the sender's with {argument('resample', 'area')} or "
        f"{argument('resample', 'bilinear')}"
    )
