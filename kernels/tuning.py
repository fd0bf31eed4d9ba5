"""Choose tile configurations by timing them, on CUDA.

Only when called: timings differ from time to time, and the choice changes the order of fp32 sums. A run that must be
repeatable keeps the predicted choice, or stores this one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastsitch.kernels.choose_tiles import choose, override_config, remember
from fastsitch.kernels.cuda_graph import record
from fastsitch.kernels.shapes import StitchShape
from fastsitch.kernels.tiles import TileConfig, candidates, device_limits

WARM_UP = 3
REPEATS = 20
# larger than any L2, so that no repetition finds the data of the last one there
FLUSH_BYTES = 256 * 1024 * 1024


def tune(kernel: str, shape: StitchShape, device: torch.device, launch: Callable[[], None]) -> TileConfig:
    """Time every candidate of ``kernel`` by running ``launch``, remember the fastest for ``shape`` and return it.

    Raises ValueError on other devices than CUDA.
    """
    if device.type != "cuda":
        raise ValueError(f"expected a CUDA device to time kernels on, got {device}")
    limits = device_limits(device)
    # the predicted choice first: a tie keeps it
    first = choose(kernel, shape, limits)
    ordered = [first, *(config for config in candidates(kernel, shape, limits) if config != first)]
    seconds = {}
    for config in ordered:
        with override_config(kernel, config):
            seconds[config] = median_seconds(launch, device)
    best = min(ordered, key=seconds.__getitem__)
    remember(kernel, shape, limits, best)
    return best


def median_seconds(
    launch: Callable[[], None], device: torch.device, repeats: int = REPEATS, *, recorded: bool = True
) -> float:
    """Median time of ``launch`` on the device with a cold L2; ``recorded``: without the time of launching in Python."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    with torch.cuda.device(device):
        for _ in range(WARM_UP):
            launch()
        once = record(launch, device)[0] if recorded else launch
        times = [_timed(once, flush) for _ in range(repeats)]
        torch.cuda.synchronize(device)
        elapsed = sorted(begin.elapsed_time(end) for begin, end in times)
    return float(elapsed[len(elapsed) // 2]) / 1e3


def _timed(launch: Callable[[], None], flush: Tensor) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    flush.zero_()
    begin.record()
    launch()
    end.record()
    return begin, end
