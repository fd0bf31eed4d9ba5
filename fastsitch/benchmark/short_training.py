"""A training of a group as a sweep does it, of a few steps."""

from collections.abc import Callable, Sequence

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.resident_source import ResidentSource, ResidentSplit
from fastsitch.benchmark.bench_pair import BenchPair
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.engine import train_group
from fastsitch.stitching.recipe import STITCH_RECIPES, TrainingRecipe


def short_training(pair: BenchPair, cells: Sequence[Cell], steps: int) -> Callable[[], object]:
    """So many steps, and the evaluation that belongs to them: one test image for ten trained on, as in ``small``."""
    images = steps * pair.batch_size
    shapes = pair.source.shapes

    def first(split: ResidentSplit, count: int) -> ResidentSplit:
        return ResidentSplit({shape: split.stack(shape)[:, :count] for shape in shapes}, split.labels[:count])

    source = ResidentSource(shapes, first(pair.source.train, images), first(pair.source.test, max(1, images // 10)))
    small = STITCH_RECIPES["small"]
    recipe = TrainingRecipe(
        name=small.name,
        epochs=1,
        batch_size=pair.batch_size,
        lr=small.lr,
        momentum=small.momentum,
        weight_decay=small.weight_decay,
    )
    return lambda: train_group(
        pair.frozen, source, cells, recipe, ImageOrder(seed=0), kernel=pair.kernel, rules=pair.rules
    )
