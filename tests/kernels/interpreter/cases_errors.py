"""Rounding errors: per stitch at most twice those of plain torch in the same dtype."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsitch.kernels import stitch_grad, stitch_out
from fastsitch.kernels.choose_tiles import override_config
from fastsitch.kernels.tiles import CONFIGS, FORWARD, GRAD, TileConfig

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GEOMETRIES = ({}, {"down": 2}, {"down": 8}, {"up": 2}, {"up": 8})


def error_per_stitch(got: Tensor, exact: Tensor) -> Tensor:
    return (got.double() - exact).square().flatten(1).mean(1).sqrt()


def assert_as_good_as_torch(got: Tensor, torch_made: Tensor, exact: Tensor) -> None:
    # where torch happens to be exact, the last bit of an fp32 sum remains
    last_bit = torch.finfo(torch.float32).eps * exact.square().flatten(1).mean(1).sqrt()
    error, allowed = error_per_stitch(got, exact), 2 * error_per_stitch(torch_made, exact) + last_bit
    assert (error <= allowed).all(), f"{error.tolist()} against {allowed.tolist()}"


def assert_problem(p: Any) -> None:
    outs, gradients = [], []
    for kernel in ("triton", "torch"):
        out, (dw, db) = p.out(), p.gradients()
        stitch_out(*p.inputs, out, p.source, p.index, **p.geometry, kernel=kernel)
        stitch_grad(p.x, p.g, dw, db, p.source, p.index, **p.geometry, kernel=kernel)
        outs.append(out)
        gradients.append((dw, db))
    assert_as_good_as_torch(*outs, p.y64)
    assert_as_good_as_torch(gradients[0][0], gradients[1][0], p.dw64)
    assert_as_good_as_torch(gradients[0][1], gradients[1][1], p.db64)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error(problem: Any, geometry: dict[str, int], dtype: torch.dtype) -> None:
    channels = 16 if geometry == {"down": 8} else 64
    shape = {"size": (3, 5), "channels": channels, "receiver_channels": 48, "images": 2}
    assert_problem(problem(source=(0, 1, 1), gather=True, dtype=dtype, **shape, **geometry))


@pytest.mark.usefixtures("split_rows", "small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_of_split_rows(problem: Any, dtype: torch.dtype) -> None:
    assert_problem(problem(source=(0, 1), size=(8, 8), channels=24, receiver_channels=20, images=5, dtype=dtype))


@pytest.mark.parametrize("config", CONFIGS[FORWARD], ids=lambda config: config.name)
def test_every_forward_configuration(problem: Any, config: TileConfig) -> None:
    p = problem(source=(0, 0, 1), size=(9, 9), channels=70, receiver_channels=40, dtype=torch.bfloat16)
    with override_config(FORWARD, config):
        assert_problem(p)


@pytest.mark.parametrize("config", CONFIGS[GRAD], ids=lambda config: config.name)
def test_every_gradient_configuration(problem: Any, config: TileConfig) -> None:
    p = problem(source=(0, 0, 1), size=(9, 9), channels=70, receiver_channels=40, up=2, dtype=torch.bfloat16)
    with override_config(GRAD, config):
        assert_problem(p)
