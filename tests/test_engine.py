"""The batched engine gives the same as one stitch at a time."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.chains.chain import Chain
from fastsitch.data import Dataset
from fastsitch.errors import ConfigError
from fastsitch.identity import torch_generator
from fastsitch.kernels.reference import conv_weight, gemm_weight
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.stitching.cascade import Cascade
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import evaluate, train_group, train_step
from fastsitch.stitching.geometry import Geometry
from fastsitch.stitching.recipe import TrainingRecipe
from fastsitch.stitching.stitch_bank import StitchBank, initial_stitch
from fastsitch.stitching.stitch_schedule import stitch_schedule
from fastsitch.vocabulary import Status
from tests.conftest import network

CPU = torch.device("cpu")
UNIT = Unit(sender="R1111", receiver="R1122", setting="T2T", loss="task", seed=0)
RECIPE = TrainingRecipe(name="small", epochs=2, batch_size=8, lr=0.01, momentum=0.9, weight_decay=0.01)
ORDER = ImageOrder(seed=0, block=8, window=16)


def frozen(chain: Chain, dtype: torch.dtype = torch.float64) -> FrozenNetwork:
    return FrozenNetwork(chain, dtype=dtype, device=CPU)


def source_of(
    sender: Chain, data: Dataset, train: int = 24, test: int = 10, dtype: torch.dtype = torch.float64
) -> ResidentSource:
    """The sender's representations of the first real images."""
    model = frozen(sender, dtype)
    splits = [
        model.representations(data.normalisation.apply(split.images[:count], dtype))
        for split, count in ((data.train, train), (data.test, test))
    ]
    return ResidentSource.from_tensors(*splits, data.train.labels[:train], data.test.labels[:test])


def all_cells(sender: Chain, receiver: Chain, unit: Unit = UNIT) -> list[Cell]:
    return [Cell(unit, i, j) for i in range(len(sender.positions)) for j in range(len(receiver.positions))]


def bank_for(cells: Sequence[Cell], sender: Chain, receiver: Chain) -> StitchBank:
    return StitchBank(
        cells,
        [position.shape for position in sender.positions],
        [position.shape for position in receiver.positions],
        dtype=torch.float64,
        device=CPU,
    )


def set_stitch(bank: StitchBank, cell: Cell, weight_DCkk: Tensor, bias_D: Tensor) -> None:
    for stack in bank.stacks[cell.j]:
        if cell in stack.cells:
            k = stack.cells.index(cell)
            stack.master_weight_KFD[k].copy_(gemm_weight(weight_DCkk))
            stack.master_bias_KD[k].copy_(bias_D)
    bank.refresh()


def stitched_logits(receiver: Chain, source: ResidentSource, bank: StitchBank) -> Tensor:
    """Logits (K, N, classes) of all stitches on all training images."""
    batch = source.train.batch(torch.arange(len(source.train)))
    cascade = Cascade(frozen(receiver), bank.counts, len(source.train))
    return cascade.infer(lambda j, out: bank.forward(j, batch, out))


def test_identity_stitches_of_a_network_into_itself_reproduce_its_logits(fashion: Dataset) -> None:
    chain = network("R1122")
    source = source_of(chain, fashion)
    cells = [Cell(UNIT, i, i) for i in range(len(chain.positions))]
    bank = bank_for(cells, chain, chain)
    for cell in cells:
        channels = chain.positions[cell.i].shape[0]
        set_stitch(bank, cell, torch.eye(channels)[:, :, None, None], torch.zeros(channels))
    expected = chain(fashion.normalisation.apply(fashion.train.images[:24], torch.float64)).detach()
    for logits in stitched_logits(chain, source, bank):
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_a_receiver_with_permuted_channels_is_matched_by_the_permutation(fashion: Dataset) -> None:
    original, permuted = network("R1112"), network("R1112")
    last = len(original.positions) - 1
    order = torch.randperm(32, generator=torch_generator("permutation"))
    block = permuted.segments[last - 1]
    with torch.no_grad():
        for conv, bn in ((block.conv2, block.bn2), block.projection):
            conv.weight.copy_(conv.weight[order])
            for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
                tensor.copy_(tensor[order])
        following = permuted.segments[last]
        following.conv1.weight.copy_(following.conv1.weight[:, order])
        following.conv2.weight.copy_(following.conv2.weight[order])
        for tensor in (
            following.bn2.weight,
            following.bn2.bias,
            following.bn2.running_mean,
            following.bn2.running_var,
        ):
            tensor.copy_(tensor[order])
        permuted.head.linear.weight.copy_(permuted.head.linear.weight[:, order])
    cells = [Cell(UNIT, last - 1, last - 1), Cell(UNIT, last, last)]
    bank = bank_for(cells, original, permuted)
    for cell in cells:
        set_stitch(bank, cell, torch.eye(32)[order][:, :, None, None], torch.zeros(32))
    expected = original(fashion.normalisation.apply(fashion.train.images[:24], torch.float64)).detach()
    for logits in stitched_logits(permuted, source_of(original, fashion), bank):
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_a_receiver_behind_an_invertible_map_is_matched_by_that_map(fashion: Dataset) -> None:
    chain = network("R1111")
    x = fashion.normalisation.apply(fashion.train.images[:24], torch.float64)
    for j in range(len(chain.positions) - 1):
        channels = chain.positions[j].shape[0]
        generator = torch_generator("invertible", j)
        matrix = torch.eye(channels) + 0.3 * torch.randn(channels, channels, generator=generator)
        forth = nn.Conv2d(channels, channels, 1).double()
        back = nn.Conv2d(channels, channels, 1).double()
        with torch.no_grad():
            forth.weight.copy_(matrix[:, :, None, None])
            inverse = torch.linalg.inv(forth.weight[:, :, 0, 0])
            back.weight.copy_(inverse[:, :, None, None])
            back.bias.copy_(-inverse @ forth.bias)
        segments = list(copy.deepcopy(chain).segments)
        segments[j] = nn.Sequential(segments[j], forth)
        segments[j + 1] = nn.Sequential(back, segments[j + 1])
        receiver = Chain(segments, chain.head, [p.name for p in chain.positions], chain.input_shape).eval()
        bank = bank_for([Cell(UNIT, j, j)], chain, receiver)
        set_stitch(bank, Cell(UNIT, j, j), forth.weight.detach(), forth.bias.detach())
        (logits,) = stitched_logits(receiver, source_of(chain, fashion), bank)
        torch.testing.assert_close(logits, chain(x).detach(), rtol=1e-10, atol=1e-10)


def test_any_grouping_trains_every_stitch_to_the_same_weights(fashion: Dataset) -> None:
    sender, receiver = network("R1111"), network("R1122", seed=1)
    source, model = source_of(sender, fashion), frozen(receiver)
    cells = all_cells(sender, receiver)
    kinds = {Geometry.between(sender.positions[cell.i].shape, receiver.positions[cell.j].shape).kind for cell in cells}
    assert kinds == {"equal", "down 2", "down 4", "down 8", "up 2", "up 4", "up 8"}
    together = train_group(model, source, cells, RECIPE, ORDER)
    generator = torch.Generator().manual_seed(7)
    shuffled = [cells[k] for k in torch.randperm(len(cells), generator=generator)]
    alone = {}
    for cell in cells:
        alone |= train_group(model, source, [cell], RECIPE, ORDER)
    mixed = {}
    for start, end in ((0, 3), (3, 4), (4, 20), (20, len(cells))):
        mixed |= train_group(model, source, shuffled[start:end], RECIPE, ORDER)
    for cell in cells:
        moved = together[cell].weight_FD - gemm_weight(initial_stitch(cell, geometry_of(cell, sender, receiver))[0])
        assert moved.abs().max() > 1e-4
        for other in (alone[cell], mixed[cell]):
            assert_same(together[cell], other)


def geometry_of(cell: Cell, sender: Chain, receiver: Chain) -> Geometry:
    return Geometry.between(sender.positions[cell.i].shape, receiver.positions[cell.j].shape)


def assert_same(one: CellResult, other: CellResult, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one.weight_FD, other.weight_FD, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one.bias_D, other.bias_D, rtol=tolerance, atol=tolerance)
    assert one.loss == pytest.approx(other.loss, rel=tolerance)
    assert one.train_loss == pytest.approx(other.train_loss, rel=tolerance)
    assert (one.accuracy, one.status) == (other.accuracy, other.status)


# against the definition: one stitch, plain modules, autograd and torch.optim
@pytest.mark.parametrize("cell", [Cell(UNIT, 0, 0), Cell(UNIT, 1, 4), Cell(UNIT, 4, 1), Cell(UNIT, 2, 5)])
def test_a_group_trains_a_stitch_as_a_plain_training_loop_does(cell: Cell, fashion: Dataset) -> None:
    sender, receiver = network("R1111"), network("R1122", seed=1)
    source = source_of(sender, fashion)
    result = train_group(frozen(receiver), source, all_cells(sender, receiver), RECIPE, ORDER)[cell]

    geometry = geometry_of(cell, sender, receiver)
    weight, bias = initial_stitch(cell, geometry)
    conv = nn.Conv2d(geometry.sender[0], geometry.receiver[0], geometry.down, stride=geometry.down).double()
    conv.weight.data.copy_(weight)
    conv.bias.data.copy_(bias)
    stitch = nn.Sequential(nn.Upsample(scale_factor=geometry.up), conv) if geometry.up > 1 else conv
    x = fashion.normalisation.apply(fashion.train.images[:24], torch.float64)
    with torch.no_grad():
        provided = sender.representations(x)[cell.i]
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    schedule = stitch_schedule("small", peak=0.01, epochs=2, steps_per_epoch=3)
    losses = []
    for epoch in range(2):
        for index in ORDER.epoch(epoch, 24).split(8):
            loss = F.cross_entropy(receiver.tail(stitch(provided[index]), cell.j), fashion.train.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = schedule.rate(len(losses))
            optimizer.step()
            losses.append(loss.item())
    torch.testing.assert_close(conv_weight(result.weight_FD, geometry.down), conv.weight.data, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.bias_D, conv.bias.data, rtol=1e-9, atol=1e-9)
    assert result.train_loss == pytest.approx(sum(losses[3:]) / 3, rel=1e-9)
    with torch.no_grad():
        tests = sender.representations(fashion.normalisation.apply(fashion.test.images[:10], torch.float64))[cell.i]
        logits = receiver.tail(stitch(tests), cell.j)
    assert result.accuracy == (logits.argmax(-1) == fashion.test.labels[:10]).double().mean().item()
    assert result.loss == pytest.approx(F.cross_entropy(logits, fashion.test.labels[:10]).item(), rel=1e-9)


def test_networks_without_a_folded_form_give_the_same_stitches(fashion: Dataset) -> None:
    sender, receiver = network("R1111"), network("R1121", seed=1)
    # a Sequential around each segment hides its type, so that autograd does the work
    plain = Chain(
        [nn.Sequential(segment) for segment in receiver.segments],
        nn.Sequential(receiver.head),
        [position.name for position in receiver.positions],
        receiver.input_shape,
    ).eval()
    source, cells = source_of(sender, fashion), all_cells(sender, receiver)
    folded = train_group(frozen(receiver), source, cells, RECIPE, ORDER)
    autograd = train_group(frozen(plain), source, cells, RECIPE, ORDER)
    for cell in cells:
        assert_same(folded[cell], autograd[cell], 1e-9)


def test_training_changes_nothing_in_either_network(fashion: Dataset) -> None:
    sender, receiver = network("R1111"), network("R1122", seed=1)
    model = frozen(receiver)
    before = [copy.deepcopy(tensors(part)) for part in (sender, receiver, model)]
    source = source_of(sender, fashion)
    train_group(model, source, all_cells(sender, receiver), RECIPE, ORDER)
    after = [tensors(part) for part in (sender, receiver, model)]
    for old, new in zip(before, after, strict=True):
        assert len(old) > 10
        assert all(torch.equal(one, other) for one, other in zip(old, new, strict=True))


def tensors(part: Any) -> list[Tensor]:
    """All parameters and buffers of a chain; all tensors reachable from a frozen network."""
    if isinstance(part, nn.Module):
        return list(part.state_dict().values())
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, list | tuple):
        return [tensor for entry in part for tensor in tensors(entry)]
    return [tensor for value in vars(part).values() for tensor in tensors(value)] if hasattr(part, "__dict__") else []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_diverging_stitch_leaves_the_others_unchanged(dtype: torch.dtype, fashion: Dataset) -> None:
    sender, receiver = network("R1111"), network("R1111", seed=1)
    model, source = frozen(receiver, dtype), source_of(sender, fashion, dtype=dtype)
    cells = all_cells(sender, receiver)
    calm = train_group(model, source, cells, RECIPE, ORDER)
    # position 2 is alone in its shape, so its representations can be spoilt without touching another
    source.train._stacks[(8, 16, 16)].mul_(1e300 if dtype == torch.float64 else 1e30)
    wild = train_group(model, source, cells, RECIPE, ORDER)
    for cell in cells:
        if cell.i == 2:
            assert wild[cell].status == Status.DIVERGED
            assert math.isnan(wild[cell].accuracy)
            assert math.isnan(wild[cell].loss)
        else:
            assert wild[cell].status == Status.DONE
            assert torch.equal(wild[cell].weight_FD, calm[cell].weight_FD)
            assert torch.equal(wild[cell].bias_D, calm[cell].bias_D)
            assert (wild[cell].accuracy, wild[cell].loss) == (calm[cell].accuracy, calm[cell].loss)


@pytest.mark.slow
def test_stitches_of_a_constant_sender_predict_the_most_frequent_class(fashion: Dataset) -> None:
    train, test = (
        torch.cat([(split.labels == label).nonzero().flatten()[:count] for label, count in ((6, 60), (1, 12), (3, 12))])
        for split in (fashion.train, fashion.test)
    )
    receiver = network("R1111", width=8)
    labels = fashion.train.labels[train], fashion.test.labels[test]
    constant = [
        [torch.ones(len(of_split), *position.shape, dtype=torch.float64) for position in receiver.positions]
        for of_split in labels
    ]
    source = ResidentSource.from_tensors(*constant, *labels)
    # a constant can be turned into any answer from the last two positions on; before them the receiver's own blocks
    # decide which answers a constant map can reach
    cells = [Cell(UNIT, i, j) for i in range(5) for j in (3, 4)]
    recipe = TrainingRecipe(name="small", epochs=20, batch_size=16, lr=0.01, momentum=0.9, weight_decay=0.01)
    results = train_group(frozen(receiver), source, cells, recipe, ORDER)
    assert [results[cell].accuracy for cell in cells] == [60 / 84] * len(cells)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(dtype: torch.dtype, fashion: Dataset) -> None:
    sender, receiver = network("R1111"), network("R1111", seed=1)
    model, source, cells = frozen(receiver, dtype), source_of(sender, fashion, dtype=dtype), all_cells(sender, receiver)
    first, second = (train_group(model, source, cells, RECIPE, ORDER) for _ in range(2))
    other = train_group(model, source, cells, RECIPE, ImageOrder(seed=1, block=8, window=16))
    for cell in cells:
        assert torch.equal(first[cell].weight_FD, second[cell].weight_FD)
        assert first[cell].loss == second[cell].loss
        assert not torch.equal(first[cell].weight_FD, other[cell].weight_FD)


def test_evaluation_covers_every_test_image_in_batches_of_any_size(fashion: Dataset) -> None:
    sender, receiver = network("R1111"), network("R1111", seed=1)
    source = source_of(sender, fashion, test=13)
    bank = bank_for(all_cells(sender, receiver), sender, receiver)
    model = frozen(receiver)
    accuracy, loss = evaluate(model, source.test, bank, images=100)
    in_parts = evaluate(model, source.test, bank, images=5)
    assert torch.equal(accuracy, in_parts[0])
    torch.testing.assert_close(loss, in_parts[1])
    logits = stitched_logits(receiver, ResidentSource(source.shapes, source.test, source.test), bank)
    expected = (logits.argmax(-1) == source.test.labels).double().mean(-1)
    torch.testing.assert_close(accuracy, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_a_step_runs_without_hardware_and_without_synchronising(kernel: str, masked: bool) -> None:
    """On the meta device every .item(), data-dependent branch or tensor left elsewhere is an error."""
    meta = torch.device("meta")
    sender, receiver = network("R1111"), network("R1122", seed=1)
    model = FrozenNetwork(receiver, dtype=torch.bfloat16, device=meta, masked=masked)
    images = torch.empty(12, 3, 32, 32, device=meta)
    provided = FrozenNetwork(sender, dtype=torch.bfloat16, device=meta).representations(images)
    labels = torch.empty(12, dtype=torch.int64, device=meta)
    source = ResidentSource.from_tensors(provided, provided, labels, labels)
    bank = StitchBank(
        all_cells(sender, receiver),
        source.shapes,
        [position.shape for position in receiver.positions],
        dtype=torch.bfloat16,
        device=meta,
        kernel=kernel,
    )
    cascade = Cascade(model, bank.counts, 8)
    optimizer = torch.optim.SGD([bank.parameters], lr=0.01, momentum=0.9, weight_decay=0.01)
    index = torch.empty(8, dtype=torch.int64, device=meta)
    loss = train_step(cascade, bank, source.train.batch(index), optimizer)
    assert loss.shape == (35,)
    assert loss.device == meta


def test_fewer_images_than_a_batch_are_refused(fashion: Dataset) -> None:
    sender = network("R1111")
    with pytest.raises(ConfigError, match="6 training images are fewer than one batch of 8 images: use batch_size=6"):
        train_group(frozen(sender), source_of(sender, fashion, train=6), [Cell(UNIT, 0, 0)], RECIPE, ORDER)
