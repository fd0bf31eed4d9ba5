"""A point at which a network can be cut, and how the representation there is stored in memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from fastsitch.chains.layout import LAYOUTS, Layout, Shape, stored_size
from fastsitch.errors import NetworkError


@dataclass(frozen=True)
class Position:
    """A point at which a network can be cut.

    Attributes:
        index: its place among the positions of the network, from 0.
        name: its name, such as that of the module whose output it is.
        shape: shape of the raw representation, without the batch.
        layout: as in :class:`Layout`, with ``prefix_tokens`` and ``grid``.

    Raises:
        NetworkError: shape, layout, prefix tokens and grid do not agree.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    layout: str = "map"
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise NetworkError(f"position {self.name!r}: expected layout {', '.join(LAYOUTS)}, found {self.layout!r}")
        expected = LAYOUTS[self.layout]
        if len(self.shape) != expected.count(",") + (self.layout != "vector"):
            raise NetworkError(
                f"position {self.name!r} has shape {self.shape}: expected {expected} for layout {self.layout}"
            )
        if self.layout != "tokens":
            if self.prefix_tokens or self.grid is not None:
                raise NetworkError(
                    f"position {self.name!r} has layout {self.layout}: expected tokens where there are prefix tokens "
                    "or a grid"
                )
            return
        on_grid = self.shape[0] - self.prefix_tokens
        if self.prefix_tokens < 0 or on_grid < 1 or math.prod(self._grid) != on_grid:
            grid = "a square" if self.grid is None else f"a grid of {self.grid[0]}x{self.grid[1]}"
            raise NetworkError(
                f"position {self.name!r} has {self.shape[0]} tokens: expected prefix tokens and {grid}, found "
                f"{self.prefix_tokens} prefix tokens and {on_grid} others; give prefix_tokens and grid in its Layout"
            )

    @property
    def kind(self) -> Layout:
        """How the raw representation is to be read."""
        return Layout(self.layout, self.prefix_tokens, self.grid)

    @property
    def rows(self) -> Shape:
        """The shape of the rows; see :mod:`fastsitch.chains.layout`."""
        if self.layout == "map-last":
            height, width, channels = self.shape
            return channels, height, width
        if self.layout == "tokens":
            return (self.shape[1], *self._grid, *((self.prefix_tokens,) if self.prefix_tokens else ()))
        return self.shape

    def to_rows(self, x: Tensor) -> Tensor:
        """A raw representation (N, ...) as rows (N, rows, columns, C): a view of what :meth:`to_raw` gave."""
        if self.layout == "map":
            return x.permute(0, 2, 3, 1)
        return x if self.layout == "map-last" else x.reshape(len(x), *stored_size(self.rows), x.shape[-1])

    def to_raw(self, x_NHWC: Tensor) -> Tensor:
        """Contiguous rows (N, rows, columns, C) as the network's representation, a view."""
        if self.layout == "map":
            return x_NHWC.permute(0, 3, 1, 2)
        return x_NHWC if self.layout == "map-last" else x_NHWC.view(len(x_NHWC), *self.shape)

    def empty(self, images: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised raw representation of so many images, its rows contiguous."""
        shape = self.rows
        return self.to_raw(torch.empty(images, *stored_size(shape), shape[0], dtype=dtype, device=device))

    def to_dict(self) -> dict[str, Any]:
        """The position as files hold it; a map in the usual layout needs no more than index, name and shape."""
        content: dict[str, Any] = {"index": self.index, "name": self.name, "shape": self.shape}
        return {**content, **self.kind_dict()}

    def kind_dict(self) -> dict[str, Any]:
        """Layout, prefix tokens and the grid of tokens; nothing for a map."""
        if self.layout == "map":
            return {}
        tokens = {"prefix_tokens": self.prefix_tokens, "grid": self._grid} if self.layout == "tokens" else {}
        return {"layout": self.layout, **tokens}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Position":
        """The inverse of :meth:`to_dict`; raises KeyError or TypeError, or NetworkError."""
        others = {key: content[key] for key in ("layout", "prefix_tokens") if key in content}
        grid = (content["grid"][0], content["grid"][1]) if "grid" in content else None
        return cls(content["index"], content["name"], tuple(content["shape"]), **others, grid=grid)

    @property
    def _grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens' grid; the largest square that fits where none is named."""
        if self.grid is not None:
            return self.grid
        side = math.isqrt(max(0, self.shape[0] - self.prefix_tokens))
        return side, side


def chosen_positions(names: Sequence[str], patterns: Sequence[str]) -> list[int]:
    """The positions whose names match one of the patterns, by index; all where there is no pattern."""
    return [
        k for k, name in enumerate(names) if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
