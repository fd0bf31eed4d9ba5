"""Train and evaluate all cells of a group as one batch."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.representation_batch import Batch
from fastsitch.activations.source import Source, SourceSplit
from fastsitch.errors import ConfigError, argument
from fastsitch.progress import Progress, Report, ignore
from fastsitch.receivers.batch_statistics_network import BatchStatisticsNetwork
from fastsitch.receivers.contract import FrozenReceiver, Receiver, Statistics
from fastsitch.stitching.cascade import Cascade, cross_entropy
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.geometry import DEFAULT_RULES, Rules
from fastsitch.stitching.matching import Matched
from fastsitch.stitching.preconditioner import Preconditioner
from fastsitch.stitching.recipe import TrainingRecipe
from fastsitch.stitching.recorded_step import RecordedStep
from fastsitch.stitching.stitch_bank import StitchBank
from fastsitch.stitching.stitch_schedule import stitch_schedule
from fastsitch.vocabulary import Status

Drawn = TypeVar("Drawn")


def train_group(
    receiver: Receiver,
    source: Source,
    cells: Sequence[Cell],
    recipe: TrainingRecipe,
    order: ImageOrder,
    *,
    kernel: str = "torch",
    init: Mapping[Cell, Matched] | None = None,
    rules: Rules = DEFAULT_RULES,
    report: Report = ignore,
) -> dict[Cell, CellResult]:
    """Train ``cells`` together, then evaluate them on the whole test set.

    All cells share the receiver, the sender (``source``) and the order of images. Results do not depend on which
    other cells are in the group. The receiver's dtype is the compute dtype, ``kernel`` the implementation of the
    stitch operator (``torch`` or ``triton``); ``rules`` say what shapes leave open. Cells in ``init`` start from their
    matched stitch instead of a random one; the preconditioned optimizer needs all cells in it. With a
    BatchStatisticsNetwork as receiver, BatchNorm uses batch statistics per stitch in training, and the stitch's own
    running statistics on the test set. ``report`` gets cells, which count in part while they are trained. Raises
    ConfigError when there are fewer training images than one batch.
    """
    bank = stitch_bank(receiver, source, cells, kernel, rules)
    if init is not None:
        _load(bank, init)
    preconditioner = None
    if recipe.optimizer == "preconditioned":
        assert init is not None, "the moments come with the matched stitches"
        preconditioner = Preconditioner(bank, init)
    passed = receiver.for_stitches(bank.counts)
    train_loss = _train(passed, source.train, bank, recipe, order, preconditioner, report)
    # twice the training batch without what training keeps for gradients: never the larger of the two in memory
    return group_results(passed, source, bank, train_loss, init or {}, images=2 * recipe.batch_size)


def evaluate_matched(
    receiver: Receiver,
    source: Source,
    matched: Mapping[Cell, Matched],
    *,
    images: int,
    kernel: str = "torch",
    rules: Rules = DEFAULT_RULES,
) -> dict[Cell, CellResult]:
    """Accuracy and loss of matched stitches on the whole test set, ``images`` at a time.

    ``train_loss`` is their matched error.
    """
    bank = stitch_bank(receiver, source, list(matched), kernel, rules)
    _load(bank, matched)
    errors = torch.tensor([matched[cell].error for cell in bank.cells], dtype=torch.float64, device=receiver.device)
    passed = receiver.for_stitches(bank.counts)
    return group_results(passed, source, bank, errors, matched, images=images)


def evaluate_with_statistics(
    receiver: BatchStatisticsNetwork,
    source: Source,
    stitches: Mapping[Cell, tuple[Tensor, Tensor]],
    statistics: Mapping[Cell, Statistics],
    *,
    images: int,
    kernel: str = "torch",
    rules: Rules = DEFAULT_RULES,
) -> dict[Cell, float]:
    """Accuracy of given stitches on the whole test set in a receiver whose BatchNorm uses given running statistics.

    ``stitches`` are weight (F, D), features ordered (ky, kx, c), and bias (D,) of every cell, ``statistics`` those of
    the same cells, as :attr:`CellResult.statistics` has them. ``images`` at a time; NaN where the loss is not finite.
    So Figure 5 of Hernandez et al. 2022 evaluated matched stitches: with what training vanilla stitches left behind.
    Raises ConfigError for cells without statistics, or with those of another receiver or position.
    """
    missing = [cell for cell in stitches if cell not in statistics]
    if missing:
        raise ConfigError(
            f"no running statistics for cell ({missing[0].i}, {missing[0].j}): expected those of every cell"
        )
    bank = stitch_bank(receiver, source, list(stitches), kernel, rules)
    bank.load(stitches)
    passed = receiver.for_stitches(bank.counts)
    for k, cell in enumerate(bank.cells):
        passed.load_statistics(k, statistics[cell])
    accuracy, loss = evaluate(passed, source.test, bank, images=images)
    values = torch.where(loss.isfinite(), accuracy, float("nan")).tolist()
    return dict(zip(bank.cells, values, strict=True))


def stitch_bank(
    receiver: Receiver, source: Source, cells: Sequence[Cell], kernel: str, rules: Rules = DEFAULT_RULES
) -> StitchBank:
    """The stitches of a group at their initial values, in the receiver's dtype."""
    return StitchBank(
        cells,
        source.shapes,
        [position.rows for position in receiver.positions],
        dtype=receiver.dtype,
        device=receiver.device,
        kernel=kernel,
        rules=rules,
    )


def _load(bank: StitchBank, matched: Mapping[Cell, Matched]) -> None:
    bank.load({cell: (stitch.weight_FD, stitch.bias_D) for cell, stitch in matched.items()})


def group_results(
    receiver: FrozenReceiver,
    source: Source,
    bank: StitchBank,
    train_loss: Tensor,
    matched: Mapping[Cell, Matched],
    *,
    images: int,
) -> dict[Cell, CellResult]:
    """Evaluate the bank's stitches on the whole test set, so many images at a time."""
    accuracy, loss = evaluate(receiver, source.test, bank, images=images)
    finite = (bank.finite() & loss.isfinite() & train_loss.isfinite()).tolist()
    stitches = bank.stitches()
    return {
        cell: CellResult(
            accuracy[k].item() if finite[k] else float("nan"),
            loss[k].item() if finite[k] else float("nan"),
            train_loss[k].item(),
            Status.DONE if finite[k] else Status.DIVERGED,
            *stitches[cell],
            matched[cell].error if cell in matched else float("nan"),
            receiver.statistics(k),
        )
        for k, cell in enumerate(bank.cells)
    }


def _train(
    receiver: FrozenReceiver,
    split: SourceSplit,
    bank: StitchBank,
    recipe: TrainingRecipe,
    order: ImageOrder,
    preconditioner: Preconditioner | None,
    report: Report,
) -> Tensor:
    """Train in place; return the mean loss of each cell over the last epoch (K,), on the device."""
    cascade = Cascade(receiver, bank.counts, recipe.batch_size)
    optimizer = stitch_optimizer(bank, recipe)
    return train_epochs(
        bank,
        recipe,
        len(split),
        lambda epoch: split.shuffled(order, epoch, recipe.batch_size, augment=recipe.augment),
        RecordedStep(lambda batch: train_step(cascade, bank, batch, optimizer, preconditioner), receiver.device),
        optimizer,
        report,
    )


def train_epochs(
    bank: StitchBank,
    recipe: TrainingRecipe,
    images: int,
    batches: Callable[[int], Iterable[Drawn]],
    step: Callable[[Drawn], Tensor],
    optimizer: torch.optim.Optimizer,
    report: Report,
) -> Tensor:
    """Train a bank in place on so many images, whatever the loss; return its mean over the last epoch begun (K,).

    ``batches(epoch)`` draws an epoch, ``step`` updates the bank on what was drawn, by ``optimizer``, and returns the
    losses (K,). Raises ConfigError when there are fewer images than one batch.
    """
    steps_per_epoch = images // recipe.batch_size
    if steps_per_epoch == 0:
        raise ConfigError(
            f"{images} training images are fewer than one batch of {recipe.batch_size} images: "
            f"use {argument('batch_size', images)} or less"
        )
    schedule = stitch_schedule(recipe.name, peak=recipe.lr, epochs=recipe.epochs, steps_per_epoch=steps_per_epoch)
    cells = len(bank.cells)
    loss_sum = torch.zeros(cells, dtype=bank.parameters.dtype, device=bank.parameters.device)
    done = 0
    for epoch in range(math.ceil(schedule.steps / steps_per_epoch)):
        loss_sum.zero_()
        begun = done
        for drawn in islice(batches(epoch), schedule.steps - done):
            set_rate(optimizer, schedule.rate(done))
            loss_sum += step(drawn)
            done += 1
            report(Progress(cells * done / schedule.steps, cells, "cells"))
    bank.refresh()
    return loss_sum / (done - begun)


def stitch_optimizer(bank: StitchBank, recipe: TrainingRecipe) -> torch.optim.SGD:
    """SGD over all parameters of a bank, in one pass over them. On CUDA its learning rate is a tensor there."""
    device = bank.parameters.device
    return torch.optim.SGD(
        [bank.parameters],
        lr=torch.tensor(recipe.lr, device=device) if device.type == "cuda" else recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Change the learning rate, in place where it is a tensor: a recorded step reads it there."""
    (group,) = optimizer.param_groups
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def train_step(
    cascade: Cascade,
    bank: StitchBank,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    preconditioner: Preconditioner | None = None,
) -> Tensor:
    """One step of all stitches on a batch: forward, backward, update. Returns the losses (K,)."""
    bank.refresh()
    logits = cascade.forward(lambda j, out: bank.forward(j, batch, out))
    loss, g_logits = cross_entropy(logits, batch.labels)
    for j, g in cascade.backward(g_logits):
        bank.backward(j, batch, g)
    if preconditioner is not None:
        preconditioner.apply()
    optimizer.step()
    return loss


def evaluate(receiver: FrozenReceiver, split: SourceSplit, bank: StitchBank, *, images: int) -> tuple[Tensor, Tensor]:
    """Accuracy and mean loss of every cell over the whole split (K,), in fp64, so many images at a time."""
    correct = torch.zeros(len(bank.cells), dtype=torch.float64, device=receiver.device)
    loss_sum = torch.zeros_like(correct)
    cascade: Cascade | None = None
    for batch in split.in_order(images):
        if cascade is None or cascade.images != len(batch):
            cascade = Cascade(receiver, bank.counts, len(batch))
        logits = cascade.infer(lambda j, out, batch=batch: bank.forward(j, batch, out))  # type: ignore[misc]
        correct += (logits.argmax(-1) == batch.labels).sum(-1)
        loss_sum += cross_entropy(logits, batch.labels)[0].double() * len(batch)
    return correct / len(split), loss_sum / len(split)
