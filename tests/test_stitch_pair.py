"""fastsitch.stitch: two chains in memory, without a root; the engine's results, also for custom networks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastsitch
from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.live_source import LiveSource, LiveSplit
from fastsitch.chains.chain import Chain
from fastsitch.data import Dataset, Normalisation, Split, Transform
from fastsitch.errors import ConfigError, FastsitchError, NetworkError
from fastsitch.identity import torch_generator
from fastsitch.kernels.reference import conv_weight
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import train_group
from fastsitch.stitching.recipe import stitch_recipe
from tests.conftest import network
from tests.test_engine import frozen

UNIT = Unit(sender="sender", receiver="receiver", setting="T2T", loss="task", seed=5)
OPTIONS = {"recipe": "small", "epochs": 1, "batch_size": 16, "precision": "fp64"}


@pytest.fixture(scope="module")
def few(fashion: Dataset) -> Dataset:
    """96 + 50 real images."""
    splits = (
        Split(split.images[:count], split.labels[:count]) for split, count in ((fashion.train, 96), (fashion.test, 50))
    )
    return Dataset("few", *splits, 10)


def plain(side: int, seed: int, classes: int = 10, channels: int = 3) -> Chain:
    """A network of ordinary modules, with dropout and BatchNorm that would differ in training mode."""
    generator = torch_generator("plain chain", seed)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(channels, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.GELU(), nn.Dropout(0.5)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)),
    )
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.4, 0.4, generator=generator)
    return Chain.from_module(model.double(), torch.zeros(1, channels, side, side))


def test_it_gives_the_engines_results_on_live_representations(few: Dataset) -> None:
    sender, receiver = network("R1111"), network("R1112", seed=1)
    pair = fastsitch.stitch(sender, receiver, few, seed=5, **OPTIONS)
    transform = Transform(few.normalisation)
    splits = (
        LiveSplit(frozen(sender), transform, split, stored=torch.float64, dtype=torch.float64)
        for split in (few.train, few.test)
    )
    cells = [Cell(UNIT, i, j) for j in range(6) for i in range(5)]
    recipe = stitch_recipe("small", epochs=1, batch_size=16)
    wanted = train_group(frozen(receiver), LiveSource(*splits), cells, recipe, ImageOrder(seed=5))
    assert pair.accuracy.shape == (5, 6)
    assert pair.sender_positions == ("stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0")
    assert (pair.status == 1).all()
    for cell, result in wanted.items():
        assert pair.accuracy[cell.i, cell.j] == result.accuracy
        assert pair.loss[cell.i, cell.j] == result.loss
        assert torch.equal(pair.stitches[cell.i, cell.j][0], result.weight_FD)


@pytest.mark.parametrize("group_size", [1, 3])
def test_groups_of_any_size_give_the_same_matrix(group_size: int, few: Dataset) -> None:
    sender, receiver = plain(32, 0), plain(32, 1)
    whole = fastsitch.stitch(sender, receiver, few, **OPTIONS)
    parts = fastsitch.stitch(sender, receiver, few, group_size=group_size, **OPTIONS)
    for metric in ("accuracy", "loss", "train_loss"):
        np.testing.assert_allclose(getattr(parts, metric), getattr(whole, metric), rtol=1e-10)


def test_the_stitched_network_of_plain_modules_has_the_accuracy_of_the_matrix(few: Dataset) -> None:
    """Two input sizes, two normalisations, training mode on; the chains are left as they were."""
    sender, receiver = plain(64, 0).train(), plain(32, 1).train()
    before = {name: tensor.clone() for name, tensor in [*sender.state_dict().items(), *receiver.state_dict().items()]}
    normalisation = Normalisation((0.5, 0.4, 0.6), (0.3, 0.2, 0.25))
    pair = fastsitch.stitch(sender, receiver, few, sender_normalisation=normalisation, **OPTIONS)
    assert sender.training
    assert all(module.training for chain in (sender, receiver) for module in chain.modules())
    after = dict([*sender.state_dict().items(), *receiver.state_dict().items()])
    assert all(torch.equal(before[name], after[name]) for name in before)
    x = Transform(normalisation, (64, 64)).apply(few.test.images).double()
    assert pair.accuracy.shape == (2, 2)
    for i, j in ((0, 0), (1, 0), (0, 1), (1, 1)):
        logits = stitched(sender.eval(), receiver.eval(), x, pair.stitches[i, j], i, j)
        assert (logits.argmax(-1) == few.test.labels).double().mean().item() == pair.accuracy[i, j]
        assert nn.functional.cross_entropy(logits, few.test.labels).item() == pytest.approx(pair.loss[i, j], rel=1e-9)


def stitched(sender: Chain, receiver: Chain, x: Tensor, stitch: tuple[Tensor, Tensor], i: int, j: int) -> Tensor:
    with torch.no_grad():
        provided = sender.representations(x)[i]
        down = max(1, provided.shape[2] // receiver.positions[j].shape[1])
        weight, bias = stitch
        return receiver.tail(nn.functional.conv2d(provided, conv_weight(weight, down), bias, stride=down), j)


def test_a_network_matched_to_itself_keeps_its_accuracy(few: Dataset) -> None:
    chain = plain(32, 0)
    pair = fastsitch.stitch(chain, chain, few, loss="match", **OPTIONS)
    with torch.no_grad():
        logits = chain.eval()(few.normalisation.apply(few.test.images).double())
    accuracy = (logits.argmax(-1) == few.test.labels).double().mean().item()
    for p in range(2):
        assert pair.accuracy[p, p] == accuracy
        assert pair.matched_error[p, p] < 1e-12
    assert pair.matched_error[0, 1] > 1e-6
    assert pair.matched_error[1, 0] > 1e-6


def test_matched_networks_may_differ_in_resolution_and_normalisation(few: Dataset) -> None:
    normalisation = Normalisation((0.5, 0.4, 0.6), (0.3, 0.2, 0.25))
    sender, receiver = plain(64, 0), plain(32, 1)
    pair = fastsitch.stitch(sender, receiver, few, loss="match", receiver_normalisation=normalisation, **OPTIONS)
    with torch.no_grad():
        x = sender.eval().representations(Transform(few.normalisation, (64, 64)).apply(few.train.images).double())[1]
        y = receiver.eval().representations(Transform(normalisation).apply(few.train.images).double())[0]
    rows, target = (part.permute(0, 2, 3, 1).flatten(0, 2) for part in (x, y))
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
    best = rows @ torch.linalg.lstsq(rows, target, driver="gelsd").solution
    assert pair.matched_error[1, 0] == pytest.approx((best - target).square().mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "other"}, "loss='other': expected one of task, match"),
        ({"group_size": 0}, "group_size=0: expected a whole number from 1"),
        ({"recipe": "large"}, "recipe='large': expected one of paper, small"),
        ({"epochs": 0}, "epochs=0: expected a number above 0"),
        ({"batch_size": 97}, "96 training images are fewer than one batch of 97 images"),
    ],
)
def test_options_that_cannot_work_are_refused(change: dict[str, object], message: str, few: Dataset) -> None:
    with pytest.raises(ConfigError, match=message):
        fastsitch.stitch(plain(32, 0), plain(32, 1), few, **{**OPTIONS, **change})


def test_networks_that_do_not_fit_the_data_are_refused(few: Dataset) -> None:
    with pytest.raises(NetworkError, match="the sender takes images of 2 channels, few has 3"):
        fastsitch.stitch(plain(32, 0, channels=2), plain(32, 1), few, **OPTIONS)
    with pytest.raises(NetworkError, match=r"the receiver ends in \(7,\) per image: expected logits .* 10 classes"):
        fastsitch.stitch(plain(32, 0), plain(32, 1, classes=7), few, **OPTIONS)
    with pytest.raises(FastsitchError, match="no stitch from 24x24 to 16x16"):
        fastsitch.stitch(plain(48, 0), plain(32, 1), few, **OPTIONS)
    # the sender's classifier is not used
    assert (fastsitch.stitch(plain(32, 0, classes=2), plain(32, 1), few, **OPTIONS).status == 1).all()


def test_new_views_in_every_epoch(few: Dataset) -> None:
    sender, receiver = plain(32, 0), plain(32, 1)
    options = {**OPTIONS, "recipe": "published-schedule"}
    first, again = (fastsitch.stitch(sender, receiver, few, **options) for _ in range(2))
    assert np.array_equal(first.train_loss, again.train_loss)
    recipe = replace(stitch_recipe("published-schedule", epochs=1, batch_size=16), augment=False)
    unseen = train_group(
        frozen(receiver),
        LiveSource(
            *(
                LiveSplit(frozen(sender), Transform(few.normalisation), x, stored=torch.float64, dtype=torch.float64)
                for x in (few.train, few.test)
            )
        ),
        [Cell(replace(UNIT, seed=0), 0, 0)],
        recipe,
        ImageOrder(seed=0),
    )
    (result,) = unseen.values()
    assert result.train_loss != first.train_loss[0, 0]
