"""Receivers with batch statistics per stitch equal plain modules in training mode, one stitch at a time."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.live_source import LiveSource, LiveSplit
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.chains.chain import Chain
from fastsitch.data import Dataset, Split, Transform, Views
from fastsitch.errors import ConfigError, NetworkError
from fastsitch.identity import torch_generator
from fastsitch.kernels.reference import conv_weight
from fastsitch.receivers import residual_block as blocks
from fastsitch.receivers.batch_statistics_network import BatchStatisticsNetwork
from fastsitch.receivers.contract import Statistics
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.stitching.cascade import Cascade
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.engine import evaluate_with_statistics, train_group, train_step
from fastsitch.stitching.recipe import TrainingRecipe
from fastsitch.stitching.stitch_bank import StitchBank, initial_stitch
from fastsitch.stitching.stitch_schedule import stitch_schedule
from fastsitch.vocabulary import Status
from tests.conftest import network
from tests.test_engine import CPU, ORDER, RECIPE, UNIT, all_cells, assert_same, frozen, geometry_of, source_of, tensors

CELLS = [Cell(UNIT, 0, 0), Cell(UNIT, 1, 4), Cell(UNIT, 4, 1), Cell(UNIT, 2, 3), Cell(UNIT, 3, 5)]


def unfolded(chain: Chain, dtype: torch.dtype = torch.float64) -> BatchStatisticsNetwork:
    return BatchStatisticsNetwork(chain, dtype=dtype, device=CPU)


class Stitched:
    """One stitch in plain modules, trained and evaluated without any of the engine's code."""

    def __init__(self, cell: Cell, sender: Chain, receiver: Chain) -> None:
        geometry = geometry_of(cell, sender, receiver)
        weight, bias = initial_stitch(cell, geometry)
        self.conv = nn.Conv2d(geometry.sender[0], geometry.receiver[0], geometry.down, stride=geometry.down).double()
        self.conv.weight.data.copy_(weight)
        self.conv.bias.data.copy_(bias)
        self.stitch = nn.Sequential(nn.Upsample(scale_factor=geometry.up), self.conv) if geometry.up > 1 else self.conv
        self.cell, self.down = cell, geometry.down
        self.sender, self.receiver = sender, copy.deepcopy(receiver).requires_grad_(False)

    def logits(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            provided = self.sender.representations(x)[self.cell.i]
        return self.receiver.tail(self.stitch(provided), self.cell.j)

    def train(
        self, x: Tensor, labels: Tensor, recipe: TrainingRecipe, order: ImageOrder, *, augment: bool = False
    ) -> float:
        """The mean loss over the last epoch; with ``augment``, over random views that change in every epoch."""
        optimizer = torch.optim.SGD(
            self.conv.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        steps = len(x) // recipe.batch_size
        schedule = stitch_schedule("small", peak=recipe.lr, epochs=recipe.epochs, steps_per_epoch=steps)
        self.receiver.train()
        losses = []
        for epoch in range(recipe.epochs):
            permutation = order.epoch(epoch, len(x))
            views = Views.draw(len(x), 32, 32, torch_generator("views", order.seed, epoch))
            for start in range(0, steps * recipe.batch_size, recipe.batch_size):
                part = slice(start, start + recipe.batch_size)
                index = permutation[part]
                shown = views[part].apply(x[index].float()).double() if augment else x[index]
                loss = F.cross_entropy(self.logits(shown), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.param_groups[0]["lr"] = schedule.rate(len(losses))
                optimizer.step()
                losses.append(loss.item())
        self.receiver.eval()
        return sum(losses[-steps:]) / steps

    def load(self, weight_FD: Tensor, bias_D: Tensor, statistics: Statistics) -> None:
        """Load a stitch and the running statistics behind it."""
        self.conv.weight.data.copy_(conv_weight(weight_FD, self.down))
        self.conv.bias.data.copy_(bias_D)
        for name, tensor in self.statistics().items():
            tensor.copy_(statistics[name])

    def statistics(self) -> dict[str, Tensor]:
        """Those of the segments behind the stitch, by the names that the engine gives them."""
        return {
            f"block{p}.{name}": tensor
            for p, segment in enumerate(self.receiver.segments)
            for name, tensor in segment.named_buffers()
            if p > self.cell.j and "running" in name
        }


def pictures(data: Dataset, train: int = 16, test: int = 10) -> tuple[Tensor, Tensor]:
    train_images, test_images = data.train.images[:train], data.test.images[:test]
    return (data.normalisation.apply(images, torch.float64) for images in (train_images, test_images))  # type: ignore[return-value]


class Pair:
    """R1111 into R1112, untrained, and all their stitches, trained on real images as one group."""

    def __init__(self, data: Dataset) -> None:
        self.sender, self.receiver = network("R1111", width=2), network("R1112", seed=1, width=2)
        self.source = source_of(self.sender, data, train=16)
        self.cells = all_cells(self.sender, self.receiver)
        self.before = copy.deepcopy([self.sender.state_dict(), self.receiver.state_dict()])
        self.model = unfolded(self.receiver)
        self.held = copy.deepcopy(held_by(self.model))
        self.trained = train_group(self.model, self.source, self.cells, RECIPE, ORDER)


def held_by(model: BatchStatisticsNetwork) -> list[Tensor]:
    """All tensors that groups share."""
    norms = [norm for part in model.others for norm in part.norms.values()]
    return tensors(model) + tensors(norms)


@pytest.fixture(scope="module")
def pair(fashion: Dataset) -> Pair:
    return Pair(fashion)


@pytest.mark.parametrize("cell", CELLS)
def test_a_group_trains_as_plain_modules_in_training_mode_do(cell: Cell, pair: Pair, fashion: Dataset) -> None:
    result = pair.trained[cell]
    reference = Stitched(cell, pair.sender, pair.receiver)
    x, tests = pictures(fashion)
    train_loss = reference.train(x, fashion.train.labels[:16], RECIPE, ORDER)
    torch.testing.assert_close(
        conv_weight(result.weight_FD, reference.down), reference.conv.weight.data, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(result.bias_D, reference.conv.bias.data, rtol=1e-9, atol=1e-9)
    assert result.train_loss == pytest.approx(train_loss, rel=1e-9)
    expected = reference.statistics()
    assert list(result.statistics) == list(expected)
    original = pair.receiver.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(result.statistics[name], tensor, rtol=1e-9, atol=1e-10)
        block, rest = name.removeprefix("block").split(".", 1)
        assert not torch.allclose(tensor, original[f"segments.{block}.{rest}"], rtol=1e-3)
    with torch.no_grad():
        logits = reference.logits(tests)
    assert result.accuracy == (logits.argmax(-1) == fashion.test.labels[:10]).double().mean().item()
    assert result.loss == pytest.approx(F.cross_entropy(logits, fashion.test.labels[:10]).item(), rel=1e-9)


def assert_same_statistics(one: CellResult, other: CellResult, tolerance: float = 1e-10) -> None:
    assert list(one.statistics) == list(other.statistics)
    for name, tensor in one.statistics.items():
        torch.testing.assert_close(tensor, other.statistics[name], rtol=tolerance, atol=tolerance)


def test_a_group_gives_the_same_as_its_stitches_alone(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    # one stitch per micro-batch
    monkeypatch.setitem(blocks.CHUNK_BYTES, "cpu", 1)
    alone = train_group(pair.model, pair.source, pair.cells[2::3], RECIPE, ORDER)
    for cell in CELLS:
        alone |= train_group(pair.model, pair.source, [cell], RECIPE, ORDER)
    for cell, result in alone.items():
        assert_same(pair.trained[cell], result)
        assert_same_statistics(pair.trained[cell], result)
        assert len(result.statistics) == 2 * sum(3 if p in (2, 3, 4) else 2 for p in range(cell.j + 1, 6))


def test_training_changes_nothing_in_either_network(pair: Pair) -> None:
    for old, new in zip(pair.before, (pair.sender.state_dict(), pair.receiver.state_dict()), strict=True):
        assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())
    assert len(pair.held) > 60
    assert all(torch.equal(one, other) for one, other in zip(pair.held, held_by(pair.model), strict=True))


def test_a_frozen_receiver_has_no_statistics(pair: Pair) -> None:
    (result,) = train_group(frozen(pair.receiver), pair.source, [CELLS[0]], RECIPE, ORDER).values()
    assert result.statistics == {}
    assert not torch.allclose(result.weight_FD, pair.trained[CELLS[0]].weight_FD, rtol=1e-3, atol=1e-5)


def test_other_segments_give_the_same_stitches_through_autograd(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Chain(
        [nn.Sequential(segment) for segment in pair.receiver.segments],
        nn.Sequential(pair.receiver.head),
        [position.name for position in pair.receiver.positions],
        pair.receiver.input_shape,
    ).eval()
    monkeypatch.setitem(blocks.CHUNK_BYTES, "cpu", 100_000)
    before = copy.deepcopy(plain.state_dict())
    results = train_group(unfolded(plain), pair.source, pair.cells[1::2], RECIPE, ORDER)
    for cell, result in results.items():
        assert_same(pair.trained[cell], result, 1e-9)
        named = {name.replace(".", ".0.", 1): tensor for name, tensor in pair.trained[cell].statistics.items()}
        assert list(named) == list(result.statistics)
        for name, tensor in named.items():
            torch.testing.assert_close(result.statistics[name], tensor, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def test_batchnorm_of_other_kinds_is_refused() -> None:
    receiver = network("R1111", width=2)

    def changed(segment: nn.Module | None = None, head: nn.Module | None = None) -> Chain:
        segments = [
            *list(receiver.segments)[:4],
            nn.Sequential(receiver.segments[4], (segment or nn.Identity()).double()),
        ]
        names = [position.name for position in receiver.positions]
        return Chain(segments, head or receiver.head, names, receiver.input_shape).double().eval()

    shared = nn.BatchNorm2d(16)
    unfolded(changed())
    for chain, message in (
        (changed(nn.BatchNorm2d(16, track_running_stats=False)), "expected BatchNorm layers with running statistics"),
        (changed(nn.BatchNorm2d(16, momentum=None)), "expected BatchNorm layers with running statistics"),
        (changed(nn.Sequential(shared, shared)), "a BatchNorm layer is used more than once"),
        (changed(nn.SyncBatchNorm(16)), "expected BatchNorm2d layers, found SyncBatchNorm; use receiver_bn='frozen'"),
        (changed(head=nn.Sequential(receiver.head, nn.BatchNorm1d(10))), "expected a head without BatchNorm"),
    ):
        with pytest.raises(NetworkError, match=message):
            unfolded(chain)


def test_a_batch_without_a_variance_is_refused(fashion: Dataset) -> None:
    chain = network("R1111", width=2, input_shape=(3, 8, 8))
    x = fashion.normalisation.apply(fashion.train.images[:4, 8:16, 8:16], torch.float64)
    labels = fashion.train.labels[:4]
    source = ResidentSource.from_tensors(*[frozen(chain).representations(x)] * 2, labels, labels)
    recipe = TrainingRecipe(name="small", epochs=1, batch_size=1, lr=0.01, momentum=0.9, weight_decay=0.01)
    with pytest.raises(ConfigError, match="a batch of one 1x1 map has no variance: expected batch_size of 2 or more"):
        train_group(unfolded(chain), source, [Cell(UNIT, 0, 0)], recipe, ORDER)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_diverging_stitch_leaves_the_others_unchanged(dtype: torch.dtype, pair: Pair, fashion: Dataset) -> None:
    model, source = unfolded(pair.receiver, dtype), source_of(pair.sender, fashion, train=16, dtype=dtype)
    cells = [Cell(UNIT, i, j) for i in (1, 2, 4) for j in (0, 2, 5)]
    calm = train_group(model, source, cells, RECIPE, ORDER)
    # position 2 is alone in its shape, so its representations can be spoilt without touching another
    source.train._stacks[(4, 16, 16)].fill_(math.nan)
    wild = train_group(model, source, cells, RECIPE, ORDER)
    for cell in cells:
        assert wild[cell].status == (Status.DIVERGED if cell.i == 2 else Status.DONE)
        if cell.i != 2:
            assert torch.equal(wild[cell].weight_FD, calm[cell].weight_FD)
            assert wild[cell].loss == calm[cell].loss
            assert_same_statistics(wild[cell], calm[cell], 0)


def test_views_that_change_in_every_epoch_are_trained_on_as_by_plain_modules(pair: Pair, fashion: Dataset) -> None:
    sender = frozen(pair.sender)
    splits = [
        LiveSplit(
            sender,
            Transform(fashion.normalisation),
            Split(split.images[:count], split.labels[:count]),
            stored=torch.float64,
            dtype=torch.float64,
        )
        for split, count in ((fashion.train, 16), (fashion.test, 10))
    ]
    recipe = TrainingRecipe(
        name="small", epochs=2, batch_size=8, lr=0.01, momentum=0.9, weight_decay=0.01, augment=True
    )
    results = train_group(unfolded(pair.receiver), LiveSource(*splits), CELLS, recipe, ORDER)
    x = fashion.normalisation.apply(fashion.train.images[:16]).double()
    for cell in (CELLS[0], CELLS[2]):
        reference = Stitched(cell, pair.sender, pair.receiver)
        loss = reference.train(x, fashion.train.labels[:16], recipe, ORDER, augment=True)
        assert results[cell].train_loss == pytest.approx(loss, rel=1e-9)
        torch.testing.assert_close(results[cell].bias_D, reference.conv.bias.data, rtol=1e-9, atol=1e-9)
        for name, tensor in reference.statistics().items():
            torch.testing.assert_close(results[cell].statistics[name], tensor, rtol=1e-9, atol=1e-9)


def test_given_stitches_are_evaluated_with_given_statistics(pair: Pair, fashion: Dataset) -> None:
    """Like plain modules with those statistics; with the statistics of its training a stitch keeps its accuracy."""
    stitches = {cell: (result.weight_FD, result.bias_D) for cell, result in pair.trained.items()}
    statistics = {cell: result.statistics for cell, result in pair.trained.items()}
    model = pair.model
    assert evaluate_with_statistics(model, pair.source, stitches, statistics, images=7) == {
        cell: result.accuracy for cell, result in pair.trained.items()
    }
    _, tests = pictures(fashion)
    others = {cell: {name: 5 * tensor + 1 for name, tensor in kept.items()} for cell, kept in statistics.items()}
    found = evaluate_with_statistics(model, pair.source, stitches, others, images=7)
    for cell in CELLS:
        reference = Stitched(cell, pair.sender, pair.receiver)
        reference.load(*stitches[cell], others[cell])
        with torch.no_grad():
            right = reference.logits(tests).argmax(-1) == fashion.test.labels[:10]
        assert found[cell] == right.double().mean().item()
    cell, other = CELLS[0], CELLS[1]
    with pytest.raises(ConfigError, match=r"no running statistics for cell \(0, 0\)"):
        evaluate_with_statistics(model, pair.source, stitches, {other: statistics[other]}, images=7)
    with pytest.raises(
        ConfigError, match=r"of 4 tensors do not fit the receiver: expected block1\.bn1\.running_mean \(2\)"
    ):
        evaluate_with_statistics(model, pair.source, {cell: stitches[cell]}, {cell: statistics[other]}, images=7)


def test_a_step_runs_without_hardware_and_without_synchronising() -> None:
    """On the meta device every .item(), data-dependent branch or tensor left elsewhere is an error."""
    meta = torch.device("meta")
    sender, receiver = network("R1111"), network("R1122", seed=1)
    provided = FrozenNetwork(sender, dtype=torch.bfloat16, device=meta).representations(
        torch.empty(12, 3, 32, 32, device=meta)
    )
    labels = torch.empty(12, dtype=torch.int64, device=meta)
    source = ResidentSource.from_tensors(provided, provided, labels, labels)
    shapes = [position.shape for position in receiver.positions]
    bank = StitchBank(all_cells(sender, receiver), source.shapes, shapes, dtype=torch.bfloat16, device=meta)
    model = BatchStatisticsNetwork(receiver, dtype=torch.bfloat16, device=meta).for_stitches(bank.counts)
    optimizer = torch.optim.SGD([bank.parameters], lr=0.01, momentum=0.9, weight_decay=0.01)
    batch = source.train.batch(torch.empty(8, dtype=torch.int64, device=meta))
    loss = train_step(Cascade(model, bank.counts, 8), bank, batch, optimizer)
    assert loss.shape == (35,)
    logits = Cascade(model, bank.counts, 8).infer(lambda j, out: bank.forward(j, batch, out))
    assert (logits.shape, logits.device) == ((35, 8, 10), meta)
