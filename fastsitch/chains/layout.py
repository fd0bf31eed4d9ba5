"""Representations of any network as rows of channels on a grid.

A *shape* describes the rows of one image:

    (C, H, W)     a map, channels first or last; also tokens without a class token, on their grid of H x W
    (C, H, W, T)  tokens on a grid of H x W behind T prefix tokens (class token, registers)
    (C,)          a vector

In memory they are (N, rows, columns, C), contiguous: (N, H, W, C), with prefix tokens (N, 1, T + H * W, C), for vectors
(N, 1, 1, C). The raw tensor that a network uses is always a view of that.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsitch.errors import ConfigError, argument

Shape = tuple[int, ...]
"""(C, H, W), (C, H, W, T) or (C,); see the module's docstring."""

LAYOUTS = {"map": "(C, H, W)", "map-last": "(H, W, C)", "tokens": "(N, C)", "vector": "(C,)"}
"""Every layout, and its raw shape without the batch."""


@dataclass(frozen=True)
class Layout:
    """How a raw representation is to be read.

    Attributes:
        layout: one of map (C, H, W), map-last (H, W, C), tokens (N, C), vector (C,), all without the batch.
        prefix_tokens: how many tokens, such as a class token and registers, come before those of the grid.
        grid: rows and columns of the other tokens; None: a square.
    """

    layout: str = "map"
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None

    @classmethod
    def of(cls, dimensions: int) -> "Layout | None":
        """The layout of a tensor of so many dimensions, the batch among them, where none is named."""
        return {4: cls(), 3: cls("tokens"), 2: cls("vector")}.get(dimensions)


def parse_layout(text: "Layout | str") -> Layout:
    """``map``, ``map-last``, ``vector``, ``tokens``, ``tokens:2x8`` or, behind a class token, ``tokens:1+2x8``.

    A layout comes back as it is. Raises ConfigError for another text.
    """
    if isinstance(text, Layout):
        return text
    found = re.fullmatch(r"(map|map-last|vector|tokens)|tokens:(?:([0-9]{1,4})\+)?([0-9]{1,4})x([0-9]{1,4})", text)
    if found is None:
        raise ConfigError(
            f"{argument('layouts', text, option='--layout')}: expected map, map-last, vector, tokens, or tokens:2x8 "
            "with rows and columns, tokens:1+2x8 behind a class token"
        )
    name, prefix, rows, columns = found.groups()
    return Layout(name) if name else Layout("tokens", int(prefix or 0), (int(rows), int(columns)))


def token_layout(tokens: int, image_size: tuple[int, int], most_prefix_tokens: int = 1) -> Layout | None:
    """So many tokens, few of them before the others, on a grid in the proportions of the image (height, width).

    None where no such grid has as many.
    """
    height, width = image_size
    for prefix in range(most_prefix_tokens + 1):
        rows = math.isqrt((tokens - prefix) * height // width)
        for count in (rows, rows + 1):
            # rows / columns = height / width
            if count > 0 and count * width % height == 0 and count * (count * width // height) == tokens - prefix:
                return Layout("tokens", prefix, (count, count * width // height))
    return None


ABSENT: Shape = (0, 0, 0)
"""In place of the shape of a position that is not held: no position has it."""


def index_among_equal_shapes(shapes: Sequence[Shape]) -> list[int]:
    """For every position, which of the positions of its shape it is: where it lies in their stack."""
    seen: Counter[Shape] = Counter()
    indices = []
    for shape in shapes:
        indices.append(seen[shape])
        seen[shape] += 1
    return indices


def is_vector(shape: Shape) -> bool:
    """Whether a representation has no grid."""
    return len(shape) == 1


def grid_size(shape: Shape) -> tuple[int, int]:
    """Rows and columns of the grid, 1 x 1 for a vector."""
    return (1, 1) if is_vector(shape) else (shape[1], shape[2])


def prefix_tokens(shape: Shape) -> int:
    """Tokens before those of the grid."""
    return shape[3] if len(shape) == 4 else 0


def stored_size(shape: Shape) -> tuple[int, int]:
    """Rows and columns in memory."""
    height, width = grid_size(shape)
    tokens = prefix_tokens(shape)
    return (1, tokens + height * width) if tokens else (height, width)


def elements(shape: Shape) -> int:
    """Values of one image."""
    return shape[0] * math.prod(stored_size(shape))


def grid_rows(x_NHWC: Tensor, shape: Shape) -> Tensor:
    """The rows of the grid (..., H, W, C), a view, out of all rows (..., rows, columns, C)."""
    tokens = prefix_tokens(shape)
    return torch.unflatten(x_NHWC[..., 0, tokens:, :], -2, grid_size(shape)) if tokens else x_NHWC


def shape_text(shape: Shape) -> str:
    """As shown to users: ``64x8x8``, ``192x8x8 and 1 token``, ``512``."""
    tokens = prefix_tokens(shape)
    return "x".join(map(str, shape[:3])) + (f" and {tokens} token{'s' * (tokens > 1)}" if tokens else "")
