"""Stitching two chains that are at hand: no root, no checkpoints, no stores."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.live_source import LiveSource, LiveSplit, LiveSplitInOrder
from fastsitch.chains.chain import Chain
from fastsitch.chains.vet_chain import require_gradients, vet_chain
from fastsitch.data import Dataset, Normalisation, Transform
from fastsitch.errors import NetworkError, argument
from fastsitch.machine import (
    DTYPES,
    available_memory,
    configure,
    resolve_device,
    resolve_kernel,
    resolve_precision,
)
from fastsitch.networks.resnet import SmallResNet
from fastsitch.planning.group_memory import Pair, StepKind, largest_group
from fastsitch.progress import Report, ignore
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.receivers.graph_segment import segment_costs, use_graphs
from fastsitch.receivers.working_precision import working_network
from fastsitch.runs.sweep_config import SweepPrecision
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell, Unit, unit_cells
from fastsitch.stitching.geometry import Rules
from fastsitch.stitching.matching import match
from fastsitch.stitching.moments import SenderMoments, pair_moments
from fastsitch.stitching.recipe import stitch_recipe
from fastsitch.stitching.train_groups import StitchWork, train_in_groups
from fastsitch.vocabulary import ClassToken, Loss, Resample, StitchRecipe, require_choice, require_whole

_MEMORY_SHARE = 0.25
"""Of the free memory, what a group may take by the formula of the small ResNets: other networks keep more."""

Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StitchedPair:
    """All stitches from one network into another; matrices have a row per sender and a column per receiver position.

    Attributes:
        sender_positions: names of the rows.
        receiver_positions: names of the columns.
        accuracy: of the stitched networks on the whole test set, 0 to 1; NaN where a stitch diverged.
        loss: cross-entropy on the whole test set.
        train_loss: mean of the loss over the last training epoch.
        matched_error: mean squared error to the expected representation, where stitches are matched.
        status: 1 done, 2 diverged.
        stitches: weight (F, D), features ordered (ky, kx, c), and bias (D,) of every cell (i, j), on the CPU.
    """

    sender_positions: tuple[str, ...]
    receiver_positions: tuple[str, ...]
    accuracy: Matrix
    loss: Matrix
    train_loss: Matrix
    matched_error: Matrix
    status: NDArray[np.int8]
    stitches: Mapping[tuple[int, int], tuple[Tensor, Tensor]]


@torch.no_grad()
def stitch(
    sender: Chain,
    receiver: Chain,
    dataset: Dataset,
    *,
    loss: Loss = "task",
    recipe: StitchRecipe = "small",
    epochs: float | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    sender_normalisation: Normalisation | None = None,
    receiver_normalisation: Normalisation | None = None,
    resample: Resample = "none",
    class_token: ClassToken = "sender",
    precision: SweepPrecision = "auto",
    group_size: int | None = None,
    device: str = "auto",
    report: Report = ignore,
) -> StitchedPair:
    """Train the stitch from every position of one chain into every position of another, as one batch.

    Nothing is read or written: no root, checkpoints or stores. Both chains are frozen, copies in eval mode are used,
    and the chains stay as they are. Each sees the images resized to its own input size. The sender runs again for
    every batch.

    Args:
        sender: the network that provides representations.
        receiver: the network that the stitches lead into; it ends in logits (B, classes).
        dataset: training and test images.
        loss: ``task``, or ``match`` for matched stitches, which are computed and not trained.
        recipe: how stitches are trained; ``epochs``, ``lr`` and ``batch_size`` differ from it where they are given.
        seed: of the initial stitches and the order of images.
        sender_normalisation: mean and standard deviation of the sender's inputs; None: those of the data set.
        receiver_normalisation: the same of the receiver.
        resample: how grids whose sizes are no multiples of each other are joined.
        class_token: what becomes the class token of a receiver that has one.
        precision: ``auto``, ``bf16`` or ``fp32``.
        group_size: cells that share a batch; None: as many as memory holds.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        report: gets the cells done.

    Returns:
        Matrices with a row per sender position and a column per receiver position, and the stitches.

    Raises:
        ConfigError: an option that cannot work.
        NetworkError: a chain does not fit the data.
    """
    require_choice("loss", loss, Loss)
    if group_size is not None:
        require_whole("group_size", group_size)
    require_whole("seed", seed, 0)
    chosen = stitch_recipe(recipe, epochs=epochs, lr=lr, batch_size=batch_size)
    torch_device = resolve_device(device)
    configure(torch_device)
    kernel, rules = resolve_kernel("auto", torch_device), Rules(resample=resample, class_token=class_token)
    compute = resolve_precision(precision, torch_device)
    dtype = DTYPES[compute]
    vet_chain(sender, "the sender")
    vet_chain(receiver, "the receiver")
    if loss == "task":
        require_gradients(receiver, range(len(receiver.positions)), "the receiver")
    way_out = f"use {argument('precision', 'fp32')}"
    back = 0 if loss == "task" else None
    frozen = working_network(receiver, "the receiver", way_out, dtype=dtype, device=torch_device, gradients_to=back)
    _require_fit(sender, frozen, receiver.input_shape, dataset)
    if loss == "task":
        use_graphs(frozen, receiver)
    provider = working_network(sender, "the sender", way_out, dtype=dtype, device=torch_device)
    transform = _transform(sender, sender_normalisation, dataset)
    train, test = (LiveSplit(provider, transform, x, stored=dtype, dtype=dtype) for x in (dataset.train, dataset.test))
    shapes = [[position.rows for position in chain.positions] for chain in (sender, receiver)]
    unit = Unit(sender="sender", receiver="receiver", setting="T2T", loss=loss, seed=seed)
    cells = unit_cells(unit, range(len(shapes[0])), range(len(shapes[1])))
    if group_size is None:
        step = StepKind.of(torch_device, compute, kernel, "off", chosen.batch_size, rules=rules)
        budget = int(_MEMORY_SHARE * available_memory(torch_device))
        segments = segment_costs(frozen) if loss == "task" and not isinstance(receiver, SmallResNet) else None
        pair = Pair(shapes[0], shapes[1], [(cell.i, cell.j) for cell in cells], segments)
        group_size = largest_group([pair], step, budget)
    order = ImageOrder(seed=seed)
    source = LiveSource(train, test)
    stitches = StitchWork(receiver=frozen, source=source, recipe=chosen, order=order, kernel=kernel, rules=rules)
    work = stitches.train()
    if loss == "match":
        seen = _transform(receiver, receiver_normalisation, dataset)
        expected = LiveSplitInOrder(LiveSplit(frozen, seen, dataset.train, stored=dtype, dtype=dtype))
        matched = match(pair_moments(SenderMoments(LiveSplitInOrder(train), rules), expected))
        work = stitches.evaluate({cell: matched[cell.i, cell.j] for cell in cells})
    results, _ = train_in_groups(cells, group_size, work, report)
    return _collected(sender, receiver, results)


def _transform(chain: Chain, normalisation: Normalisation | None, dataset: Dataset) -> Transform:
    channels, height, width = chain.input_shape
    return Transform(normalisation or dataset.normalisation_for(channels), (height, width), grey=channels == 1)


def _require_fit(sender: Chain, receiver: FrozenNetwork, images: tuple[int, int, int], dataset: Dataset) -> None:
    """Raise NetworkError where the chains do not take the data's images, or the receiver gives no logits for them."""
    channels = dataset.channels
    for role, shape in (("sender", sender.input_shape), ("receiver", images)):
        if shape[0] not in (1, channels):
            raise NetworkError(
                f"the {role} takes images of {shape[0]} channels, {dataset.name} has {channels}: put a layer in front "
                "of it that makes them fit"
            )
    last = receiver.representations(torch.zeros(2, *images, device=receiver.device))[-1]
    logits = receiver.tail(last, len(receiver.positions) - 1)
    if logits.dim() != 2 or logits.shape[1] < dataset.classes:
        raise NetworkError(
            f"the receiver ends in {tuple(logits.shape[1:])} per image: expected logits (classes,) for the "
            f"{dataset.classes} classes of {dataset.name}; put a linear layer on its features that was fitted to them"
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
        stitches={(cell.i, cell.j): (result.weight_FD, result.bias_D) for cell, result in results.items()},
    )
