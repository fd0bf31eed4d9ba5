"""Cut a launch into programs: plain arithmetic, without triton or a device.

Stitches that share a sender are one wider GEMM: their (k, d) columns are side by side, and a tile of columns may span
several stitches. Only neighbours in ``source`` are joined, so order stitches by sender.
"""

from dataclasses import dataclass

from fastsitch.kernels.shapes import StitchShape
from fastsitch.kernels.tiles import DeviceLimits, TileConfig

# rows of four integers, see column_tiles
ColumnTiles = tuple[tuple[int, int, int, int], ...]

# the share of L2 that sender rows may occupy while the tiles of columns pass over them
L2_SHARE = 0.3
# programs per processor below which a gradient is split over its rows
SPLIT_FILL = 2
# partials may add this share to the bytes that a gradient reads anyway
SPLIT_TRAFFIC = 0.12


@dataclass(frozen=True, kw_only=True)
class ForwardPlan:
    """Programs of the forward kernel: ``row_tiles`` by ``column_tiles``, walked in groups of ``group_m`` row tiles."""

    config: TileConfig
    column_tiles: ColumnTiles
    row_tiles: int
    group_m: int

    @property
    def programs(self) -> int:
        return self.row_tiles * len(self.column_tiles)


@dataclass(frozen=True, kw_only=True)
class GradPlan:
    """Programs of the gradient kernel: feature tiles by column tiles by splits of the rows."""

    config: TileConfig
    column_tiles: ColumnTiles
    feature_tiles: int
    splits: int
    rows_per_split: int

    @property
    def programs(self) -> int:
        return self.feature_tiles * len(self.column_tiles) * self.splits


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def segments(source: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Runs of neighbours that share a sender: (sender, first stitch, stitches)."""
    runs: list[tuple[int, int, int]] = []
    for k, sender in enumerate(source):
        if runs and runs[-1][0] == sender:
            runs[-1] = (sender, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((sender, k, 1))
    return runs


def column_tiles(source: tuple[int, ...], receiver_channels: int, block_n: int) -> ColumnTiles:
    """Rows of the table that the kernels read: sender, first stitch, tile and stitches of the segment."""
    table: list[tuple[int, int, int, int]] = []
    for sender, first, stitches in segments(source):
        tiles = cdiv(stitches * receiver_channels, block_n)
        table.extend((sender, first, tile, stitches) for tile in range(tiles))
    return tuple(table)


def cut_forward(shape: StitchShape, config: TileConfig, limits: DeviceLimits) -> ForwardPlan:
    """Cut the forward launch into tiles of ``config``."""
    row_tiles = cdiv(shape.rows, config.block_m)
    # within a group the sender's rows stay in L2 for all stitches, and each weight is read once per group
    tile_bytes = config.block_m * shape.features * shape.itemsize
    group_m = max(1, min(row_tiles, int(limits.l2_bytes * L2_SHARE) // tile_bytes))
    return ForwardPlan(
        config=config,
        column_tiles=column_tiles(shape.source, shape.receiver_channels, config.block_n),
        row_tiles=row_tiles,
        group_m=group_m,
    )


def cut_grad(shape: StitchShape, config: TileConfig, limits: DeviceLimits) -> GradPlan:
    """Cut the gradient launch into tiles of ``config``."""
    tiles = column_tiles(shape.source, shape.receiver_channels, config.block_n)
    feature_tiles = cdiv(shape.features, config.block_f)
    row_tiles = cdiv(shape.rows, config.block_m)
    wanted = cdiv(SPLIT_FILL * limits.processors, feature_tiles * len(tiles))
    # a split writes and reads (F + 1, D) fp32 partials per stitch; a row reads F features and u*u gradient cells
    partial_bytes = 8 * (shape.features + 1) * shape.receiver_channels
    row_bytes = (shape.features + shape.up * shape.up * shape.receiver_channels) * shape.itemsize
    affordable = int(SPLIT_TRAFFIC * shape.rows * row_bytes / partial_bytes)
    splits = max(1, min(wanted, affordable, row_tiles))
    tiles_per_split = cdiv(row_tiles, splits)
    return GradPlan(
        config=config,
        column_tiles=tiles,
        feature_tiles=feature_tiles,
        splits=cdiv(row_tiles, tiles_per_split),
        rows_per_split=tiles_per_split * config.block_m,
    )
