"""How much memory some work takes at its peak, beyond what is held before."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastsitch.machine import release_memory
from fastsitch.timing import synchronise

_M_MMAP_THRESHOLD = -3
_OUTSIDE_THE_HEAP, _USUALLY_AT_MOST = 1 << 20, 32 << 20
"""Bytes of a block from which on the allocator returns it to the system at once: set here, and glibc's own limit."""


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes of device memory that ``work`` takes at its peak; None where the system does not tell.

    On the CPU it is the growth of what the process holds, from Linux. The allocator is made to give back what is free,
    because a process whose heap has holes takes less.
    """
    if device.type == "cuda":
        release_memory()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronise(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    if sys.platform != "linux":
        return None
    with _large_blocks_outside_the_heap():
        release_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before


@contextmanager
def _large_blocks_outside_the_heap() -> Iterator[None]:
    """As long as this lasts, tensors of 1 MiB and more come from the system and go back to it."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        yield
        return
    set_option(_M_MMAP_THRESHOLD, _OUTSIDE_THE_HEAP)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, _USUALLY_AT_MOST)


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024
