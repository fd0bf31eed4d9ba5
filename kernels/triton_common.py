# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""Shared by the Triton kernels: where a row and a feature are in memory, and which stitch a column belongs to.

Names: i_ program index, o_ offsets, m_ mask, p_ pointer, b_ tile.
"""

import triton
import triton.language as tl


@triton.jit
def grid_cell(o_m, H: tl.constexpr, W: tl.constexpr):
    """Row of the GEMM -> (image of the batch, row, column) on the grid of the GEMM."""
    return o_m // (H * W), (o_m // W) % H, o_m % W


@triton.jit
def sender_rows(
    o_m,
    m_m,
    p_index,
    stride_xn,
    stride_xh,
    stride_xw,
    H: tl.constexpr,
    W: tl.constexpr,
    DOWN: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Offset of each row's first element in the sender's tensor."""
    o_b, o_h, o_w = grid_cell(o_m, H, W)
    # masked rows carry the last image beyond the batch: nothing is read there, so the index is not either
    o_n = tl.load(p_index + o_b, mask=m_m, other=0).to(tl.int64) if GATHER else o_b.to(tl.int64)
    return o_n * stride_xn + (o_h * DOWN).to(tl.int64) * stride_xh + (o_w * DOWN).to(tl.int64) * stride_xw


@triton.jit
def sender_features(o_f, stride_xh, stride_xw, stride_xc, C: tl.constexpr, DOWN: tl.constexpr):
    """Offset of each feature (ky, kx, c) from its row's first element: space-to-depth without a copy."""
    if DOWN == 1:
        o_x = o_f.to(tl.int64) * stride_xc
    else:
        o_cell = o_f // C
        o_y = (o_cell // DOWN).to(tl.int64) * stride_xh + (o_cell % DOWN).to(tl.int64) * stride_xw
        o_x = o_y + (o_f % C).to(tl.int64) * stride_xc
    return o_x


@triton.jit
def stitch_columns(p_tile, i_t, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Column tile -> (sender, stitch of each column, receiver channel of each column, mask)."""
    p_row = p_tile + i_t * 4
    i_s = tl.load(p_row).to(tl.int64)
    i_k = tl.load(p_row + 1)
    # products with constants show the compiler what divides the columns, so that it vectorises
    o_n = tl.load(p_row + 2) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.load(p_row + 3) * D
    o_k = (i_k + o_n // D).to(tl.int64)
    return i_s, o_k, o_n % D, o_n < columns


@triton.jit
def round_to(b_y, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Cast fp32 to ``dtype``, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        # the interpreter truncates: round before, as the hardware does
        b_u = b_y.to(tl.uint32, bitcast=True)
        b_u = (b_u + 0x7FFF + ((b_u >> 16) & 1)) & 0xFFFF0000
        b_y = tl.where(b_y == b_y, b_u.to(tl.float32, bitcast=True), b_y)
    return b_y.to(dtype)
