"""Wall time of work on any device."""

import statistics
import time
from collections.abc import Callable

import torch


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all work that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object], device: torch.device, calls: int = 5) -> float:
    """Median wall time of so many calls, after one that warms up."""
    work()
    return statistics.median(seconds(work, device) for _ in range(calls))
