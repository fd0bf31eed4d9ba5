"""Which kernel, which tiles, which programs: decisions that need no device."""

import logging
from collections import Counter

import pytest
import torch

from fastsitch.kernels import resolve_kernel
from fastsitch.kernels.choose_tiles import (
    choices,
    choose,
    forget_choices,
    forward_plan,
    grad_plan,
    override_config,
    remember,
)
from fastsitch.kernels.launch_plan import column_tiles, cut_forward, cut_grad, segments
from fastsitch.kernels.shapes import StitchShape
from fastsitch.kernels.tiles import CONFIGS, FORWARD, GRAD, H100, DeviceLimits, TileConfig, candidates
from fastsitch.kernels.tuning import tune

CPU = torch.device("cpu")
SHAPE = StitchShape(source=(0, 0, 1), images=256, height=32, width=32, channels=64, receiver_channels=64)


def test_auto_is_torch_on_the_cpu_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    resolve_kernel.cache_clear()
    with caplog.at_level(logging.INFO, logger="fastsitch.kernels.dispatch"):
        assert {resolve_kernel("auto", CPU) for _ in range(3)} == {"torch"}
    assert len([r for r in caplog.records if "auto picks torch on cpu" in r.getMessage()]) == 1


def test_triton_by_name_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    resolve_kernel.cache_clear()
    with pytest.raises(ValueError, match=r"expected a device that can run triton, got cpu: .*TRITON_INTERPRET=1"):
        resolve_kernel("triton", CPU)
    assert resolve_kernel("triton", torch.device("meta")) == "triton"


def test_at_most_four_configurations_and_no_two_alike() -> None:
    for configs in CONFIGS.values():
        assert len(configs) == len(set(configs)) <= 4


def test_small_shared_memory_prunes() -> None:
    small = DeviceLimits(name="small", processors=10, shared_bytes=100 * 1024, l2_bytes=2**22)
    for kernel in CONFIGS:
        assert set(candidates(kernel, SHAPE, small)) < set(CONFIGS[kernel]) or kernel == GRAD
        assert candidates(kernel, SHAPE, H100) == list(CONFIGS[kernel])
    tiny = DeviceLimits(name="tiny", processors=10, shared_bytes=8 * 1024, l2_bytes=2**22)
    with pytest.raises(ValueError, match=r"expected a device with at least 64 KiB .*, got tiny with 8192 bytes"):
        candidates(FORWARD, SHAPE, tiny)


@pytest.mark.parametrize("change", [{"dtype": torch.float32}, {"channels": 63}, {"receiver_channels": 3}], ids=str)
def test_shapes_that_are_short_of_registers_get_small_tiles(change: dict[str, object]) -> None:
    hungry = StitchShape(**{**SHAPE.__dict__, **change})
    for kernel in CONFIGS:
        assert 0 < len(candidates(kernel, hungry, H100)) < len(candidates(kernel, SHAPE, H100))


def test_a_choice_is_kept_can_be_replaced_and_overridden() -> None:
    forget_choices()
    first = choose(FORWARD, SHAPE, H100)
    assert choices() == {(FORWARD, H100.name, SHAPE): first}
    other = next(config for config in CONFIGS[FORWARD] if config != first)
    with override_config(FORWARD, other):
        assert choose(FORWARD, SHAPE, H100) == other
    assert choose(FORWARD, SHAPE, H100) == first
    remember(FORWARD, SHAPE, H100, other)
    assert forward_plan(SHAPE, H100).config == other
    forget_choices()
    assert choose(FORWARD, SHAPE, H100) == first


def test_overrides_and_configurations_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected one of \['stitch_forward', 'stitch_grad'\], got 'other'"):
        override_config("other", CONFIGS[GRAD][0]).__enter__()
    with pytest.raises(ValueError, match=r"TileConfig\.block_m: expected a power of two of at least 16, got 48"):
        TileConfig(block_m=48, block_n=64, block_f=64, warps=4, stages=2)


def test_timing_is_refused_away_from_cuda() -> None:
    with pytest.raises(ValueError, match="expected a CUDA device to time kernels on, got cpu"):
        tune(FORWARD, SHAPE, CPU, lambda: None)


@pytest.mark.parametrize("source", [(0,), (0, 0, 0), (0, 1, 0), (2, 2, 1, 1, 1, 0, 2)])
@pytest.mark.parametrize(("channels", "block"), [(3, 16), (64, 64), (100, 32), (512, 256)])
def test_column_tiles_cover_each_column_once(source: tuple[int, ...], channels: int, block: int) -> None:
    seen: Counter[tuple[int, int, int]] = Counter()
    for sender, first, tile, stitches in column_tiles(source, channels, block):
        for column in range(tile * block, min((tile + 1) * block, stitches * channels)):
            seen[sender, first + column // channels, column % channels] += 1
    assert seen == Counter((source[k], k, d) for k in range(len(source)) for d in range(channels))


def test_stitches_of_one_sender_are_one_wide_product() -> None:
    assert segments((0, 0, 1, 0)) == [(0, 0, 2), (1, 2, 1), (0, 3, 1)]
    assert len(column_tiles((0, 0, 0, 0), 64, 256)) == 1


@pytest.mark.parametrize("images", [1, 7, 256])
def test_rows_are_covered_once(images: int) -> None:
    shape = StitchShape(**{**SHAPE.__dict__, "images": images})
    for config in CONFIGS[FORWARD]:
        plan = cut_forward(shape, config, H100)
        assert (plan.row_tiles - 1) * config.block_m < shape.rows <= plan.row_tiles * config.block_m
        assert 1 <= plan.group_m <= plan.row_tiles
    for config in CONFIGS[GRAD]:
        cut = cut_grad(shape, config, H100)
        assert cut.rows_per_split % config.block_m == 0
        assert (cut.splits - 1) * cut.rows_per_split < shape.rows <= cut.splits * cut.rows_per_split


def test_a_big_gradient_fills_the_device() -> None:
    plan = grad_plan(SHAPE, H100)
    assert plan.splits > 1
    assert plan.programs >= H100.processors
