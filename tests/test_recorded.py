"""Recorded training steps, as far as they can be tested without CUDA. bench/gpu.py replays real recordings."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastsitch.activations.representation_batch import Batch
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.activations.streamed_source import StreamedSource
from fastsitch.data import Dataset
from fastsitch.stitching import recorded_step as recorded
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.engine import set_rate, stitch_bank, stitch_optimizer, train_group
from fastsitch.stitching.recorded_step import WARM_UP, RecordedStep
from tests.conftest import network
from tests.test_engine import CPU, ORDER, RECIPE, all_cells, frozen, source_of
from tests.test_sources import live_source, write_store

IMAGES = 40
STEPS = 2 * (IMAGES // RECIPE.batch_size)


def assert_same(one: Mapping[Cell, CellResult], other: Mapping[Cell, CellResult]) -> None:
    assert one.keys() == other.keys()
    for cell, result in one.items():
        assert torch.equal(result.weight_FD, other[cell].weight_FD), cell
        assert torch.equal(result.bias_D, other[cell].bias_D), cell
        assert (result.accuracy, result.loss, result.train_loss) == (
            other[cell].accuracy,
            other[cell].loss,
            other[cell].train_loss,
        )


class Recorder:
    """Stands for a device that records: a replay does again what was recorded, from the memory it was recorded with."""

    def __init__(self, losses: int) -> None:
        self.losses = losses
        self.recordings = 0
        self.replays = 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recordings += 1
        result = torch.full((self.losses,), float("nan"), dtype=torch.float64)

        def replay() -> None:
            self.replays += 1
            result.copy_(work())

        return replay, result


def test_replayed_steps_train_the_same_stitches(fashion: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = network("R1111", width=4), network("R1111", width=4, seed=1)
    source, cells = source_of(sender, fashion, train=IMAGES), all_cells(sender, receiver)
    plain = train_group(frozen(receiver), source, cells, RECIPE, ORDER)
    recorder = Recorder(len(cells))
    monkeypatch.setattr(recorded, "_recorder", lambda device: recorder)
    assert_same(train_group(frozen(receiver), source, cells, RECIPE, ORDER), plain)
    assert (recorder.recordings, recorder.replays) == (1, STEPS - WARM_UP)


def test_a_streamed_source_is_recorded_once_for_all_epochs(
    fashion: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sender, receiver = network("R1111", width=4), network("R1111", width=4, seed=1)
    model, cells = frozen(sender, torch.float32), all_cells(sender, receiver)
    splits = {
        name: model.representations(fashion.normalisation.apply(split.images[:IMAGES], torch.float32))
        for name, split in (("train", fashion.train), ("test", fashion.test))
    }
    store = write_store(tmp_path / "store", splits)

    def train() -> Mapping[Cell, CellResult]:
        source = StreamedSource(store, dtype=torch.float32, device=CPU)
        return train_group(frozen(receiver, torch.float32), source, cells, RECIPE, ORDER)

    plain = train()
    recorder = Recorder(len(cells))
    monkeypatch.setattr(recorded, "_recorder", lambda device: recorder)
    assert_same(train(), plain)
    assert (recorder.recordings, recorder.replays) == (1, STEPS - WARM_UP)


def test_a_live_source_is_recorded_once_for_all_epochs(fashion: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = network("R1111", width=4), network("R1111", width=4, seed=1)
    cells, recipe = all_cells(sender, receiver), replace(RECIPE, augment=True)
    plain = train_group(frozen(receiver), live_source(sender, fashion), cells, recipe, ORDER)
    recorder = Recorder(len(cells))
    monkeypatch.setattr(recorded, "_recorder", lambda device: recorder)
    assert_same(train_group(frozen(receiver), live_source(sender, fashion), cells, recipe, ORDER), plain)
    assert (recorder.recordings, recorder.replays) == (1, 2 * (60 // recipe.batch_size) - WARM_UP)


def test_two_passes_of_a_live_source_never_share_memory(fashion: Dataset) -> None:
    train = live_source(network("R1111", width=4), fashion).train
    one, other = (train.shuffled(ORDER, epoch, 8) for epoch in (0, 1))
    shape = train.shapes[0]
    drawn = next(one), next(other)
    # read after both were drawn
    found = [batch.values(shape, 0).clone() for batch in drawn]
    expected = [next(train.shuffled(ORDER, epoch, 8)).values(shape, 0).clone() for epoch in (0, 1)]
    assert not torch.equal(*expected)
    assert all(torch.equal(values, true) for values, true in zip(found, expected, strict=True))


def batches(source: ResidentSource, numbers: Iterable[int]) -> list[Batch]:
    return [source.train.batch(torch.tensor([number])) for number in numbers]


def test_batches_at_other_addresses_are_not_replayed() -> None:
    """The step returns the number of each image in its batch."""

    def numbered(first: int) -> ResidentSource:
        x = torch.arange(first, first + 100, dtype=torch.float64).view(-1, 1, 1, 1)
        labels = torch.zeros(100, dtype=torch.int64)
        return ResidentSource.from_tensors([x], [x], labels, labels)

    recorder = Recorder(1)
    step = RecordedStep(lambda batch: batch.values((1, 1, 1), 0).flatten().clone(), CPU, recorder)
    one, other = numbered(0), numbered(1000)
    found = [step(batch).item() for batch in batches(one, range(10))]
    assert (found, recorder.recordings, recorder.replays) == (list(range(10)), 1, 10 - WARM_UP)
    found = [step(batch).item() for batch in batches(other, range(WARM_UP))]
    assert (found, recorder.recordings) == ([1000 + k for k in range(WARM_UP)], 1)
    found = [step(batch).item() for batch in batches(other, range(50, 54))]
    assert (found, recorder.recordings, recorder.replays) == ([1050, 1051, 1052, 1053], 2, 10 - WARM_UP + 4)
    # another size in the same memory
    two = step(other.train.batch(torch.tensor([7, 3])))
    assert (two.tolist(), recorder.recordings) == ([1007, 1003], 2)


def test_a_step_that_cannot_be_recorded_runs_as_it_is(
    fashion: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sender, receiver = network("R1111", width=4), network("R1111", width=4, seed=1)
    source, cells = source_of(sender, fashion, train=IMAGES), all_cells(sender, receiver)
    tries = []
    monkeypatch.setattr(recorded, "_refusals", [])

    def refuse(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        tries.append(work)
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    monkeypatch.setattr(recorded, "_recorder", lambda device: refuse)
    with caplog.at_level(logging.INFO):
        refused = train_group(frozen(receiver), source, cells, RECIPE, ORDER)
    assert len(tries) == 1
    (line,) = [record.getMessage() for record in caplog.records if "not recorded" in record.getMessage()]
    assert re.search(r"\(operation not permitted when stream is capturing\)$", line)
    # after a few groups this process tries no more
    for _ in range(recorded.MOST_REFUSALS):
        train_group(frozen(receiver), source, cells[:2], RECIPE, ORDER)
    assert len(tries) == recorded.MOST_REFUSALS
    monkeypatch.setattr(recorded, "_recorder", lambda device: None)
    assert_same(train_group(frozen(receiver), source, cells, RECIPE, ORDER), refused)


def test_a_rate_on_the_device_is_changed_where_a_recording_reads_it(fashion: Dataset) -> None:
    sender, receiver = network("R1111", width=4), network("R1111", width=4, seed=1)
    source, cells = source_of(sender, fashion), all_cells(sender, receiver)
    parameters = []
    for tensor in (False, True):
        bank = stitch_bank(frozen(receiver), source, cells, "torch")
        optimizer = stitch_optimizer(bank, RECIPE)
        if tensor:
            optimizer.param_groups[0]["lr"] = torch.tensor(RECIPE.lr, dtype=torch.float64)
        rate = optimizer.param_groups[0]["lr"]
        for changed in (0.25, 0.5):
            set_rate(optimizer, changed)
            assert bank.parameters.grad is not None
            bank.parameters.grad.copy_(bank.parameters)
            optimizer.step()
        assert (optimizer.param_groups[0]["lr"] is rate) == tensor
        parameters.append(bank.parameters.clone())
    assert torch.equal(*parameters)


def test_nothing_is_recorded_on_a_cpu(fashion: Dataset) -> None:
    source = source_of(network("R1111", width=4), fashion)
    step = RecordedStep(lambda batch: batch.labels.clone(), CPU)
    for _ in range(2 * WARM_UP):
        batch = source.train.batch(torch.arange(3))
        assert step(batch).equal(batch.labels)
    assert step._record is None
