"""A training step of the sweep at several group sizes: whole, in its parts, and beside its products alone."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fastsitch.benchmark.bare_products import BareGroups
from fastsitch.benchmark.bench_pair import BenchPair
from fastsitch.benchmark.clock import Clock
from fastsitch.benchmark.flops import stitch_flops
from fastsitch.benchmark.peak_memory import peak_memory
from fastsitch.benchmark.short_training import short_training
from fastsitch.benchmark.timed_engine import PARTS, Engine
from fastsitch.benchmark.timing_rounds import Spread, alternate, ratios
from fastsitch.machine import available_memory
from fastsitch.planning.group_memory import StepKind, group_memory
from fastsitch.progress import Report, ignore
from fastsitch.stitching.cells import Cell, split_groups

_MEMORY_SHARE = 0.5
"""Of the free memory, for the engine; the bare products take about half as much again."""

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
    """A step over its bare products, round by round."""
    flops: float
    """Of the receiver's products in one step."""
    stitch_flops: float
    flops_rate: Spread
    """Achieved FLOP/s, counting the receiver's products alone."""
    fraction: Spread
    """Of the ceiling: bare products over the step, round by round."""
    parts: dict[str, Spread]
    """Seconds in each part of a step, from runs with a clock in them; they add up to a little more than a step."""
    predicted_memory: int
    """Bytes of one group at its peak, as a sweep plans them."""
    memory: int | None
    """The same, measured; None where the system does not tell."""


def default_group_sizes(pair: BenchPair) -> list[int]:
    """1, 5, one unit, and that two and four times over, as far as memory allows."""
    unit = len(pair.cells)
    sizes = sorted({1, min(5, unit), unit, 2 * unit, 4 * unit})
    while len(sizes) > 1 and not fits(pair, sizes):
        sizes.pop()
    return sizes


def fits(pair: BenchPair, group_sizes: Sequence[int]) -> bool:
    """Whether steps of all these group sizes should fit into memory side by side, with their bare products."""
    needed = sum(
        predicted_memory(pair, group) for size in group_sizes for group in split_groups(_cells(pair, size), size)
    )
    return needed <= _MEMORY_SHARE * available_memory(pair.device)


def predicted_memory(pair: BenchPair, group: Sequence[Cell]) -> int:
    """Bytes of training one group at its peak, as a sweep plans them."""
    kind = StepKind(
        images=pair.batch_size,
        itemsize=pair.dtype.itemsize,
        device=pair.device.type,
        masked=pair.frozen.masked,
        micro_batch=pair.frozen.micro_batch,
        gathers=pair.kernel == "torch",
        rules=pair.rules,
    )
    receiver = [position.rows for position in pair.frozen.positions]
    return group_memory([(cell.i, cell.j) for cell in group], pair.source.shapes, receiver, kind, pair.segments)


def measured_memory(pair: BenchPair, group: Sequence[Cell]) -> int | None:
    """The same, measured, in bytes; None where the system does not tell."""
    # the optimizer has its momentum from the second step on
    return peak_memory(short_training(pair, group, 2), pair.device)


def measure_groups(
    pair: BenchPair,
    group_sizes: Sequence[int],
    repeats: int,
    report: Report = ignore,
) -> list[GroupMeasure]:
    """Every group size in every round, alternating with its bare products, after a warm-up round; the memory of a step
    before, its parts after that.

    Groups smaller than a unit share the unit's cells, larger ones take the same cells with further seeds.
    """
    memory: dict[int, int | None] = {}
    for size in group_sizes:
        first = split_groups(_cells(pair, size), size)[0]
        # libraries make their workspaces
        short_training(pair, first, 1)()
        memory[size] = measured_memory(pair, first)
    works: dict[str, Callable[[], object]] = {}
    pools: dict[int, torch.Tensor] = {}
    flops: dict[int, int] = {}
    for size in sorted(group_sizes, reverse=True):
        engine = Engine(pair, _cells(pair, size), size)
        counts = _counts(pair, size)
        bare = BareGroups(pair.receiver, counts, pair.batch_size, pair.dtype, pair.device, pools)
        flops[size] = bare.flops
        batches = pair.batches(_steps(size))
        works[f"step {size}"] = lambda engine=engine, batches=batches: engine.run(batches)  # type: ignore[misc]
        works[f"bare {size}"] = lambda bare=bare, batches=batches: bare.run(len(batches))  # type: ignore[misc]
    times = alternate(works, repeats + 1, pair.device, report)
    works.clear()
    pools.clear()
    # the loop's own would keep the last ones alive
    del engine, bare
    return [
        _measure(
            pair,
            size,
            flops[size],
            memory[size],
            times[f"step {size}"][1:],
            times[f"bare {size}"][1:],
            _parts(pair, size, repeats),
        )
        for size in group_sizes
    ]


def compare_pairs(
    pairs: Mapping[str, BenchPair], group_size: int, repeats: int, report: Report = ignore
) -> dict[str, float]:
    """Images x cells per second of pairs with the same cells, in medians of alternating rounds after a first."""
    works: dict[str, Callable[[], object]] = {}
    for name, pair in pairs.items():
        engine, batches = Engine(pair, _cells(pair, group_size), group_size), pair.batches(_steps(group_size))
        works[name] = lambda engine=engine, batches=batches: engine.run(batches)  # type: ignore[misc]
    (device,) = {pair.device for pair in pairs.values()}
    times = alternate(works, repeats + 1, device, report)
    return {
        name: len(_cells(pair, group_size)) * pair.batch_size * _steps(group_size) / statistics.median(times[name][1:])
        for name, pair in pairs.items()
    }


def _parts(pair: BenchPair, size: int, repeats: int) -> list[dict[str, float]]:
    """Seconds of a step by part, in every round, after one that warms up."""
    clock = Clock(pair.device)
    engine = Engine(pair, _cells(pair, size), size, clock)
    batches = pair.batches(_steps(size))
    found = []
    for _ in range(repeats + 1):
        clock.seconds.clear()
        engine.run(batches)
        found.append({part: time / len(batches) for part, time in clock.seconds.items()})
    return found[1:]


def _measure(
    pair: BenchPair,
    size: int,
    flops: int,
    memory: int | None,
    steps: list[float],
    bares: list[float],
    parts: list[dict[str, float]],
) -> GroupMeasure:
    cells, count = _cells(pair, size), _steps(size)
    samples = len(cells) * pair.batch_size
    step, bare = [time / count for time in steps], [time / count for time in bares]
    return GroupMeasure(
        group_size=size,
        cells=len(cells),
        steps=count,
        seconds=Spread.of(step),
        rate=Spread.of([samples / time for time in step]),
        cost=Spread.of([time / samples for time in step]),
        bare_seconds=Spread.of(bare),
        over_bare=ratios(step, bare),
        flops=flops,
        stitch_flops=pair.batch_size * sum(stitch_flops(pair.geometry(cell)) for cell in cells),
        flops_rate=Spread.of([flops / time for time in step]),
        fraction=ratios(bare, step),
        parts={part: Spread.of([found.get(part, 0.0) for found in parts]) for part in PARTS},
        predicted_memory=predicted_memory(pair, split_groups(cells, size)[0]),
        memory=memory,
    )


def _cells(pair: BenchPair, group_size: int) -> list[Cell]:
    """One unit, or as many as fill the group."""
    seeds = max(1, group_size // len(pair.cells))
    return [cell for seed in range(seeds) for cell in pair.cells_of(seed)]


def _counts(pair: BenchPair, group_size: int) -> list[list[int]]:
    """Of every group, the stitches into each receiver position."""
    groups = split_groups(_cells(pair, group_size), group_size)
    return [[sum(cell.j == j for cell in group) for j in range(len(pair.frozen.positions))] for group in groups]


def _steps(group_size: int) -> int:
    """Several for small groups, whose buffers stay in the cache from one step to the next, as in a sweep."""
    return max(1, min(_MOST_STEPS, _STEP_CELLS // group_size))
