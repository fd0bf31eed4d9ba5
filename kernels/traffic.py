"""Bytes and products of a launch: what the kernels move through memory, and what no kernel could avoid.

The unavoidable bytes: every sender row that is used, every weight and every gradient read once, every output
written once. The designed bytes add what the kernels read again because L2 cannot hold it, and fp32 partials.
"""

from dataclasses import dataclass

from fastsitch.kernels.launch_plan import L2_SHARE, ForwardPlan, GradPlan, cdiv, segments
from fastsitch.kernels.shapes import StitchShape
from fastsitch.kernels.tiles import DeviceLimits

# ceilings of an H100: copies, reads from L2, large bf16 products
COPY_BYTES_PER_SECOND = 3.0e12
L2_BYTES_PER_SECOND = 5.5e12
FLOPS_PER_SECOND = 8.0e14


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The cost of one launch (of both launches, where a gradient is split)."""

    designed_bytes: int
    minimum_bytes: int
    flops: int
    """Multiplications and additions that are needed."""
    tile_bytes: int
    """What all programs load and store, padding included: the load on L2."""
    tile_flops: int
    """What all programs compute, padding included."""

    @property
    def ratio(self) -> float:
        """Designed over unavoidable bytes."""
        return self.designed_bytes / self.minimum_bytes

    @property
    def floor_seconds(self) -> float:
        """The time below which an H100 cannot do it: designed bytes or products, whichever takes longer."""
        return max(self.designed_bytes / COPY_BYTES_PER_SECOND, self.flops / FLOPS_PER_SECOND)

    def predicted_seconds(self, fill: float) -> float:
        """A prediction to rank configurations by; ``fill`` is the share of the device that the programs occupy."""
        memory = max(self.designed_bytes / COPY_BYTES_PER_SECOND, self.tile_bytes / L2_BYTES_PER_SECOND)
        return max(memory, self.tile_flops / FLOPS_PER_SECOND) / fill


def forward_traffic(shape: StitchShape, plan: ForwardPlan, limits: DeviceLimits) -> Traffic:
    """The forward launch."""
    config = plan.config
    budget = limits.l2_bytes * L2_SHARE
    weights = shape.stitches * (shape.features + 1) * shape.receiver_channels * shape.itemsize
    weight_reads = 1 if weights <= budget else cdiv(plan.row_tiles, plan.group_m)
    # a group of row tiles stays in L2 while the columns of its segment pass, if its rows fit there at all
    group_bytes = plan.group_m * config.block_m * _row_bytes(shape)
    designed_x = 0
    for _, _, stitches in segments(shape.source):
        tiles = cdiv(stitches * shape.receiver_channels, config.block_n)
        designed_x += _sender_bytes(shape) * (1 if group_bytes <= budget else tiles)
    minimum_x = len(set(shape.source)) * _sender_bytes(shape)
    fixed = _receiver_bytes(shape) + _index_bytes(shape)
    features = cdiv(shape.features, config.block_f) * config.block_f
    operands = (config.block_m + config.block_n) * features
    return Traffic(
        designed_bytes=designed_x + weights * weight_reads + fixed,
        minimum_bytes=minimum_x + weights + fixed,
        flops=_flops(shape),
        tile_bytes=plan.programs * shape.itemsize * (operands + config.block_m * config.block_n * shape.up**2),
        tile_flops=2 * plan.programs * config.block_m * config.block_n * features,
    )


def grad_traffic(shape: StitchShape, plan: GradPlan, limits: DeviceLimits) -> Traffic:
    """The gradient launch and, where it is split, the sum of the partials."""
    config = plan.config
    budget = limits.l2_bytes * L2_SHARE
    rows = min(plan.rows_per_split, shape.rows)
    wave = limits.processors * config.resident
    designed_x = designed_g = 0
    for _, _, stitches in segments(shape.source):
        columns = stitches * shape.receiver_channels
        tiles = cdiv(columns, config.block_n)
        # tiles that run in one wave walk the rows together; later ones find them in L2 if a split's rows fit there
        together = tiles * plan.feature_tiles <= wave
        fits_x = together or rows * _row_bytes(shape) <= budget
        designed_x += _sender_bytes(shape) * (1 if fits_x else tiles)
        tile_g = rows * shape.up * shape.up * config.block_n * shape.itemsize
        fits_g = plan.feature_tiles <= wave or tile_g <= budget
        gradient = shape.rows * shape.up * shape.up * columns * shape.itemsize
        designed_g += gradient * (1 if fits_g else plan.feature_tiles)
    written = 4 * shape.stitches * (shape.features + 1) * shape.receiver_channels
    partials = 2 * plan.splits * written if plan.splits > 1 else 0
    minimum_x = len(set(shape.source)) * _sender_bytes(shape)
    per_row = config.block_f + config.block_n * shape.up**2
    return Traffic(
        designed_bytes=designed_x + designed_g + written + partials + _index_bytes(shape),
        minimum_bytes=minimum_x + _receiver_bytes(shape) + written + _index_bytes(shape),
        flops=_flops(shape),
        tile_bytes=plan.programs * rows * shape.itemsize * per_row + written + partials,
        tile_flops=2 * plan.programs * rows * config.block_f * config.block_n,
    )


def _row_bytes(shape: StitchShape) -> int:
    return shape.features * shape.itemsize


def _sender_bytes(shape: StitchShape) -> int:
    """One sender's rows of the mini-batch."""
    return shape.rows * _row_bytes(shape)


def _receiver_bytes(shape: StitchShape) -> int:
    """The receiver's batch, or its gradient."""
    return shape.stitches * shape.rows * shape.up * shape.up * shape.receiver_channels * shape.itemsize


def _index_bytes(shape: StitchShape) -> int:
    return 8 * shape.images if shape.gather else 0


def _flops(shape: StitchShape) -> int:
    return 2 * shape.stitches * shape.rows * shape.features * shape.receiver_channels
