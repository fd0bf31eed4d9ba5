"""A training step of the sweep at several group sizes: whole, in its parts, and beside its bare convolutions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastsitch.benchmark.bare import BareGroups
from fastsitch.benchmark.flops import training_flops
from fastsitch.benchmark.ours import PARTS, Engine
from fastsitch.benchmark.problem import Problem
from fastsitch.benchmark.timing import Clock, Spread, alternate, ratios
from fastsitch.machine import available_memory
from fastsitch.stitching.cells import Cell
from fastsitch.sweep.memory import StepKind, group_memory
from fastsitch.sweep.plan import split_groups

_MEMORY_SHARE = 0.5
"""Of the free memory, for the engine; the bare convolutions take about half as much again."""

_MOST_STEPS, _STEP_CELLS = 4, 100


@dataclass(frozen=True)
class GroupMeasure:
    """``cells`` cells in groups of ``group_size``. Seconds are of one step of all of them."""

    group_size: int
    cells: int
    steps: int
    """Steps per measurement."""
    seconds: Spread
    rate: Spread
    """Images x cells per second."""
    cost: Spread
    """Seconds per image and cell."""
    bare_seconds: Spread
    over_bare: Spread
    """A step over its bare convolutions, round by round."""
    flops: float
    """Of the convolutions in one step."""
    stitch_flops: float
    flops_rate: Spread
    """Achieved FLOP/s, counting the convolutions alone."""
    fraction: Spread
    """Of the ceiling: bare convolutions over the step, round by round."""
    parts: dict[str, Spread]
    """Seconds in each part of a step, from runs with a clock in them; they add up to a little more than a step."""


def default_group_sizes(problem: Problem) -> list[int]:
    """1, 5, one unit, and that two and four times over, as far as memory allows."""
    unit = len(problem.cells)
    sizes = sorted({1, min(5, unit), unit, 2 * unit, 4 * unit})
    while len(sizes) > 1 and not fits(problem, sizes):
        sizes.pop()
    return sizes


def fits(problem: Problem, group_sizes: Sequence[int]) -> bool:
    """Whether steps of all these group sizes should fit into memory side by side, and the floor beside them."""
    sender, receiver = problem.source.shapes, [position.shape for position in problem.frozen.positions]
    kind = StepKind(
        images=problem.batch_size,
        itemsize=problem.dtype.itemsize,
        device=problem.device.type,
        masked=problem.frozen.masked,
        micro_batch=problem.frozen.micro_batch,
        gathers=problem.kernel == "torch",
    )
    needed = sum(
        group_memory([(cell.i, cell.j) for cell in group], sender, receiver, kind)
        for size in group_sizes
        for group in split_groups(_cells(problem, size), size)
    )
    return needed <= _MEMORY_SHARE * available_memory(problem.device)


def measure_groups(
    problem: Problem,
    group_sizes: Sequence[int],
    repeats: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[GroupMeasure]:
    """Every group size in every round, alternating with its floor, after one round that warms up; then the parts.

    Groups smaller than a unit share the unit's cells, larger ones take the same cells with further seeds.
    """
    works: dict[str, Callable[[], object]] = {}
    pools: dict[str, torch.Tensor] = {}
    for size in sorted(group_sizes, reverse=True):
        engine = Engine(problem, _cells(problem, size), size)
        counts = _counts(problem, size)
        bare = BareGroups(problem.receiver, counts, problem.batch_size, problem.dtype, problem.device, pools)
        batches = problem.batches(_steps(size))
        works[f"step {size}"] = lambda engine=engine, batches=batches: engine.run(batches)  # type: ignore[misc]
        works[f"bare {size}"] = lambda bare=bare, batches=batches: bare.run(len(batches))  # type: ignore[misc]
    times = alternate(works, repeats + 1, problem.device, progress)
    works.clear()
    pools.clear()
    return [
        _measure(problem, size, times[f"step {size}"][1:], times[f"bare {size}"][1:], _parts(problem, size, repeats))
        for size in group_sizes
    ]


def _parts(problem: Problem, size: int, repeats: int) -> list[dict[str, float]]:
    """Seconds of a step by part, in every round, after one that warms up."""
    clock = Clock(problem.device)
    engine = Engine(problem, _cells(problem, size), size, clock)
    batches = problem.batches(_steps(size))
    found = []
    for _ in range(repeats + 1):
        clock.seconds.clear()
        engine.run(batches)
        found.append({part: time / len(batches) for part, time in clock.seconds.items()})
    return found[1:]


def _measure(
    problem: Problem, size: int, steps: list[float], bares: list[float], parts: list[dict[str, float]]
) -> GroupMeasure:
    cells, count = _cells(problem, size), _steps(size)
    samples = len(cells) * problem.batch_size
    shapes = [position.shape for position in problem.frozen.positions]
    flops = training_flops(problem.source.shapes, shapes, [(cell.i, cell.j) for cell in cells])
    own, bare = [time / count for time in steps], [time / count for time in bares]
    return GroupMeasure(
        group_size=size,
        cells=len(cells),
        steps=count,
        seconds=Spread.of(own),
        rate=Spread.of([samples / time for time in own]),
        cost=Spread.of([time / samples for time in own]),
        bare_seconds=Spread.of(bare),
        over_bare=ratios(own, bare),
        flops=flops.convolutions * problem.batch_size,
        stitch_flops=flops.stitches * problem.batch_size,
        flops_rate=Spread.of([flops.convolutions * problem.batch_size / time for time in own]),
        fraction=ratios(bare, own),
        parts={part: Spread.of([found.get(part, 0.0) for found in parts]) for part in PARTS},
    )


def _cells(problem: Problem, group_size: int) -> list[Cell]:
    """One unit, or as many as fill the group."""
    seeds = max(1, group_size // len(problem.cells))
    return [cell for seed in range(seeds) for cell in problem.cells_of(seed)]


def _counts(problem: Problem, group_size: int) -> list[list[int]]:
    """Of every group, the stitches into each receiver position."""
    groups = split_groups(_cells(problem, group_size), group_size)
    return [[sum(cell.j == j for cell in group) for j in range(len(problem.frozen.positions))] for group in groups]


def _steps(group_size: int) -> int:
    """Several for small groups, whose buffers stay in the cache from one step to the next, as in a sweep."""
    return max(1, min(_MOST_STEPS, _STEP_CELLS // group_size))
