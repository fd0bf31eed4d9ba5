"""In which order images come, at which learning rates, and when training ends."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastsitch.activations.image_order import ImageOrder
from fastsitch.data import Dataset
from fastsitch.learning_rate import Schedule
from fastsitch.stitching.cascade import Cascade
from fastsitch.stitching.engine import stitch_bank, stitch_optimizer, train_group, train_step
from fastsitch.stitching.stitch_schedule import stitch_schedule
from fastsitch.vocabulary import Descent
from tests.conftest import network
from tests.test_engine import ORDER, RECIPE, all_cells, frozen, source_of


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    order = ImageOrder(seed=3, block=16, window=64)
    permutation = order.epoch(0, 1000)
    assert torch.equal(permutation.sort().values, torch.arange(1000))
    assert torch.equal(permutation, ImageOrder(seed=3, block=16, window=64).epoch(0, 1000))
    assert not torch.equal(permutation, order.epoch(1, 1000))
    assert not torch.equal(permutation, ImageOrder(seed=4, block=16, window=64).epoch(0, 1000))
    # a window of 64 images comes from few blocks of 16, which is what lets a store be read in chunks
    blocks = {int(k) // 16 for k in permutation[64:128]}
    assert len(blocks) <= 6


@pytest.mark.parametrize(
    ("recipe", "epochs", "expected"),
    [
        ("paper", 4, {0: 0.001, 9: 0.01, 10: 0.01, 25: 0.005, 39: 0.01 * 0.5 * (1 + math.cos(math.pi * 29 / 30))}),
        ("small", 2, {0: 0.005, 1: 0.01, 11: 0.005}),
        ("small", 0.5, {0: 0.01, 3: 0.005}),
        ("published-schedule", 4, {0: 0.0001, 39: 0.004}),
    ],
)
def test_learning_rates(recipe: str, epochs: float, expected: dict[int, float]) -> None:
    schedule = stitch_schedule(recipe, peak=0.01, epochs=epochs, steps_per_epoch=10)
    for step, rate in expected.items():
        assert schedule.rate(step) == pytest.approx(rate)


@pytest.mark.parametrize("descent", ["cosine", "linear"])
def test_both_descents_start_at_the_peak_and_end_at_0(descent: Descent) -> None:
    schedule = Schedule(peak=0.2, steps=28, warmup=8, decay_end=28, descent=descent)
    assert [schedule.rate(step) for step in (0, 7, 8)] == [0.2 / 8, 0.2, 0.2]
    assert schedule.rate(18) == pytest.approx(0.1)
    quarter = {"cosine": 0.1 * (1 + math.cos(math.pi / 4)), "linear": 0.15}[descent]
    assert schedule.rate(13) == pytest.approx(quarter)
    assert schedule.rate(28) == 0
    # in the precision of the weights, descents counted from the end are the same numbers
    for step in range(8, 28):
        left = 1 - (step - 8) / 20
        rate = 0.2 * left if descent == "linear" else 0.2 * 0.5 * (1 - math.cos(math.pi * left))
        assert np.float32(schedule.rate(step)) == np.float32(rate)


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 3), (1.5, 9), (0.01, 1)])
def test_a_fractional_number_of_epochs_ends_within_one(epochs: float, steps: int, fashion: Dataset) -> None:
    """As a plain loop over the first steps of each epoch's order; the loss is that of the last epoch's steps."""
    chain = network("R1111")
    source, model = source_of(chain, fashion, train=48), frozen(chain)
    cells, recipe, reports = all_cells(chain, chain), replace(RECIPE, epochs=epochs), []
    results = train_group(model, source, cells, recipe, ORDER, report=reports.append)
    done = [len(cells) * (step + 1) / steps for step in range(steps)]
    assert [(report.done, report.total) for report in reports] == [(cells_done, len(cells)) for cells_done in done]

    bank = stitch_bank(model, source, cells, "torch")
    cascade, optimizer = Cascade(model, bank.counts, recipe.batch_size), stitch_optimizer(bank, recipe)
    schedule = stitch_schedule("small", peak=recipe.lr, epochs=steps / 6, steps_per_epoch=6)
    index = torch.cat([ORDER.epoch(epoch, 48) for epoch in range(2)]).split(recipe.batch_size)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        losses.append(train_step(cascade, bank, source.train.batch(index[step]), optimizer))
    bank.refresh()
    mean = torch.stack(losses[6 * ((steps - 1) // 6) :]).mean(0)
    for k, cell in enumerate(bank.cells):
        for trained, plain in zip((results[cell].weight_FD, results[cell].bias_D), bank.stitches()[cell], strict=True):
            torch.testing.assert_close(trained, plain, rtol=0, atol=1e-12)
        assert results[cell].train_loss == pytest.approx(mean[k].item())
