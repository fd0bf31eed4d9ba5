"""Clocks: whole calls in alternating rounds, and the parts of one call."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastsitch.kernels.record import record


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of ``n`` measurements."""

    median: float
    min: float
    max: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), len(values))


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def at_once(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same work without the time that Python takes to launch it, where the device can do that; runs it once."""
    work()
    return record(work, device)[0] if device.type == "cuda" else work


def alternate(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call in every round; in a round each is called once, so that drift meets all alike.

    Nothing is warmed up here.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    done = 0
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device))
            done += 1
            if progress is not None:
                progress(done, rounds * len(works))
    return times


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The spread of the quotients, round by round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


class Clock:
    """Adds up the time spent in named parts; a part inside another one is not counted in the outer one."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._open: list[str] = []
        self._mark = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge what happens inside to ``name``."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        synchronise(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now
