"""The preconditioned optimizer is SGD on stitches of centred and whitened inputs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsitch
from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.ordered_split import ResidentSplitInOrder
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.data import Dataset
from fastsitch.errors import ConfigError
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.runs.sweep_config import SweepConfig
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.engine import train_group
from fastsitch.stitching.matching import match
from fastsitch.stitching.preconditioner import DAMPING
from fastsitch.stitching.recipe import TrainingRecipe
from fastsitch.stitching.stitch_schedule import stitch_schedule
from fastsitch.vocabulary import Status
from tests.test_matching import IMAGES, KINDS, UNIT, Pair, moments_of

CPU = torch.device("cpu")
ORDER = ImageOrder(seed=0, block=8, window=32)
RECIPE = TrainingRecipe(
    name="small", epochs=1, batch_size=50, lr=0.08, momentum=0.9, weight_decay=0.0, optimizer="preconditioned"
)


@pytest.fixture(scope="module")
def pair(fashion: Dataset) -> Pair:
    return Pair(fashion)


def whitened_sgd(pair: Pair, cell: tuple[int, int], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (F, D) and bias (D,) after an epoch of plain SGD on V and c of y = (x - m) L V + c, with P = L L'."""
    matched, geometry, receiver = pair.matched[cell], pair.moments[cell].geometry, pair.chains[1]
    inputs = matched.inputs
    covariance = inputs.scatter_FF / inputs.rows
    inverse = torch.linalg.inv(covariance / covariance.diagonal().mean() + DAMPING * torch.eye(len(covariance)))
    factor = torch.linalg.cholesky(inverse)
    v = nn.Parameter(torch.linalg.solve(factor, matched.weight_FD))
    c = nn.Parameter(matched.bias_D + inputs.mean_F @ matched.weight_FD)
    optimizer = torch.optim.SGD([v, c], lr=0.0, momentum=RECIPE.momentum)
    steps = len(labels) // RECIPE.batch_size
    schedule = stitch_schedule("small", peak=RECIPE.lr, epochs=1, steps_per_epoch=steps)
    channels = geometry.sender[0]
    for step, index in enumerate(ORDER.epoch(0, len(labels)).split(RECIPE.batch_size)):
        with torch.no_grad():
            x = pair.chains[0].representations(images[index])[cell[0]]
        with torch.enable_grad():
            weight = factor @ v
            bias = c - inputs.mean_F @ weight
            kernel = weight.T.unflatten(1, (geometry.down, geometry.down, channels)).permute(0, 3, 1, 2)
            y = F.conv2d(x, kernel, bias, stride=geometry.down)
            y = F.interpolate(y, scale_factor=geometry.up, mode="nearest")
            optimizer.zero_grad()
            F.cross_entropy(receiver.tail(y, cell[1]), labels[index]).backward()
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        optimizer.step()
    weight = factor @ v.detach()
    return weight, c.detach() - inputs.mean_F @ weight


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_sgd_in_whitened_inputs(kind: str, pair: Pair, fashion: Dataset) -> None:
    i, j = KINDS[kind]
    images = fashion.normalisation.apply(fashion.train.images[:150], torch.float64)
    weight, bias = whitened_sgd(pair, (i, j), images, fashion.train.labels[:150])
    model = FrozenNetwork(pair.chains[1], dtype=torch.float64, device=CPU)
    cell = Cell(UNIT, i, j)
    with torch.no_grad():
        result = train_group(model, pair.sender, [cell], RECIPE, ORDER, init={cell: pair.matched[i, j]})[cell]
    start = pair.matched[i, j]
    assert (weight - start.weight_FD).abs().max() > 1e-4
    torch.testing.assert_close(result.weight_FD, weight, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(result.bias_D, bias, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@torch.no_grad()
def test_a_group_trains_like_its_cells_alone(pair: Pair) -> None:
    """For all cells, also of two units that share inputs in one group."""
    model = FrozenNetwork(pair.chains[1], dtype=torch.float64, device=CPU)
    units = [UNIT, replace(UNIT, seed=1)]
    start = {Cell(unit, *positions): stitch for unit in units for positions, stitch in pair.matched.items()}
    recipe = replace(RECIPE, weight_decay=0.01)
    together = train_group(model, pair.sender, list(start), recipe, ORDER, init=start)
    for positions in pair.matched:
        cell = Cell(units[1], *positions)
        alone = train_group(model, pair.sender, [cell], recipe, ORDER, init=start)[cell]
        torch.testing.assert_close(together[cell].weight_FD, alone.weight_FD, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together[Cell(UNIT, *positions)].weight_FD, alone.weight_FD, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_inputs_that_are_not_finite_affect_only_their_cells(pair: Pair) -> None:
    ordered, labels = ResidentSplitInOrder(pair.sender), pair.sender.train.labels
    spoilt = [ordered.images(i, 0, IMAGES).permute(0, 3, 1, 2).clone() for i in range(5)]
    spoilt[2][7, 1, 3, 3] = float("nan")
    sender = ResidentSource.from_tensors(spoilt, spoilt, labels, labels)
    matched = match(moments_of(sender, pair.receiver))
    start = {Cell(UNIT, *positions): stitch for positions, stitch in matched.items()}
    model = FrozenNetwork(pair.chains[1], dtype=torch.float64, device=CPU)
    results = train_group(model, sender, list(start), RECIPE, ORDER, init=start)
    for cell, result in results.items():
        assert result.status == (Status.DIVERGED if cell.i == 2 else Status.DONE)


def test_preconditioning_needs_a_matched_start() -> None:
    for options in ({}, {"loss": "match"}):
        with pytest.raises(ConfigError, match="add init='matched'"):
            fashion_config(optimizer="preconditioned", **options)
    with pytest.raises(ConfigError, match="optimizer='adam': expected one of sgd, preconditioned"):
        fashion_config(optimizer="adam")
    assert fashion_config(init="matched", optimizer="preconditioned").recipe.lr == 0.08
    assert fashion_config(init="matched", optimizer="preconditioned", lr=0.5).recipe.lr == 0.5
    assert fashion_config().recipe.lr == 0.01


def fashion_config(**options: str | float) -> SweepConfig:
    return fastsitch.configure_sweep("R1111", "R1111", dataset="fashion-mini", **options)
