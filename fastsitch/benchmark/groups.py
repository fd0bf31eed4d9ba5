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
from fastsitch.sweep.plan import group_memory

_MEMORY_SHARE = 0.3
"""Of the free memory, for the engine; the bare convolutions take about as much."""

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
    return [size for size in sorted({1, min(5, unit), unit, 2 * unit, 4 * unit}) if fits(problem, size)]


def fits(problem: Problem, group_size: int) -> bool:
    """Whether a step of so many cells should fit into memory, its floor beside it."""
    counts = Engine(problem, _cells(problem, group_size), group_size).counts
    shapes = [position.shape for position in problem.frozen.positions]
    most = max(group_memory(own, shapes, problem.batch_size, problem.dtype.itemsize) for own in counts)
    return most <= _MEMORY_SHARE * available_memory(problem.device)


def measure_groups(
    problem: Problem,
    group_sizes: Sequence[int],
    repeats: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[GroupMeasure]:
    """Every group size in every round, alternating; one round before that warms up.

    Groups smaller than a unit share the unit's cells, larger ones take the same cells with further seeds.
    """
    works: dict[str, Callable[[], object]] = {}
    clocks: dict[int, Clock] = {}
    part_seconds: dict[int, list[dict[str, float]]] = {size: [] for size in group_sizes}
    for size in group_sizes:
        cells = _cells(problem, size)
        batches = problem.batches(_steps(size))
        engine = Engine(problem, cells, size)
        clocks[size] = Clock(problem.device)
        timed = Engine(problem, cells, size, clocks[size])
        bare = BareGroups(problem.receiver, engine.counts, problem.batch_size, problem.dtype, problem.device)

        def run_timed(size: int = size, timed: Engine = timed, batches: list[torch.Tensor] = batches) -> None:
            clocks[size].seconds.clear()
            timed.run(batches)
            part_seconds[size].append({part: time / len(batches) for part, time in clocks[size].seconds.items()})

        works[f"step {size}"] = lambda engine=engine, batches=batches: engine.run(batches)  # type: ignore[misc]
        works[f"bare {size}"] = lambda bare=bare, batches=batches: bare.run(len(batches))  # type: ignore[misc]
        works[f"parts {size}"] = run_timed
    times = alternate(works, repeats + 1, problem.device, progress)
    return [
        _measure(problem, size, times[f"step {size}"][1:], times[f"bare {size}"][1:], part_seconds[size][1:])
        for size in group_sizes
    ]


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


def _steps(group_size: int) -> int:
    """Several for small groups, whose buffers stay in the cache from one step to the next, as in a sweep."""
    return max(1, min(_MOST_STEPS, _STEP_CELLS // group_size))
