"""A launch as data, and what it needs besides its plan.

Because the arguments are data, the compile report can build without a device exactly what a device would run.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastsitch.kernels.launch_plan import ColumnTiles
from fastsitch.kernels.shapes import StitchShape
from fastsitch.kernels.tiles import MOST_REGISTERS, TileConfig


def interpreted() -> bool:
    """Whether triton runs kernels in its interpreter; the variable must be set before triton is imported."""
    # the values that triton reads as true
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current one, on which triton launches whatever the device of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=4096)
def tile_table(column_tiles: ColumnTiles, device: torch.device) -> Tensor:
    """The table on the device, copied there once: later launches of the same stitches do not synchronise."""
    return torch.tensor(column_tiles, dtype=torch.int32).to(device)


def tile_options(shape: StitchShape, config: TileConfig) -> dict[str, Any]:
    """The compile-time constants that the forward and the gradient kernel share."""
    return {
        "H": shape.height,
        "W": shape.width,
        "C": shape.channels,
        "D": shape.receiver_channels,
        "DOWN": shape.down,
        "UP": shape.up,
        "GATHER": shape.gather,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_F": config.block_f,
        "INTERPRET": interpreted(),
        "num_warps": config.warps,
        "num_stages": config.stages,
        "maxnreg": MOST_REGISTERS if shape.register_hungry else config.registers,
    }


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel with its grid and arguments."""

    kernel: Any
    """A ``triton.jit`` function."""
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    """Compile-time constants by name, ``num_warps`` and ``num_stages``."""

    def run(self, device: torch.device) -> None:
        """Launch on ``device``, which is that of the tensors among the arguments."""
        with device_guard(device):
            self.kernel[self.grid](*self.arguments, **self.options)
