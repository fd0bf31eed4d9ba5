"""The image as a position: gradients, groups and least squares into it."""

import pytest
import torch
from torch import Tensor, nn

from fastsitch.activations.ordered_split import ResidentSplitInOrder
from fastsitch.data import Dataset, Split, Transform
from fastsitch.generation.generate_images import generate
from fastsitch.generation.input_stitches import InputImages
from fastsitch.receivers import residual_block as blocks
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.stitching.cascade import Cascade, cross_entropy
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import train_group
from fastsitch.stitching.matching import match
from fastsitch.stitching.moments import SenderMoments, pair_moments
from fastsitch.stitching.stitch_bank import StitchBank
from fastsitch.vocabulary import Status
from tests.conftest import network
from tests.test_engine import ORDER, RECIPE, assert_same, source_of

CPU = torch.device("cpu")

CPU = torch.device("cpu")
UNIT = Unit(sender="R1111", receiver="R1112-input", setting="T2T", loss="task", seed=0)


def frozen(masked: bool = False) -> FrozenNetwork:
    chain = network("R1112", seed=1).with_input()
    return FrozenNetwork(chain, dtype=torch.float64, device=CPU, masked=masked)


def test_the_input_is_a_position_like_any_other(images: Tensor) -> None:
    chain = network("R1112")
    longer = chain.with_input()
    assert [position.name for position in longer.positions] == [
        "input",
        *(position.name for position in chain.positions),
    ]
    assert longer.positions[0].shape == (3, 32, 32)
    assert longer.segments[1] is chain.segments[0]
    assert torch.equal(longer.representations(images)[0], images)
    assert torch.equal(longer.tail(images, 0), chain(images))
    assert torch.equal(longer.tail(chain.representations(images)[2], 3), longer(images))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_into_the_input_equal_autograd(
    masked: bool, fashion: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stitches into later positions in the same pass, and more than one micro-batch in every segment."""
    monkeypatch.setitem(blocks.CHUNK_BYTES, "cpu", 1)
    sender, receiver = network("R1111"), network("R1112", seed=1).with_input()
    source = source_of(sender, fashion)
    cells = [*(Cell(UNIT, i, 0) for i in range(5)), Cell(UNIT, 2, 1), Cell(UNIT, 1, 2), Cell(UNIT, 3, 6)]
    shapes = [position.shape for position in receiver.positions]
    bank = StitchBank(cells, source.shapes, shapes, dtype=torch.float64, device=CPU)
    batch = source.train.batch(torch.arange(24))
    cascade = Cascade(frozen(masked), bank.counts, 24)
    with torch.no_grad():
        logits = cascade.forward(lambda j, out: bank.forward(j, batch, out))
        loss, g_logits = cross_entropy(logits, batch.labels)
        found = {j: g.clone() for j, g in cascade.backward(g_logits)}
    assert list(found) == [6, 2, 1, 0]
    for j, g_KBPQD in found.items():
        out = torch.empty_like(g_KBPQD)
        bank.forward(j, batch, out)
        leaf = out.requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for stitched in leaf:
            plain_logits = receiver.tail(stitched.permute(0, 3, 1, 2), j)
            total = total + nn.functional.cross_entropy(plain_logits, batch.labels)
        total.backward()
        assert g_KBPQD.abs().amax((1, 2, 3, 4)).min() > 0
        torch.testing.assert_close(g_KBPQD, leaf.grad, rtol=1e-10, atol=1e-12)
    assert loss.isfinite().all()


def test_a_group_into_the_input_trains_each_stitch_as_alone(fashion: Dataset) -> None:
    source = source_of(network("R1111"), fashion)
    cells = [Cell(UNIT, i, 0) for i in range(5)]
    together = train_group(frozen(), source, cells, RECIPE, ORDER)
    masked = train_group(frozen(masked=True), source, cells, RECIPE, ORDER)
    assert len({result.loss for result in together.values()}) == 5
    for cell in cells:
        assert_same(train_group(frozen(), source, [cell], RECIPE, ORDER)[cell], together[cell])
        assert_same(masked[cell], together[cell])


def test_a_matched_stitch_into_the_input_is_the_least_squares_solution(fashion: Dataset) -> None:
    source = source_of(network("R1111"), fashion, train=100)
    split = Split(fashion.train.images[:100], fashion.train.labels[:100])
    expected = InputImages(split, Transform(fashion.normalisation), CPU)
    matched = match(pair_moments(SenderMoments(ResidentSplitInOrder(source)), expected))
    target = fashion.normalisation.apply(split.images).double().permute(0, 2, 3, 1).flatten(0, 2)
    assert list(matched) == [(i, 0) for i in range(5)]
    for i in range(5):
        x = ResidentSplitInOrder(source).images(i, 0, 100)
        up = 32 // x.shape[1]
        rows = x.repeat_interleave(up, 1).repeat_interleave(up, 2).flatten(0, 2)
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
        best = rows @ torch.linalg.lstsq(rows, target, driver="gelsd").solution
        stitch = matched[i, 0]
        made = generate(x.permute(0, 3, 1, 2), result_of(stitch.weight_FD, stitch.bias_D), (3, 32, 32))
        torch.testing.assert_close(made.permute(0, 2, 3, 1).flatten(0, 2), best, rtol=1e-6, atol=1e-6)
        assert stitch.error == pytest.approx((best - target).square().mean().item(), rel=1e-8)


def result_of(weight_FD: Tensor, bias_D: Tensor, accuracy: float = 0.5) -> CellResult:
    return CellResult(accuracy, 1.0, 1.0, Status.DONE, weight_FD, bias_D)
