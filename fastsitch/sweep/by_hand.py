"""Stitching two chains that are at hand: no root, no checkpoints, no stores."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsitch.activations.live import LiveSource, LiveSplit, LiveSplitInOrder
from fastsitch.activations.order import ImageOrder
from fastsitch.data import Dataset, Normalisation, Transform
from fastsitch.errors import ConfigError, NetworkError
from fastsitch.machine import (
    DTYPES,
    available_memory,
    configure,
    resolve_device,
    resolve_kernel,
    resolve_precision,
)
from fastsitch.networks.chain import Chain
from fastsitch.networks.frozen import FrozenNetwork
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import CellResult, evaluate_matched, train_group
from fastsitch.stitching.geometry import Rules
from fastsitch.stitching.matching import match
from fastsitch.stitching.moments import SenderMoments, pair_moments
from fastsitch.sweep.config import LOSSES, stitch_recipe
from fastsitch.sweep.groups import train_in_groups
from fastsitch.sweep.memory import StepKind, largest_group
from fastsitch.sweep.plan import unit_cells

_MEMORY_SHARE = 0.25
"""Of the free memory, what a group may take by the model of the small ResNets: other networks keep more."""

Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StitchedPair:
    """All stitches from one network into another; matrices have a row per sender and a column per receiver position."""

    sender_positions: tuple[str, ...]
    receiver_positions: tuple[str, ...]
    accuracy: Matrix
    """Of the stitched networks on the whole test set; NaN where a stitch diverged."""
    loss: Matrix
    train_loss: Matrix
    matched_error: Matrix
    """Mean squared error to the expected representation, where stitches are matched."""
    status: NDArray[np.int8]
    """1 done, 2 diverged."""
    stitches: Mapping[tuple[int, int], tuple[Tensor, Tensor]]
    """Weight (F, D), features ordered (ky, kx, c), and bias (D,) of every cell (i, j), on the CPU."""


@torch.no_grad()
def stitch(
    sender: Chain,
    receiver: Chain,
    dataset: Dataset,
    *,
    loss: str = "task",
    recipe: str = "small",
    epochs: float | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    sender_normalisation: Normalisation | None = None,
    receiver_normalisation: Normalisation | None = None,
    resample: str = "none",
    class_token: str = "sender",
    precision: str = "auto",
    group_size: int | None = None,
    device: str = "auto",
) -> StitchedPair:
    """Train the stitch from every position of one chain into every position of another, as one batch.

    Both are frozen: copies in eval mode are used, the chains stay as they are. Each sees the images of ``dataset``
    resized to its own input size, normalised by its own mean and standard deviation or by those of the data. ``loss``
    is ``task``, or ``match`` for matched stitches, which are computed and not trained; the other options, among
    them the rules ``resample`` and ``class_token`` for representations of different kinds, are those of
    :func:`fastsitch.sweep`. The sender runs again for every batch. ``group_size`` cells share a batch (None: as many as
    memory holds, by a model of the small ResNets). Raises ConfigError, or NetworkError where a chain does not fit the
    data.
    """
    if loss not in LOSSES:
        raise ConfigError(f"loss {loss!r}: expected one of {', '.join(LOSSES)}")
    if group_size is not None and group_size < 1:
        raise ConfigError(f"group_size {group_size}: expected a number from 1, or None")
    chosen = stitch_recipe(recipe, epochs=epochs, lr=lr, batch_size=batch_size)
    torch_device = resolve_device(device)
    configure(torch_device)
    kernel = resolve_kernel("auto", torch_device)
    rules = Rules(resample=resample, class_token=class_token)
    precision = resolve_precision(precision, torch_device)
    dtype = DTYPES[precision]
    frozen = FrozenNetwork(receiver, dtype=dtype, device=torch_device)
    _require_fit(sender, frozen, receiver.input_shape, dataset)
    provider = FrozenNetwork(sender, dtype=dtype, device=torch_device)
    transform = Transform(sender_normalisation or dataset.normalisation, sender.input_shape[1:])
    train, test = (LiveSplit(provider, transform, x, stored=dtype, dtype=dtype) for x in (dataset.train, dataset.test))
    source = LiveSource(train, test)
    shapes = [[position.rows for position in chain.positions] for chain in (sender, receiver)]
    unit = Unit(sender="sender", receiver="receiver", setting="T2T", loss=loss, seed=seed)
    cells = unit_cells(unit, *(range(len(own)) for own in shapes))
    if group_size is None:
        kind = StepKind.of(torch_device, precision, kernel, "off", chosen.batch_size, rules=rules)
        room = int(_MEMORY_SHARE * available_memory(torch_device))
        group_size = largest_group([(shapes[0], shapes[1], [(cell.i, cell.j) for cell in cells])], kind, room)

    if loss == "match":
        own = Transform(receiver_normalisation or dataset.normalisation, receiver.input_shape[1:])
        expected = LiveSplitInOrder(LiveSplit(frozen, own, dataset.train, stored=dtype, dtype=dtype))
        matched = match(pair_moments(SenderMoments(LiveSplitInOrder(train), rules), expected))

        def work(group: list[Cell]) -> dict[Cell, CellResult]:
            stitches = {cell: matched[cell.i, cell.j] for cell in group}
            return evaluate_matched(frozen, source, stitches, images=2 * chosen.batch_size, kernel=kernel, rules=rules)

    else:

        def work(group: list[Cell]) -> dict[Cell, CellResult]:
            return train_group(frozen, source, group, chosen, ImageOrder(seed=seed), kernel=kernel, rules=rules)

    results, _ = train_in_groups(cells, group_size, work)
    return _collected(sender, receiver, results)


def _require_fit(sender: Chain, receiver: FrozenNetwork, images: tuple[int, int, int], dataset: Dataset) -> None:
    """Raise NetworkError where the chains do not take the data's images, or the receiver gives no logits for them."""
    channels = dataset.input_shape[0]
    for role, shape in (("sender", sender.input_shape), ("receiver", images)):
        if shape[0] != channels:
            raise NetworkError(
                f"the {role} takes images of {shape[0]} channels, {dataset.name} has {channels}: put a layer in front "
                "of it that makes them fit"
            )
    last = receiver.representations(torch.zeros(2, *images, device=receiver.device))[-1]
    logits = receiver.tail(last, len(receiver.positions) - 1)
    if logits.dim() != 2 or logits.shape[1] < dataset.classes:
        raise NetworkError(
            f"the receiver ends in {tuple(logits.shape[1:])} per image: expected logits (classes,) for the "
            f"{dataset.classes} classes of {dataset.name}"
        )


def _collected(sender: Chain, receiver: Chain, results: Mapping[Cell, CellResult]) -> StitchedPair:
    def matrix(metric: str) -> Matrix:
        values = np.full((len(sender.positions), len(receiver.positions)), np.nan)
        for cell, result in results.items():
            values[cell.i, cell.j] = getattr(result, metric)
        return values

    return StitchedPair(
        sender_positions=tuple(position.name for position in sender.positions),
        receiver_positions=tuple(position.name for position in receiver.positions),
        accuracy=matrix("accuracy"),
        loss=matrix("loss"),
        train_loss=matrix("train_loss"),
        matched_error=matrix("matched_error"),
        status=matrix("status").astype(np.int8),
        stitches={(cell.i, cell.j): (own.weight_FD, own.bias_D) for cell, own in results.items()},
    )
