"""Problems for the interpreter cases; see tests/kernels/test_interpreter.py for how they are run."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsitch.kernels import choose_tiles as choose
from fastsitch.kernels import launch_plan as plan
from fastsitch.kernels.reference import grouped_stitch_reference
from fastsitch.kernels.tiles import FORWARD, GRAD, TileConfig


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of one launch and the reference's answers in fp64."""

    x: Tensor
    w: Tensor
    b: Tensor
    g: Tensor
    source: tuple[int, ...]
    index: Tensor | None
    geometry: dict[str, int]
    y64: Tensor
    dw64: Tensor
    db64: Tensor

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self.x, self.w, self.b

    def out(self) -> Tensor:
        """A batch whose every element must be written: NaN until then."""
        return torch.full(self.g.shape, float("nan"), dtype=self.x.dtype)

    def gradients(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Gradients that must be written, likewise."""
        nan = float("nan")
        return torch.full(self.w.shape, nan, dtype=dtype), torch.full(self.b.shape, nan, dtype=dtype)


def make_problem(
    *,
    source: tuple[int, ...],
    size: tuple[int, int],
    channels: int,
    receiver_channels: int,
    down: int = 1,
    up: int = 1,
    images: int = 2,
    gather: bool = False,
    integers: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """``size`` is that of the GEMM's grid. With ``integers`` all sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    stitches, features = len(source), down * down * channels
    height, width = size[0] * down, size[1] * down
    stored = images + 3 if gather else images
    x = draw(max(source) + 1, stored, height, width, channels)
    index = torch.randint(0, stored, (images,), generator=generator) if gather else None
    w, b = draw(stitches, features, receiver_channels), draw(stitches, receiver_channels)
    if not integers:
        w = (w / features**0.5).to(dtype)
    g = draw(stitches, images, size[0] * up, size[1] * up, receiver_channels)
    w64, b64 = w.double().requires_grad_(), b.double().requires_grad_()
    y64 = grouped_stitch_reference(x.double(), w64, b64, source, index, down=down, up=up)
    dw64, db64 = torch.autograd.grad(y64, (w64, b64), g.double())
    return Problem(
        x=x,
        w=w,
        b=b,
        g=g,
        source=source,
        index=index,
        geometry={"down": down, "up": up},
        y64=y64.detach(),
        dw64=dw64,
        db64=db64,
    )


@pytest.fixture
def problem() -> Any:
    """The maker of problems."""
    return make_problem


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles so small that small problems have several of each kind, with ragged edges."""
    tiny = TileConfig(block_m=32, block_n=16, block_f=16, warps=1, stages=1)
    with choose.override_config(FORWARD, tiny), choose.override_config(GRAD, tiny):
        yield


@pytest.fixture
def split_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split gradients over their rows however little each split then has to do."""
    monkeypatch.setattr(plan, "SPLIT_TRAFFIC", 1e9)


@pytest.fixture(autouse=True)
def in_the_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.fail("TRITON_INTERPRET=1 is not set: run tests/kernels/test_interpreter.py")
