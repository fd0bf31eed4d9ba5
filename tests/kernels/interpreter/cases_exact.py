"""Integer inputs, exact sums: every element must equal the reference's, in every geometry, dtype and odd size."""

from itertools import cycle, product
from typing import Any

import pytest
import torch

from fastsitch.kernels import stitch_grad, stitch_out

CHANNELS = (3, 16, 63, 64, 100, 512)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GEOMETRIES = ({}, {"down": 2}, {"down": 4}, {"down": 8}, {"up": 2}, {"up": 4}, {"up": 8})
SEVENTEEN = (0,) * 5 + (1,) * 3 + (2,) + (1,) * 8
SOURCES = ((0,), (1, 0, 1), (0, 0, 1), SEVENTEEN)


def covering_set() -> list[Any]:
    """Each geometry with every C and every D; dtypes, sharing and gathering rotate at different speeds."""
    cases = []
    dtypes, sources = cycle(DTYPES), cycle(SOURCES)
    gathers, sizes = cycle((True, False, True, True, False)), cycle(((5, 3), (1, 7), (4, 4)))
    for shift, geometry in enumerate(GEOMETRIES):
        for i, channels in enumerate(CHANNELS):
            receiver_channels = CHANNELS[(2 * i + shift) % 6 if i < 3 else (2 * i + 1 + shift) % 6]
            work = channels * receiver_channels * max(geometry.get("down", 1), geometry.get("up", 1)) ** 2
            source, size, images = next(sources), next(sizes), 2
            if work > 30_000 and len(source) > 3:
                source = (0, 0, 1)
            if work > 100_000:
                source, size = (0,), (1, 2)
            if work > 1_000_000:
                size, images = (1, 1), 1
            case = {**geometry, "channels": channels, "receiver_channels": receiver_channels}
            name = "-".join(f"{key}{value}" for key, value in case.items())
            case |= {"size": size, "images": images, "source": source, "gather": next(gathers), "dtype": next(dtypes)}
            cases.append(pytest.param(case, id=f"{name}-K{len(source)}"))
    return cases


def run_both(p: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, (dw, db) = p.out(), p.gradients()
    stitch_out(*p.inputs, out, p.source, p.index, **p.geometry, kernel="triton")
    stitch_grad(p.x, p.g, dw, db, p.source, p.index, **p.geometry, kernel="triton")
    return out, dw, db


def assert_exact(p: Any) -> None:
    out, dw, db = run_both(p)
    assert torch.equal(out, p.y64.to(p.x.dtype))
    assert torch.equal(dw, p.dw64.float())
    assert torch.equal(db, p.db64.float())


@pytest.mark.parametrize("case", covering_set())
def test_chosen_tiles(problem: Any, case: dict[str, Any]) -> None:
    assert_exact(problem(integers=True, **case))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_tiles", "split_rows")
def test_small_tiles_and_split_rows(problem: Any, geometry: dict[str, int], dtype: torch.dtype) -> None:
    """Several tiles along every dimension, none of them full at the end, and partials to add."""
    p = problem(
        source=(0, 0, 0, 1, 0, 0),
        size=(5, 5) if geometry.get("up", 1) < 4 else (3, 3),
        channels={1: 19, 2: 5, 4: 3, 8: 2}[geometry.get("down", 1)],
        receiver_channels=7,
        images=3,
        gather=True,
        integers=True,
        dtype=dtype,
        **geometry,
    )
    assert_exact(p)


def test_covering_set_covers() -> None:
    """Every C and D meets every geometry; every K, and every dtype with and without gathering, occurs."""
    cases = [param.values[0] for param in covering_set()]
    for geometry in GEOMETRIES:
        matching = [case for case in cases if geometry == {key: case[key] for key in case.keys() & {"down", "up"}}]
        assert {case["channels"] for case in matching} == set(CHANNELS)
        assert {case["receiver_channels"] for case in matching} == set(CHANNELS)
    assert {len(case["source"]) for case in cases} >= {1, 3, 17}
    assert {(case["dtype"], case["gather"]) for case in cases} == set(product(DTYPES, (True, False)))
