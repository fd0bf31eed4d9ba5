"""Stitches between maps, tokens and vectors equal plain modules, alone and in groups."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.ordered_split import ResidentSplitInOrder
from fastsitch.chains.chain import Chain
from fastsitch.data import Dataset
from fastsitch.errors import ConfigError
from fastsitch.kernels.reference import conv_weight, gemm_weight
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.stitching.cascade import Cascade
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import evaluate_matched, train_group
from fastsitch.stitching.geometry import DEFAULT_RULES, Geometry, Rules
from fastsitch.stitching.matching import match
from fastsitch.stitching.moments import SenderMoments, pair_moments
from fastsitch.stitching.output_errors import direct_errors
from fastsitch.stitching.recipe import TrainingRecipe
from fastsitch.stitching.regression import regress_group
from fastsitch.stitching.stitch_bank import StitchBank, initial_stitch
from fastsitch.stitching.stitch_schedule import stitch_schedule
from fastsitch.vocabulary import Status
from tests.layout_chains import CPU, PlainStitch, first_chain, geometry_of, representations, second_chain, source_of
from tests.test_engine import ORDER, RECIPE, assert_same

UNIT = Unit(sender="R1111", receiver="R1112", setting="T2T", loss="task", seed=0)

CASES = {
    "area-sender": (first_chain, second_chain, Rules(resample="area")),
    "bilinear-mean": (second_chain, first_chain, Rules(resample="bilinear", class_token="mean")),
    "area-zero": (first_chain, first_chain, Rules(resample="area", class_token="zero")),
    "bilinear-sender": (second_chain, first_chain, Rules(resample="bilinear")),
}


class Pair:
    """All cells of a pair of chains, on real images, in fp64."""

    def __init__(self, case: str, data: Dataset, train: int = 24) -> None:
        make_sender, make_receiver, self.rules = CASES[case]
        self.sender, self.receiver = make_sender(), make_receiver()
        self.source, self.expected = (source_of(chain, data, train) for chain in (self.sender, self.receiver))
        self.model = FrozenNetwork(self.receiver, dtype=torch.float64, device=CPU)
        self.cells = [
            Cell(UNIT, i, j) for i in range(len(self.sender.positions)) for j in range(len(self.receiver.positions))
        ]

    def geometry(self, cell: Cell) -> Geometry:
        return geometry_of(self.sender, self.receiver, cell.i, cell.j, self.rules)

    def plain(self, cell: Cell, weight_DCkk: Tensor, bias_D: Tensor) -> PlainStitch:
        ends = self.sender.positions[cell.i], self.receiver.positions[cell.j]
        stitch = PlainStitch(*ends, self.geometry(cell), self.rules)
        stitch.conv.weight.data.copy_(weight_DCkk)
        stitch.conv.bias.data.copy_(bias_D)
        return stitch


def test_every_kind_of_stitch_is_among_the_cases(fashion: Dataset) -> None:
    found = {case: Pair(case, fashion) for case in CASES}
    kinds = Counter(pair.geometry(cell).kind for pair in found.values() for cell in pair.cells)
    assert set(kinds) == {"equal", "down 2", "down 4", "up 2", "up 4", "up 7", "up 8", "area", "bilinear", "mean"} | {
        "repeat"
    }
    layouts = {
        (pair.sender.positions[cell.i].layout, pair.receiver.positions[cell.j].layout)
        for pair in found.values()
        for cell in pair.cells
    }
    assert len(layouts) == 16


@pytest.mark.parametrize("case", CASES)
def test_a_group_trains_every_stitch_as_alone_and_as_a_plain_loop_does(case: str, fashion: Dataset) -> None:
    pair = Pair(case, fashion)
    provided = representations(pair.sender, fashion, fashion.train, 24)
    tests = representations(pair.sender, fashion, fashion.test, 10)
    together = train_group(pair.model, pair.source, pair.cells, RECIPE, ORDER, rules=pair.rules)
    for cell in pair.cells:
        alone = train_group(pair.model, pair.source, [cell], RECIPE, ORDER, rules=pair.rules)[cell]
        assert_same(together[cell], alone)
        weight, bias = initial_stitch(cell, pair.geometry(cell))
        stitch = pair.plain(cell, weight, bias)
        optimizer = torch.optim.SGD(stitch.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
        schedule = stitch_schedule("small", peak=0.01, epochs=2, steps_per_epoch=3)
        losses = []
        for epoch in range(2):
            for index in ORDER.epoch(epoch, 24).split(8):
                logits = pair.receiver.tail(stitch(provided[cell.i][index]), cell.j)
                loss = F.cross_entropy(logits, fashion.train.labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.param_groups[0]["lr"] = schedule.rate(len(losses))
                optimizer.step()
                losses.append(loss.item())
        result = together[cell]
        trained = conv_weight(result.weight_FD, pair.geometry(cell).down)
        assert (trained - weight).abs().max() > 1e-5
        torch.testing.assert_close(trained, stitch.conv.weight.data, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(result.bias_D, stitch.conv.bias.data, rtol=1e-10, atol=1e-10)
        assert result.train_loss == pytest.approx(sum(losses[3:]) / 3, rel=1e-10)
        with torch.no_grad():
            logits = pair.receiver.tail(stitch(tests[cell.i]), cell.j)
        labels = fashion.test.labels[:10]
        assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-10)
        assert result.accuracy == pytest.approx((logits.argmax(-1) == labels).double().mean().item())


def test_any_other_grouping_gives_the_same_stitches(fashion: Dataset) -> None:
    pair = Pair("area-sender", fashion)
    together = train_group(pair.model, pair.source, pair.cells, RECIPE, ORDER, rules=pair.rules)
    shuffled = [pair.cells[k] for k in torch.randperm(len(pair.cells), generator=torch.Generator().manual_seed(3))]
    for start, end in ((0, 5), (5, 6), (6, len(shuffled))):
        part = train_group(pair.model, pair.source, shuffled[start:end], RECIPE, ORDER, rules=pair.rules)
        for cell, result in part.items():
            assert_same(result, together[cell])


@pytest.mark.parametrize("make", [first_chain, second_chain])
def test_identity_stitches_reproduce_the_network(make: type[Chain], fashion: Dataset) -> None:
    """Class and register tokens go through with the default rule."""
    chain = make()
    source = source_of(chain, fashion)
    cells = [Cell(UNIT, j, j) for j in range(len(chain.positions))]
    shapes = [position.rows for position in chain.positions]
    bank = StitchBank(cells, shapes, shapes, dtype=torch.float64, device=CPU)
    bank.load({cell: (torch.eye(shapes[cell.j][0]), torch.zeros(shapes[cell.j][0])) for cell in cells})
    batch = source.train.batch(torch.arange(24))
    cascade = Cascade(FrozenNetwork(chain, dtype=torch.float64, device=CPU), bank.counts, 24)
    expected = chain(fashion.normalisation.apply(fashion.train.images[:24], torch.float64)).detach()
    for logits in cascade.infer(lambda j, out: bank.forward(j, batch, out)):
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_matched_stitches_are_optimal_and_their_errors_exact(case: str, fashion: Dataset) -> None:
    pair = Pair(case, fashion, train=300)
    provided, expected = (representations(chain, fashion, fashion.train, 300) for chain in (pair.sender, pair.receiver))
    splits = ResidentSplitInOrder(pair.source), ResidentSplitInOrder(pair.expected)
    moments = pair_moments(SenderMoments(splits[0], pair.rules), splits[1])
    matched = match(moments)
    other = {
        (cell.i, cell.j): (gemm_weight(weight), bias)
        for cell in pair.cells
        for weight, bias in [initial_stitch(cell, pair.geometry(cell))]
    }
    direct = direct_errors(
        *splits,
        {at: [(optimum.weight_FD, optimum.bias_D), other[at]] for at, optimum in matched.items()},
        rules=pair.rules,
    )
    for cell in pair.cells:
        at, down = (cell.i, cell.j), pair.geometry(cell).down
        y = expected[cell.j]
        optimum = matched[at]
        stitch = pair.plain(cell, conv_weight(optimum.weight_FD, down), optimum.bias_D)
        loss = F.mse_loss(stitch(provided[cell.i]), y)
        loss.backward()
        size = y.square().mean().item()
        # the least of a convex function: no direction leads further down
        assert max(p.grad.abs().max().item() for p in stitch.parameters()) < 1e-7 * max(1.0, size)
        assert optimum.error == pytest.approx(loss.item(), rel=1e-8, abs=1e-12 * size)
        weight, bias = other[at]
        with torch.no_grad():
            made = pair.plain(cell, conv_weight(weight, down), bias)(provided[cell.i])
            best = stitch(provided[cell.i])
        error, distance = F.mse_loss(made, y).item(), F.mse_loss(made, best).item()
        assert moments[at].error(weight, bias) == pytest.approx(error, rel=1e-8)
        assert moments[at].distance((optimum.weight_FD, optimum.bias_D), (weight, bias)) == pytest.approx(
            distance, rel=1e-8
        )
        assert direct.error[:, cell.i, cell.j].tolist() == pytest.approx([loss.item(), error], rel=1e-8, abs=1e-12)
        assert direct.distance[1, cell.i, cell.j].item() == pytest.approx(distance, rel=1e-8)


def test_matched_starts_and_whitened_training_work_for_all_kinds(fashion: Dataset) -> None:
    pair = Pair("area-sender", fashion, train=160)
    splits = ResidentSplitInOrder(pair.source), ResidentSplitInOrder(pair.expected)
    matched = match(pair_moments(SenderMoments(splits[0], pair.rules), splits[1]))
    start = {cell: matched[cell.i, cell.j] for cell in pair.cells}
    evaluated = evaluate_matched(pair.model, pair.source, start, images=64, rules=pair.rules)
    recipe = TrainingRecipe(
        name="small", epochs=1, batch_size=40, lr=0.08, momentum=0.9, weight_decay=0.0, optimizer="preconditioned"
    )
    order = ImageOrder(seed=0, block=8, window=32)
    together = train_group(pair.model, pair.source, pair.cells, recipe, order, init=start, rules=pair.rules)
    for cell in pair.cells:
        assert evaluated[cell].status == together[cell].status == Status.DONE
        assert torch.equal(evaluated[cell].weight_FD, start[cell].weight_FD)
        alone = train_group(pair.model, pair.source, [cell], recipe, order, init=start, rules=pair.rules)[cell]
        assert_same(together[cell], alone, 1e-9)


def test_matching_by_training_is_the_plain_loop_for_all_kinds(fashion: Dataset) -> None:
    pair = Pair("area-sender", fashion)
    provided, expected = (representations(chain, fashion, fashion.train, 24) for chain in (pair.sender, pair.receiver))
    together = regress_group(pair.model, pair.source, pair.expected, pair.cells, RECIPE, ORDER, rules=pair.rules)
    for cell in pair.cells:
        stitch = pair.plain(cell, *initial_stitch(cell, pair.geometry(cell)))
        optimizer = torch.optim.SGD(stitch.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
        schedule = stitch_schedule("small", peak=0.01, epochs=2, steps_per_epoch=3)
        steps = [index for epoch in range(2) for index in ORDER.epoch(epoch, 24).split(8)]
        for step, index in enumerate(steps):
            optimizer.zero_grad()
            F.mse_loss(stitch(provided[cell.i][index]), expected[cell.j][index]).backward()
            optimizer.param_groups[0]["lr"] = schedule.rate(step)
            optimizer.step()
        trained = conv_weight(together[cell].weight_FD, pair.geometry(cell).down)
        torch.testing.assert_close(trained, stitch.conv.weight.data, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(together[cell].bias_D, stitch.conv.bias.data, rtol=1e-10, atol=1e-10)


def test_a_value_that_is_not_finite_affects_only_its_stitch(fashion: Dataset) -> None:
    pair = Pair("area-sender", fashion)
    bank = StitchBank(
        pair.cells,
        pair.source.shapes,
        [position.rows for position in pair.receiver.positions],
        dtype=torch.float64,
        device=CPU,
        rules=pair.rules,
    )
    spoilt = Cell(UNIT, 4, 3)
    geometry = pair.geometry(spoilt)
    bank.load({spoilt: (torch.full((geometry.features, geometry.receiver[0]), torch.nan), torch.zeros(6))})
    cascade = Cascade(pair.model, bank.counts, 24)
    batch = pair.source.train.batch(torch.arange(24))
    logits = cascade.infer(lambda j, out: bank.forward(j, batch, out))
    finite = logits.isfinite().flatten(1).all(1).tolist()
    assert dict(zip(bank.cells, finite, strict=True)) == {cell: cell != spoilt for cell in bank.cells}


@pytest.mark.parametrize(
    ("sender", "receiver"), [((5, 7, 7), (6, 4, 4, 1)), ((5, 8, 4), (6, 4, 4)), ((5, 3, 3, 2), (4, 2, 2))]
)
def test_sizes_that_are_no_multiples_need_a_method_by_name(sender: tuple[int, ...], receiver: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="resample='area' or resample='bilinear'") as refused:
        Geometry.between(sender, receiver, DEFAULT_RULES)
    assert "\n" not in str(refused.value)
    assert Geometry.between(sender, receiver, Rules(resample="area")).kind == "area"
