"""Time spent in the parts of one call."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastsitch.timing import synchronise


class Clock:
    """Adds up the time spent in named parts; a part inside another one is not counted in the outer one."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._open: list[str] = []
        self._mark = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        self._add()
        self._open.append(name)
        try:
            yield
        finally:
            self._add()
            self._open.pop()

    def _add(self) -> None:
        synchronise(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now
