"""All peers and the engine on the same cells, timed in turn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastsitch.activations.order import ImageOrder
from fastsitch.activations.resident import ResidentSource, ResidentSplit
from fastsitch.benchmark.check import OURS, PEERS, Agreement, Way
from fastsitch.benchmark.ours import Engine
from fastsitch.benchmark.problem import Problem
from fastsitch.benchmark.timing import Spread, alternate, ratios, seconds
from fastsitch.stitching.engine import TrainingRecipe, train_group
from fastsitch.sweep.config import STITCH_RECIPES

SWEEP = "fastsitch, evaluation included"

_ROUND_SECONDS, _MOST_STEPS, _SWEEP_STEPS = 0.8, 4, 8


@dataclass(frozen=True)
class PeerMeasure:
    """One way to train all cells of the pair. Seconds are of one step of all cells."""

    name: str
    steps: int
    """Steps per round: fewer for slow ways."""
    seconds: Spread
    rate: Spread
    """Images x cells per second."""
    times_ours: Spread
    """Seconds over those of the engine, round by round."""
    agreement: Agreement | None


def race(
    problem: Problem,
    agreements: Mapping[str, Agreement],
    repeats: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[PeerMeasure]:
    """Time the engine, a whole training with evaluation, and every peer in ``agreements``; ours comes first."""
    cells = problem.cells
    ways: dict[str, Way] = {OURS: Engine(problem, cells)}
    ways |= {name: PEERS[name](problem, cells) for name in agreements}
    works: dict[str, Callable[[], object]] = {}
    steps: dict[str, float] = {}
    for name, way in ways.items():
        way.run(problem.batches(1))
        first = seconds(lambda way=way: way.run(problem.batches(1)), problem.device)  # type: ignore[misc]
        count = max(1, min(_MOST_STEPS, round(_ROUND_SECONDS / first)))
        batches = problem.batches(count)
        works[name] = lambda way=way, batches=batches: way.run(batches)  # type: ignore[misc]
        steps[name] = count
    source, recipe = _short_training(problem)
    steps[SWEEP] = len(source.train) // recipe.batch_size
    works[SWEEP] = lambda: train_group(problem.frozen, source, cells, recipe, ImageOrder(seed=0), kernel=problem.kernel)
    times = alternate(works, repeats, problem.device, progress)
    samples = len(cells) * problem.batch_size
    per_step = {name: [time / steps[name] for time in own] for name, own in times.items()}
    return [
        PeerMeasure(
            name=name,
            steps=int(steps[name]),
            seconds=Spread.of(per_step[name]),
            rate=Spread.of([samples / time for time in per_step[name]]),
            times_ours=ratios(per_step[name], per_step[OURS]),
            agreement=agreements.get(name),
        )
        for name in (OURS, SWEEP, *agreements)
    ]


def _short_training(problem: Problem) -> tuple[ResidentSource, TrainingRecipe]:
    """A few steps and the evaluation that belongs to them: one test image for ten trained on, as in ``small``."""
    images = min(_SWEEP_STEPS * problem.batch_size, len(problem.source.train))
    shapes = problem.source.shapes

    def part(split: ResidentSplit, count: int) -> ResidentSplit:
        return ResidentSplit({shape: split.stack(shape)[:, :count] for shape in shapes}, split.labels[:count])

    source = ResidentSource(shapes, part(problem.source.train, images), part(problem.source.test, max(1, images // 10)))
    small = STITCH_RECIPES["small"]
    recipe = TrainingRecipe(
        name=small.name,
        epochs=1,
        batch_size=problem.batch_size,
        lr=small.lr,
        momentum=small.momentum,
        weight_decay=small.weight_decay,
    )
    return source, recipe
