"""Calls timed in alternating rounds."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fastsitch.kernels.cuda_graph import record
from fastsitch.progress import Progress, Report, ignore
from fastsitch.timing import seconds


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


def recorded(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same work as a CUDA graph, which Python launches at once, where the device has such; runs it once."""
    work()
    return record(work, device)[0] if device.type == "cuda" else work


def alternate(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    report: Report = ignore,
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
            report(Progress(done, rounds * len(works), "measurements"))
    return times


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The spread of the quotients, round by round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])
