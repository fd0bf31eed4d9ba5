"""How bench/gpu_kernels.py judges kernels, on small launches and without a GPU."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsitch.kernels.shapes import StitchShape

PATH = Path(__file__).parents[3] / "bench" / "gpu_kernels.py"
SHAPE = StitchShape(source=(0, 1), images=2, height=4, width=4, channels=16, receiver_channels=24, gather=True)

spec = importlib.util.spec_from_file_location("gpu_kernels", PATH)
assert spec is not None
assert spec.loader is not None
gpu_kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_kernels)


@pytest.mark.parametrize("geometry", [{}, {"down": 2}, {"up": 2}], ids=str)
def test_right_kernels_are_judged_right(geometry: dict[str, int]) -> None:
    verdict = gpu_kernels.judge(gpu_kernels.make_inputs(replace(SHAPE, **geometry), torch.device("cpu")))
    assert verdict["right"], verdict
    assert verdict["repeatable"]


def test_wrong_kernels_are_judged_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = gpu_kernels.make_inputs(SHAPE, torch.device("cpu"))
    honest = gpu_kernels.stitch_out

    def forgets_the_bias(x: object, w: object, b: torch.Tensor, *rest: object, kernel: str, **more: object) -> None:
        honest(x, w, b * 0 if kernel == "triton" else b, *rest, kernel=kernel, **more)

    monkeypatch.setattr(gpu_kernels, "stitch_out", forgets_the_bias)
    assert not gpu_kernels.judge(inputs)["right"]


def test_the_convolutions_it_times_run() -> None:
    for geometry in ({}, {"down": 2}, {"up": 2}):
        gpu_kernels.cudnn_forward(gpu_kernels.make_inputs(replace(SHAPE, **geometry), torch.device("cpu")))()


def test_it_covers_the_geometries_of_the_study() -> None:
    full = {(shape.down, shape.up) for shape in gpu_kernels.shapes(quick=False)}
    assert full == {(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8)}
    assert len(gpu_kernels.shapes(quick=False)) == 16
    assert len(gpu_kernels.shapes(quick=True)) == 3
