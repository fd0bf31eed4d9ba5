"""Invariants that hold exactly, whatever the rounding."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsitch.kernels import choose_tiles as choose
from fastsitch.kernels import grouped_stitch, stitch_grad, stitch_out
from fastsitch.kernels import launch_plan as plan
from fastsitch.kernels.shapes import stitch_shape
from fastsitch.kernels.tiles import H100

SHAPE = {"size": (3, 5), "channels": 20, "receiver_channels": 12, "gather": True, "dtype": torch.bfloat16}
GEOMETRIES = ({}, {"down": 2}, {"up": 2})
SOURCE = (0, 0, 2, 1, 1)

each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def forward(p: Any) -> Tensor:
    out = p.out()
    stitch_out(*p.inputs, out, p.source, p.index, **p.geometry, kernel="triton")
    return out


def backward(p: Any) -> tuple[Tensor, Tensor]:
    dw, db = p.gradients()
    stitch_grad(p.x, p.g, dw, db, p.source, p.index, **p.geometry, kernel="triton")
    return dw, db


def everything(p: Any) -> tuple[Tensor, Tensor, Tensor]:
    return forward(p), *backward(p)


def take(p: Any, stitches: list[int]) -> Any:
    source = tuple(p.source[k] for k in stitches)
    return replace(p, w=p.w[stitches], b=p.b[stitches], g=p.g[stitches], source=source)


@each_geometry
@pytest.mark.usefixtures("small_tiles", "split_rows")
def test_twice_gives_the_same_bits(problem: Any, geometry: dict[str, int]) -> None:
    p = problem(source=SOURCE, **SHAPE, **geometry)
    for first, second in zip(everything(p), everything(p), strict=True):
        assert torch.equal(first, second)


@each_geometry
@pytest.mark.usefixtures("small_tiles")
def test_a_group_equals_groups_of_one(problem: Any, geometry: dict[str, int]) -> None:
    p = problem(source=SOURCE, **SHAPE, **geometry)
    together = everything(p)
    for k in range(len(SOURCE)):
        for whole, alone in zip(together, everything(take(p, [k])), strict=True):
            assert torch.equal(whole[k], alone[0])


@each_geometry
def test_permuting_stitches_permutes_results(problem: Any, geometry: dict[str, int]) -> None:
    p = problem(source=SOURCE, **SHAPE, **geometry)
    order = [3, 0, 4, 2, 1]
    for straight, permuted in zip(everything(p), everything(take(p, order)), strict=True):
        assert torch.equal(straight[order], permuted)


@each_geometry
def test_nan_stays_in_its_stitch(problem: Any, geometry: dict[str, int]) -> None:
    p = problem(source=SOURCE, **SHAPE, **geometry)
    w, g = p.w.clone(), p.g.clone()
    w[1, 0, 0], g[1, 0, 0, 0, 0] = float("nan"), float("nan")
    poisoned = replace(p, w=w, g=g)
    for clean, dirty in zip(everything(p), everything(poisoned), strict=True):
        others = [0, 2, 3, 4]
        assert dirty[1].isnan().any()
        assert torch.equal(clean[others], dirty[others])


@each_geometry
def test_images_that_are_not_picked_are_not_read(problem: Any, geometry: dict[str, int]) -> None:
    p = problem(source=SOURCE, **SHAPE, **geometry)
    x = p.x.clone()
    unpicked = sorted(set(range(x.shape[1])) - set(p.index.tolist()))
    x[:, unpicked] = float("nan")
    for clean, dirty in zip(everything(p), everything(replace(p, x=x)), strict=True):
        assert torch.equal(clean, dirty)


@each_geometry
def test_inputs_of_any_strides(problem: Any, geometry: dict[str, int]) -> None:
    p = problem(source=SOURCE, **SHAPE, **geometry)
    strided = replace(
        p,
        x=p.x.movedim(-1, 2).contiguous().movedim(2, -1),
        w=p.w.transpose(1, 2).contiguous().transpose(1, 2),
        b=p.b.repeat_interleave(2, dim=1)[:, ::2],
        g=p.g.movedim(-1, 2).contiguous().movedim(2, -1),
    )
    assert not any(tensor.is_contiguous() for tensor in (strided.x, strided.w, strided.b, strided.g))
    for plain, other in zip(everything(p), everything(strided), strict=True):
        assert torch.equal(plain, other)


def test_an_expanded_gradient(problem: Any) -> None:
    p = problem(source=SOURCE, **SHAPE)
    expanded = replace(p, g=p.g[:, :1, :1, :1, :1].expand(p.g.shape))
    plain = replace(p, g=expanded.g.contiguous())
    for first, second in zip(backward(expanded), backward(plain), strict=True):
        assert torch.equal(first, second)


@each_geometry
def test_only_the_slice_is_written(problem: Any, geometry: dict[str, int]) -> None:
    """The batch of a receiver holds other stitches before and after, and other images of the same ones."""
    p = problem(source=SOURCE, **SHAPE, **geometry)
    stitches, images, *rest = p.g.shape
    batch = torch.full((stitches + 2, images + 3, *rest), 7.0, dtype=p.x.dtype)
    stitch_out(*p.inputs, batch[1:-1, 1 : images + 1], p.source, p.index, **p.geometry, kernel="triton")
    assert torch.equal(batch[1:-1, 1 : images + 1], forward(p))
    batch[1:-1, 1 : images + 1] = 7.0
    assert (batch == 7.0).all()


def test_gradients_in_the_master_dtype_or_the_weights(problem: Any) -> None:
    p = problem(source=SOURCE, **SHAPE)
    dw, db = backward(p)
    low_dw, low_db = p.gradients(torch.bfloat16)
    stitch_grad(p.x, p.g, low_dw, low_db, p.source, p.index, kernel="triton")
    assert torch.equal(low_dw, dw.bfloat16())
    assert torch.equal(low_db, db.bfloat16())


@each_geometry
def test_functional_op_has_the_gradients(problem: Any, geometry: dict[str, int]) -> None:
    p = problem(source=SOURCE, integers=True, **{**SHAPE, "dtype": torch.float32}, **geometry)
    w, b = p.w.clone().requires_grad_(), p.b.clone().requires_grad_()
    y = grouped_stitch(p.x, w, b, p.source, p.index, **p.geometry, kernel="triton")
    y.backward(p.g)
    assert torch.equal(y.detach(), p.y64.float())
    assert torch.equal(w.grad, p.dw64.float())
    assert torch.equal(b.grad, p.db64.float())


def test_nothing_to_do(problem: Any) -> None:
    """No images: no output, gradients of zero."""
    p = problem(source=SOURCE, **SHAPE)
    dw, db = p.gradients()
    nothing = torch.empty(0, dtype=torch.int64)
    stitch_out(*p.inputs, p.g[:, :0], p.source, nothing, kernel="triton")
    stitch_grad(p.x, p.g[:, :0], dw, db, p.source, nothing, kernel="triton")
    assert not dw.any()
    assert not db.any()


def test_float64_is_refused(problem: Any) -> None:
    p = problem(source=SOURCE, **{**SHAPE, "dtype": torch.float64})
    with pytest.raises(TypeError, match=r"expected bfloat16, float16 or float32, got torch\.float64"):
        forward(p)


def test_an_index_out_of_range_is_refused(problem: Any) -> None:
    p = problem(source=SOURCE, **SHAPE)
    with pytest.raises(ValueError, match=r"expected indices in \[0, 5\), got values from -1 to"):
        forward(replace(p, index=torch.tensor([-1, 2])))


@each_geometry
@pytest.mark.usefixtures("small_tiles")
def test_row_tiles_walked_in_groups_reach_every_row(
    problem: Any, geometry: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an L2 of a few tiles the row tiles come in several groups, the last one smaller than the others."""
    p = problem(source=SOURCE, **{**SHAPE, "size": (7, 9), "images": 3, "integers": True}, **geometry)
    whole = forward(p)
    features = p.w.shape[1]
    # a group holds four of the six row tiles of 32 rows, the last one two
    monkeypatch.setattr(plan, "L2_SHARE", 4.5 * 32 * features * 2 / H100.l2_bytes)
    shape = stitch_shape(p.x, p.b.shape[1], p.source, p.index, **{"down": 1, "up": 1, **p.geometry})
    cut = choose.forward_plan(shape, H100)
    assert (cut.row_tiles, cut.group_m) == (6, 4)
    grouped = forward(p)
    assert torch.equal(grouped, whole)
    assert torch.equal(grouped.double(), p.y64)


def far_apart(t: Tensor, stride: int) -> Tensor:
    """A copy whose second dimension is ``stride`` elements apart; memory in between is never touched."""
    memory = torch.empty(stride * (t.shape[1] - 1) + t[:, 0].numel(), dtype=t.dtype)
    inner = t[0, 0].numel()
    strides = (inner, stride, *torch.empty(t.shape[2:]).stride())
    copy = memory.as_strided(t.shape, strides)
    assert t.shape[0] * inner < stride
    copy.copy_(t)
    return copy


@pytest.mark.usefixtures("small_tiles", "split_rows")
def test_addresses_beyond_32_bits(problem: Any) -> None:
    """Images of the sender and of the gradient, and stitches of the batch, begin beyond 2^31 elements.

    Every stride fits into 32 bits, so that only the products overflow where a cast is missing.
    """
    shape = {"size": (2, 2), "channels": 16, "receiver_channels": 16, "images": 5, "dtype": torch.bfloat16}
    p = problem(source=(0, 1, 0, 1), integers=True, **shape)
    p = replace(p, x=far_apart(p.x, 2**29 + 64))
    stride = 2**30
    memory = torch.empty(3 * stride + p.g[0].numel(), dtype=p.g.dtype)
    out = memory.as_strided(p.g.shape, (stride, *p.g.stride()[1:]))
    stitch_out(*p.inputs, out, p.source, p.index, **p.geometry, kernel="triton")
    assert torch.equal(out.double(), p.y64)
    p = replace(p, g=far_apart(p.g, 2**29 + 64))
    dw, db = backward(p)
    assert torch.equal(dw.double(), p.dw64)
    assert torch.equal(db.double(), p.db64)
