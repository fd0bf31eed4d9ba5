"""The sizes of one grouped stitch, on which launches, tile configurations and costs depend."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StitchShape:
    """One launch: K stitches of one geometry. Hashable, so that a choice made for it can be remembered."""

    source: tuple[int, ...]
    """Which sender tensor each stitch reads; its length is K."""
    images: int
    """B, the images of the mini-batch."""
    height: int
    """Rows of the grid the GEMM runs on: H for equal sizes and upsampling, H/k for downsampling by k."""
    width: int
    """Columns of that grid."""
    channels: int
    """C, the sender's channels."""
    receiver_channels: int
    """D."""
    down: int = 1
    up: int = 1
    dtype: torch.dtype = torch.bfloat16
    gather: bool = False
    """Whether the images are picked by an index."""

    def __post_init__(self) -> None:
        # rows are counted in 32 bits, and the last tile may reach beyond them
        if self.rows >= 2**31 - 2**10:
            raise ValueError(f"expected fewer than 2^31 rows (images x height x width), got {self.rows}")

    @property
    def stitches(self) -> int:
        """K."""
        return len(self.source)

    @property
    def rows(self) -> int:
        """M, the rows of each stitch's GEMM."""
        return self.images * self.height * self.width

    @property
    def features(self) -> int:
        """F, the inputs of each stitch's GEMM."""
        return self.down * self.down * self.channels

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize

    @property
    def aligned(self) -> bool:
        """Whether the channels on both sides can be read and written 16 bytes at a time."""
        return self.channels * self.itemsize % 16 == 0 and self.receiver_channels * self.itemsize % 16 == 0

    @property
    def register_hungry(self) -> bool:
        """Whether a program is short of registers: fp32 products are unrolled, odd channels addressed one by one."""
        return self.dtype == torch.float32 or not self.aligned


def stitch_shape(
    x_SNHWC: Tensor,
    receiver_channels: int,
    source: Sequence[int],
    index_B: Tensor | None,
    down: int,
    up: int,
) -> StitchShape:
    """The shape of a call, from its (checked) arguments."""
    _, images, height, width, channels = x_SNHWC.shape
    return StitchShape(
        source=tuple(source),
        images=images if index_B is None else index_B.shape[0],
        height=height // down,
        width=width // down,
        channels=channels,
        receiver_channels=receiver_channels,
        down=down,
        up=up,
        dtype=x_SNHWC.dtype,
        gather=index_B is not None,
    )
