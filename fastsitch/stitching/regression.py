"""Matched stitches by training: SGD on the squared error to the expected representation, the published way."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.representation_batch import Batch
from fastsitch.activations.source import Source
from fastsitch.chains.layout import elements, index_among_equal_shapes
from fastsitch.progress import Report, ignore
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.engine import group_results, stitch_bank, stitch_optimizer, train_epochs
from fastsitch.stitching.geometry import DEFAULT_RULES, Rules, Shape
from fastsitch.stitching.moments import require_same_images
from fastsitch.stitching.recipe import TrainingRecipe
from fastsitch.stitching.stitch_bank import StitchBank


def regress_group(
    receiver: FrozenNetwork,
    source: Source,
    expected: Source,
    cells: Sequence[Cell],
    recipe: TrainingRecipe,
    order: ImageOrder,
    *,
    kernel: str = "torch",
    rules: Rules = DEFAULT_RULES,
    report: Report = ignore,
) -> dict[Cell, CellResult]:
    """Train ``cells`` together to the receiver's own representations (``expected``), then evaluate them in it.

    The loss is the mean squared error over images, rows, columns and channels, summed over stitches; no block of the
    receiver runs before the evaluation. Everything else is as in :func:`fastsitch.stitching.engine.train_group`.
    Raises ConfigError when the two sources do not hold the same images, or fewer than one batch of them.
    """
    require_same_images(source.train, expected.train)
    bank = stitch_bank(receiver, source, cells, kernel, rules)
    regression = Regression(bank, expected.shapes, recipe.batch_size)
    optimizer = stitch_optimizer(bank, recipe)

    def draw(source: Source, epoch: int) -> Iterator[Batch]:
        return iter(source.train.shuffled(order, epoch, recipe.batch_size, augment=recipe.augment))

    def draw_both(epoch: int) -> Iterator[tuple[Batch, Batch]]:
        # not zip, which keeps its first tuple, and with it the first mini-batches, until it ends
        drawn = draw(expected, epoch)
        for batch in draw(source, epoch):
            yield batch, next(drawn)

    train_loss = train_epochs(
        bank,
        recipe,
        len(source.train),
        draw_both,
        lambda drawn: regression.step(*drawn, optimizer),
        optimizer,
        report,
    )
    return group_results(receiver, source, bank, train_loss, {}, images=recipe.batch_size)


class Regression:
    """Steps of a bank's stitches towards the expected representation, one receiver position after the other.

    All positions share the memory of the largest outputs.
    """

    def __init__(self, bank: StitchBank, shapes: Sequence[Shape], images: int) -> None:
        self._bank = bank
        self._shapes = list(shapes)
        self._stack_index = index_among_equal_shapes(self._shapes)
        sizes = [count * images * elements(shape) for count, shape in zip(bank.counts, self._shapes, strict=True)]
        self._memory = torch.empty(max(sizes), dtype=bank.dtype, device=bank.parameters.device)

    def step(self, batch: Batch, expected: Batch, optimizer: torch.optim.Optimizer) -> Tensor:
        """One step on the same images of both networks: forward, backward, update. Returns the losses (K,)."""
        bank = self._bank
        bank.refresh()
        losses = []
        for j, count in enumerate(bank.counts):
            if count == 0:
                continue
            y_BPQD = expected.values(self._shapes[j], self._stack_index[j])
            out_KBPQD = self._memory[: count * y_BPQD.numel()].view(count, *y_BPQD.shape)
            bank.forward(j, batch, out_KBPQD)
            difference = out_KBPQD.sub_(y_BPQD)
            norm_K = torch.linalg.vector_norm(difference.flatten(1), dim=1, dtype=bank.parameters.dtype)
            losses.append(norm_K.square() / y_BPQD.numel())
            bank.backward(j, batch, difference.mul_(2 / y_BPQD.numel()))
        optimizer.step()
        return torch.cat(losses)
