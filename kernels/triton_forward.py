"""The forward kernel: all stitches of one geometry in one launch, written straight into the receiver's batch."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastsitch.kernels.choose_tiles import forward_plan
from fastsitch.kernels.launch import Launch, tile_options, tile_table
from fastsitch.kernels.shapes import stitch_shape
from fastsitch.kernels.tiles import device_limits
from fastsitch.kernels.triton_common import grid_cell, round_to, sender_features, sender_rows, stitch_columns


@triton.jit  # type: ignore[untyped-decorator]
def stitch_forward_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_w,
    p_b,
    p_out,
    p_index,
    p_tile,
    M,
    row_tiles,
    group_m,
    stride_xs,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_xc,
    stride_wk,
    stride_wf,
    stride_wd,
    stride_bk,
    stride_bd,
    stride_ok,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    DOWN: tl.constexpr,
    UP: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    F: tl.constexpr = DOWN * DOWN * C
    # rows run fastest inside a group of row tiles, so that all columns find the group's sender rows in L2
    i_p = tl.program_id(0)
    group_programs = group_m * (tl.num_programs(0) // row_tiles)
    first_m = (i_p // group_programs) * group_m
    members = tl.minimum(row_tiles - first_m, group_m)
    i_m = first_m + (i_p % group_programs) % members
    i_t = (i_p % group_programs) // members

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    i_s, o_k, o_d, m_n = stitch_columns(p_tile, i_t, D, BLOCK_N)
    o_row = sender_rows(o_m, m_m, p_index, stride_xn, stride_xh, stride_xw, H, W, DOWN, GATHER)
    p_rows = p_x + i_s * stride_xs + o_row
    p_cols = p_w + o_k * stride_wk + o_d.to(tl.int64) * stride_wd

    b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i_f in range(0, F, BLOCK_F):
        o_f = i_f + tl.arange(0, BLOCK_F)
        m_f = o_f < F
        o_x = sender_features(o_f, stride_xh, stride_xw, stride_xc, C, DOWN)
        b_x = tl.load(p_rows[:, None] + o_x[None, :], mask=m_m[:, None] & m_f[None, :], other=0.0)
        o_w = o_f.to(tl.int64) * stride_wf
        b_w = tl.load(p_cols[None, :] + o_w[:, None], mask=m_f[:, None] & m_n[None, :], other=0.0)
        # the interpreter's bf16 products are wrong; exact operands in fp32 give what tensor cores give
        if INTERPRET:
            b_x = b_x.to(tl.float32)
            b_w = b_w.to(tl.float32)
        b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")

    b_b = tl.load(p_b + o_k * stride_bk + o_d.to(tl.int64) * stride_bd, mask=m_n, other=0.0)
    b_y = round_to(b_acc + b_b.to(tl.float32)[None, :], p_out.dtype.element_ty, INTERPRET)
    p_col = p_out + o_k * stride_ok + o_d
    m_y = m_m[:, None] & m_n[None, :]
    if UP == 1:
        tl.store(p_col[None, :] + (o_m.to(tl.int64) * D)[:, None], b_y, mask=m_y)
    else:
        Q: tl.constexpr = W * UP
        o_b, o_h, o_w = grid_cell(o_m, H, W)
        o_corner = ((o_b.to(tl.int64) * H + o_h) * UP * Q + o_w * UP) * D
        p_y = p_col[None, :] + o_corner[:, None]
        for i_cell in range(UP * UP):
            tl.store(p_y + ((i_cell // UP) * Q + i_cell % UP) * D, b_y, mask=m_y)


def forward_launch(
    x_SNHWC: Tensor,
    w_KFD: Tensor,
    b_KD: Tensor,
    out_KBPQD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None,
    down: int,
    up: int,
) -> Launch:
    """The launch of these stitches on the tensors' device."""
    device = x_SNHWC.device
    shape = stitch_shape(x_SNHWC, b_KD.shape[1], source, index_B, down, up)
    plan = forward_plan(shape, device_limits(device))
    tensors = (x_SNHWC, w_KFD, b_KD, out_KBPQD, index_B, tile_table(plan.column_tiles, device))
    sizes = (shape.rows, plan.row_tiles, plan.group_m)
    strides = (*x_SNHWC.stride(), *w_KFD.stride(), *b_KD.stride(), out_KBPQD.stride(0))
    return Launch(
        kernel=stitch_forward_kernel,
        grid=(plan.programs,),
        arguments=(*tensors, *sizes, *strides),
        options=tile_options(shape, plan.config),
    )


def stitch_out_triton(
    x_SNHWC: Tensor,
    w_KFD: Tensor,
    b_KD: Tensor,
    out_KBPQD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None = None,
    *,
    down: int = 1,
    up: int = 1,
) -> None:
    """:func:`fastsitch.kernels.torch_path.stitch_out` in one launch; inputs may have any strides."""
    if out_KBPQD.numel() == 0:
        return
    forward_launch(x_SNHWC, w_KFD, b_KD, out_KBPQD, source, index_B, down, up).run(x_SNHWC.device)
