"""The gradient kernels: X^T G of all stitches in one launch, split over rows, and the sum of the splits.

The u*u gradient cells of an upsampling stitch are summed while they are loaded. Splits write fp32 partials that a
second launch adds in a fixed order: the result does not depend on which program finishes first.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsitch.kernels.choose_tiles import grad_plan
from fastsitch.kernels.launch import Launch, interpreted, tile_options, tile_table
from fastsitch.kernels.launch_plan import GradPlan, cdiv
from fastsitch.kernels.shapes import StitchShape, stitch_shape
from fastsitch.kernels.tiles import device_limits
from fastsitch.kernels.triton_common import grid_cell, round_to, sender_features, sender_rows, stitch_columns

REDUCE_BLOCK = 1024
# rows of the bias accumulator: few enough for registers, enough that each thread adds only its registers
BIAS_ROWS = tl.constexpr(16)


@triton.jit  # type: ignore[untyped-decorator]
def stitch_grad_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_g,
    p_dw,
    p_db,
    p_index,
    p_tile,
    M,
    rows_per_split,
    column_tiles,
    stride_xs,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_xc,
    stride_gk,
    stride_gb,
    stride_gp,
    stride_gq,
    stride_gd,
    stride_ws,
    stride_wk,
    stride_wf,
    stride_wd,
    stride_bs,
    stride_bk,
    stride_bd,
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
    feature_tiles: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    # features run fastest: the tiles that read the same gradient run side by side
    i_p = tl.program_id(0)
    i_f = i_p % feature_tiles
    i_t = (i_p // feature_tiles) % column_tiles
    i_split = (i_p // feature_tiles) // column_tiles

    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    i_s, o_k, o_d, m_n = stitch_columns(p_tile, i_t, D, BLOCK_N)
    p_xf = p_x + i_s * stride_xs + sender_features(o_f, stride_xh, stride_xw, stride_xc, C, DOWN)
    p_gn = p_g + o_k * stride_gk + o_d.to(tl.int64) * stride_gd

    b_dw = tl.zeros((BLOCK_F, BLOCK_N), dtype=tl.float32)
    b_db = tl.zeros((BIAS_ROWS, BLOCK_N), dtype=tl.float32)
    first = i_split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    for i_m in range(first, last, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < last
        o_row = sender_rows(o_m, m_m, p_index, stride_xn, stride_xh, stride_xw, H, W, DOWN, GATHER)
        b_x = tl.load(p_xf[None, :] + o_row[:, None], mask=m_m[:, None] & m_f[None, :], other=0.0)

        o_b, o_h, o_w = grid_cell(o_m, H, W)
        o_y = o_h.to(tl.int64) * UP * stride_gp + o_w.to(tl.int64) * UP * stride_gq
        p_gy = p_gn[None, :] + (o_b.to(tl.int64) * stride_gb + o_y)[:, None]
        m_g = m_m[:, None] & m_n[None, :]
        if UP == 1:
            b_g = tl.load(p_gy, mask=m_g, other=0.0)
            b_g32 = b_g.to(tl.float32)
        else:
            b_g32 = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            # a loop, not unrolled: the pipeliner would give every load of the cells its own shared buffers
            for i_y in range(UP):
                for i_x in tl.static_range(UP):
                    o_cell = i_y * stride_gp + i_x * stride_gq
                    b_g32 += tl.load(p_gy + o_cell, mask=m_g, other=0.0).to(tl.float32)
            b_g = round_to(b_g32, p_g.dtype.element_ty, INTERPRET)

        b_db += tl.sum(tl.reshape(b_g32, (BLOCK_M // BIAS_ROWS, BIAS_ROWS, BLOCK_N)), 0)
        if INTERPRET:
            b_x = b_x.to(tl.float32)
            b_g = b_g.to(tl.float32)
        b_dw = tl.dot(tl.trans(b_x), b_g, b_dw, input_precision="ieee")

    o_wk = i_split.to(tl.int64) * stride_ws + o_k * stride_wk + o_d.to(tl.int64) * stride_wd
    p_w = p_dw + o_wk[None, :] + (o_f.to(tl.int64) * stride_wf)[:, None]
    tl.store(p_w, round_to(b_dw, p_dw.dtype.element_ty, INTERPRET), mask=m_f[:, None] & m_n[None, :])
    if i_f == 0:
        o_bk = i_split.to(tl.int64) * stride_bs + o_k * stride_bk + o_d.to(tl.int64) * stride_bd
        tl.store(p_db + o_bk, round_to(tl.sum(b_db, 0), p_db.dtype.element_ty, INTERPRET), mask=m_n)


@triton.jit  # type: ignore[untyped-decorator]
def reduce_partials_kernel(  # type: ignore[no-untyped-def]
    p_part,
    p_dw,
    p_db,
    splits,
    stride_ps,
    stride_wk,
    stride_wf,
    stride_wd,
    stride_bk,
    stride_bd,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    i_k = tl.program_id(0).to(tl.int64)
    o_p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < (F + 1) * D
    p_p = p_part + i_k * ((F + 1) * D) + o_p
    b_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(splits):
        b_sum += tl.load(p_p, mask=m_p, other=0.0)
        p_p += stride_ps
    o_f = (o_p // D).to(tl.int64)
    o_d = (o_p % D).to(tl.int64)
    p_w = p_dw + i_k * stride_wk + o_f * stride_wf + o_d * stride_wd
    tl.store(p_w, round_to(b_sum, p_dw.dtype.element_ty, INTERPRET), mask=m_p & (o_f < F))
    p_b = p_db + i_k * stride_bk + o_d * stride_bd
    tl.store(p_b, round_to(b_sum, p_db.dtype.element_ty, INTERPRET), mask=m_p & (o_f == F))


def grad_launches(
    x_SNHWC: Tensor,
    g_KBPQD: Tensor,
    dw_KFD: Tensor,
    db_KD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None,
    down: int,
    up: int,
) -> list[Launch]:
    """The launches of these gradients on the tensors' device: one, or two where the rows are split."""
    device = x_SNHWC.device
    shape = stitch_shape(x_SNHWC, db_KD.shape[1], source, index_B, down, up)
    if up * max(g_KBPQD.stride(2), g_KBPQD.stride(3)) >= 2**31:
        # the kernel steps through the cells of a source pixel in 32 bits; only unusual layouts need more
        g_KBPQD = g_KBPQD.contiguous()
    plan = grad_plan(shape, device_limits(device))
    if plan.splits == 1:
        strides = (0, *dw_KFD.stride(), 0, *db_KD.stride())
        return [_grad_launch(x_SNHWC, g_KBPQD, dw_KFD, db_KD, index_B, strides, shape, plan)]
    features, channels = shape.features, shape.receiver_channels
    # the bias gradient is one more row of each stitch's partial
    part = x_SNHWC.new_empty((plan.splits, shape.stitches, features + 1, channels), dtype=torch.float32)
    per_split, per_stitch, per_row, _ = part.stride()
    strides = (per_split, per_stitch, per_row, 1, per_split, per_stitch, 1)
    reduce = Launch(
        kernel=reduce_partials_kernel,
        grid=(shape.stitches, cdiv((features + 1) * channels, REDUCE_BLOCK)),
        arguments=(part, dw_KFD, db_KD, plan.splits, per_split, *dw_KFD.stride(), *db_KD.stride()),
        options={
            "F": features,
            "D": channels,
            "BLOCK": REDUCE_BLOCK,
            "INTERPRET": interpreted(),
            "num_warps": 4,
        },
    )
    return [_grad_launch(x_SNHWC, g_KBPQD, part, part[:, :, features], index_B, strides, shape, plan), reduce]


def _grad_launch(
    x_SNHWC: Tensor,
    g_KBPQD: Tensor,
    dw: Tensor,
    db: Tensor,
    index_B: Tensor | None,
    strides: tuple[int, ...],
    shape: StitchShape,
    plan: GradPlan,
) -> Launch:
    """Into gradients or partials; ``strides`` are theirs: dw (split, k, f, d), then db (split, k, d)."""
    tensors = (x_SNHWC, g_KBPQD, dw, db, index_B, tile_table(plan.column_tiles, x_SNHWC.device))
    sizes = (shape.rows, plan.rows_per_split, len(plan.column_tiles))
    return Launch(
        kernel=stitch_grad_kernel,
        grid=(plan.programs,),
        arguments=(*tensors, *sizes, *x_SNHWC.stride(), *g_KBPQD.stride(), *strides),
        options=tile_options(shape, plan.config),
    )


def stitch_grad_triton(
    x_SNHWC: Tensor,
    g_KBPQD: Tensor,
    dw_KFD: Tensor,
    db_KD: Tensor,
    source: Sequence[int],
    index_B: Tensor | None = None,
    *,
    down: int = 1,
    up: int = 1,
) -> None:
    """:func:`fastsitch.kernels.torch_path.stitch_grad` without its copies; inputs may have any strides."""
    if db_KD.numel() == 0:
        return
    if g_KBPQD.numel() == 0:
        dw_KFD.zero_()
        db_KD.zero_()
        return
    for launch in grad_launches(x_SNHWC, g_KBPQD, dw_KFD, db_KD, source, index_B, down, up):
        launch.run(x_SNHWC.device)
