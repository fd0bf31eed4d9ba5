"""Wherever representations come from, the engine gets the same images in the same order."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.live_source import LiveSource, LiveSplit, LiveSplitInOrder
from fastsitch.activations.ordered_split import OrderedSplit, ResidentSplitInOrder, StoredSplitInOrder
from fastsitch.activations.read_ahead import ReadAhead
from fastsitch.activations.representation_batch import Batch
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.activations.source import Source
from fastsitch.activations.store import ActivationStore
from fastsitch.activations.store_manifest import StoreIdentity
from fastsitch.activations.store_writer import writing
from fastsitch.activations.streamed_source import READ_AHEAD, StreamedSource
from fastsitch.chains.chain import Chain
from fastsitch.chains.position import Position
from fastsitch.data import Dataset, Split, Transform, Views
from fastsitch.errors import ConfigError, StoreError
from fastsitch.identity import torch_generator
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.engine import train_group
from tests.conftest import cli_environment, network
from tests.test_engine import ORDER, RECIPE, all_cells, assert_same, frozen
from tests.test_store import flip

CPU = torch.device("cpu")
NUMBERED = [(1, 1, 1), (1, 2, 2), (1, 1, 1)]


def write_store(path: Path, splits: dict[str, Sequence[Tensor]], dtype: str = "fp32") -> ActivationStore:
    """A store of representations (N, C, H, W), one tensor per position; labels are 0, 1, ... modulo 10."""
    positions = tuple(
        Position(index, f"position{index}", (x.shape[1], x.shape[2], x.shape[3]))
        for index, x in enumerate(splits["train"])
    )
    identity = StoreIdentity(
        network="R1111",
        dataset="fashion-mini",
        weights="",
        data="",
        normalisation={},
        dtype=dtype,
        compute="fp32",
        compress="none",
    )
    sizes = {name: len(tensors[0]) for name, tensors in splits.items()}
    with writing(path, identity, positions, sizes) as writer:
        for name, tensors in splits.items():
            for index, x in enumerate(tensors):
                writer.write(name, index, 0, x.permute(0, 2, 3, 1))
            numbers = torch.arange(sizes[name])
            writer.write_samples(name, numbers % 10, numbers)
    return ActivationStore.open(path)


def numbered(path: Path, train: int, test: int = 300) -> ActivationStore:
    """A store in which every value of an image is its number, plus a quarter of the number of the position."""
    return write_store(
        path,
        {
            name: [
                (torch.arange(images) + index / 4).view(-1, 1, 1, 1).expand(-1, *shape)
                for index, shape in enumerate(NUMBERED)
            ]
            for name, images in (("train", train), ("test", test))
        },
    )


def contents(batches: Iterator[Batch], shapes: Sequence[tuple[int, int, int]]) -> list[list[Tensor]]:
    """What each batch holds, copied before the next one is drawn."""
    return [
        [batch.labels.clone(), *(batch.operand(shape, 1, "torch")[0].clone() for shape in dict.fromkeys(shapes))]
        for batch in batches
    ]


def assert_equal(one: list[list[Tensor]], other: list[list[Tensor]]) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        for x, y in zip(first, second, strict=True):
            assert torch.equal(x, y)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == ReadAhead.THREAD]


@pytest.mark.parametrize(
    ("images", "batch", "order"),
    [
        (1000, 64, ImageOrder(seed=0)),
        (20_000, 256, ImageOrder(seed=1)),
        (16_384, 64, ImageOrder(seed=0)),
        (8_200, 100, ImageOrder(seed=2)),
        (3000, 100, ImageOrder(seed=0, window=512)),
        (3001, 7, ImageOrder(seed=3, window=300)),
        (2100, 700, ImageOrder(seed=0, window=256)),
        (1500, 64, ImageOrder(seed=0, block=64, window=128)),
    ],
)
def test_streaming_gives_the_images_of_the_resident_source(
    images: int, batch: int, order: ImageOrder, tmp_path: Path
) -> None:
    store = numbered(tmp_path / "R1111", images)
    resident = ResidentSource.load(store, dtype=torch.float64, device=CPU)
    store.reads.clear()
    streamed = StreamedSource(store, dtype=torch.float64, device=CPU)
    assert torch.equal(streamed.train.ids, torch.arange(images))
    for epoch in range(2):
        expected = contents(resident.train.shuffled(order, epoch, batch), NUMBERED)
        assert_equal(contents(streamed.train.shuffled(order, epoch, batch), NUMBERED), expected)
        # the values are the numbers of the images, so this is the order itself
        seen = torch.cat([batch[1][0].flatten() for batch in expected])
        assert torch.equal(seen.long(), order.epoch(epoch, images)[: len(seen)])
    assert_equal(contents(streamed.test.in_order(128), NUMBERED), contents(resident.test.in_order(128), NUMBERED))
    if order.block == ImageOrder.block:
        for index in range(len(NUMBERED)):
            for number in range(-(-images // store.chunk_images("train", index))):
                assert store.reads[f"train/{index}", number] == 2
            for number in range(2):
                assert store.reads[f"test/{index}", number] == 1


@pytest.mark.parametrize("images", [600, 6000])
def test_no_more_than_a_window_a_batch_and_a_few_blocks_are_in_memory(images: int, tmp_path: Path) -> None:
    store = numbered(tmp_path / "R1111", images)
    split = StreamedSource(store, dtype=torch.float32, device=CPU).train
    order, used = ImageOrder(seed=0, window=1024), 0
    for batch in split.shuffled(order, 0, 64):
        held = batch.operand((1, 1, 1), 1, "triton")[0].shape[1]
        assert held == min(images, 1024 + 64 + 256)
        if used % 1024 == 0:
            time.sleep(0.05)
        # the last chunk is smaller
        read = sum(
            times * min(256, images - 256 * chunk) for (name, chunk), times in store.reads.items() if name == "train/0"
        )
        assert read <= used + held + READ_AHEAD * 256
        used += len(batch)


def test_the_thread_sleeps_while_nothing_is_drawn(tmp_path: Path) -> None:
    split = StreamedSource(numbered(tmp_path / "R1111", 6000), dtype=torch.float32, device=CPU).train
    batches = split.shuffled(ImageOrder(seed=0, window=1024), 0, 64)
    next(batches)
    time.sleep(0.3)
    assert len(reading_threads()) == 1
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    batches.close()  # type: ignore[attr-defined]


def interrupt(batches: Iterator[Batch]) -> None:
    for _ in batches:
        raise KeyboardInterrupt


def fail(batches: Iterator[Batch]) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt(batches)


def drop(batches: Iterator[Batch]) -> None:
    next(batches)


def exhaust(batches: Iterator[Batch]) -> None:
    assert sum(1 for _ in batches) == 3000 // 64


@pytest.mark.parametrize("end", [fail, drop, exhaust])
def test_no_thread_outlives_its_iterator(end: Callable[[Iterator[Batch]], None], tmp_path: Path) -> None:
    split = StreamedSource(numbered(tmp_path / "R1111", 3000), dtype=torch.float32, device=CPU).train
    end(split.shuffled(ImageOrder(seed=0, window=512), 0, 64))
    assert reading_threads() == []
    # and what is left behind is no obstacle
    assert len(list(split.shuffled(ImageOrder(seed=0, window=512), 0, 64))) == 3000 // 64


def test_two_passes_at_once_do_not_meet(tmp_path: Path) -> None:
    split = StreamedSource(numbered(tmp_path / "R1111", 3000), dtype=torch.float32, device=CPU).train
    order = ImageOrder(seed=0, window=512)
    alone = contents(split.shuffled(order, 0, 64), NUMBERED)
    together = [
        contents(iter([first]), NUMBERED)[0]
        for first, _ in zip(split.shuffled(order, 0, 64), split.shuffled(order, 1, 64), strict=True)
    ]
    assert_equal(together, alone)


def test_damage_found_while_streaming_is_a_store_error(tmp_path: Path) -> None:
    split = StreamedSource(numbered(tmp_path / "R1111", 3000), dtype=torch.float32, device=CPU).train
    order = ImageOrder(seed=0, window=512)
    last = int(order.epoch(0, 3000)[-1]) // 256
    file = flip(tmp_path / "R1111" / "train" / "1" / f"{last}.0.0.0")
    drawn: list[Batch] = []
    with pytest.raises(StoreError, match="was altered or damaged .* make the store again") as caught:
        drawn.extend(split.shuffled(order, 0, 64))
    assert str(file) in str(caught.value)
    assert 0 < len(drawn) < 3000 // 64
    assert reading_threads() == []


MEASURE = """
import sys, torch
from pathlib import Path
from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.store import ActivationStore
from fastsitch.activations.streamed_source import StreamedSource
source = StreamedSource(ActivationStore.open(Path(sys.argv[1])), dtype=torch.bfloat16, device=torch.device("cpu"))
for epoch in range(2):
    for batch in source.train.shuffled(ImageOrder(seed=0, window=512), epoch, 64):
        batch.operand((4, 32, 32), 1, "torch")
for batch in source.test.in_order(128):
    batch.operand((4, 32, 32), 1, "torch")
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(status["VmHWM"].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_more_images_take_no_more_memory(tmp_path: Path) -> None:
    peaks, sizes = [], []
    # even the fewer ones are many windows, so that reading runs as far ahead as it ever does
    for times in (4, 14):
        x = torch.rand(1024 * times, 4, 32, 32, generator=torch_generator("memory"))
        store = write_store(tmp_path / f"times-{times}", {"train": [x], "test": [x[:256]]}, "bf16")
        line = [sys.executable, "-c", MEASURE, str(store.path)]
        ended = subprocess.run(line, env=cli_environment(), capture_output=True, text=True, check=True)
        peaks.append(int(ended.stdout) * 1024)
        sizes.append(store.bytes)
    assert sizes[1] - sizes[0] > 75_000_000
    assert peaks[1] - peaks[0] < 15_000_000


# what networks compute


def live_split(chain: Chain, data: Dataset, split: Split, images: int, dtype: torch.dtype = torch.float64) -> LiveSplit:
    few = Split(split.images[:images], split.labels[:images])
    return LiveSplit(frozen(chain), Transform(data.normalisation), few, stored=dtype, dtype=torch.float64)


def live_source(chain: Chain, data: Dataset) -> LiveSource:
    return LiveSource(live_split(chain, data, data.train, 60), live_split(chain, data, data.test, 21))


def resident_source(source: LiveSource) -> ResidentSource:
    splits = [split.represent(slice(0, len(split))) for split in (source.train, source.test)]
    return ResidentSource.from_tensors(*splits, source.train.labels, source.test.labels)


def trained(source: Source, chain: Chain, recipe: str = "small", augment: bool = False) -> list[CellResult]:
    receiver = network("R1112", seed=1)
    cells = all_cells(chain, receiver)[::3]
    chosen = replace(RECIPE, name=recipe, augment=augment)
    return list(train_group(frozen(receiver), source, cells, chosen, ORDER).values())


@pytest.mark.slow
def test_every_source_trains_the_same_stitches(fashion: Dataset, tmp_path: Path) -> None:
    chain = network("R1111")
    live = live_source(chain, fashion)
    resident = resident_source(live)
    for one, other in zip(trained(resident, chain), trained(live, chain), strict=True):
        assert_same(one, other)
    splits = {
        name: [x.float() for x in split.represent(slice(0, len(split)))]
        for name, split in (("train", live.train), ("test", live.test))
    }
    store = write_store(tmp_path / "R1111", splits)
    results = [
        trained(source, chain)
        for source in (
            ResidentSource.load(store, dtype=torch.float64, device=CPU),
            StreamedSource(store, dtype=torch.float64, device=CPU),
        )
    ]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.weight_FD, other.weight_FD)
        assert (one.accuracy, one.loss, one.train_loss) == (other.accuracy, other.loss, other.train_loss)


@pytest.mark.slow
def test_every_source_gives_the_same_images_in_order(fashion: Dataset, tmp_path: Path) -> None:
    split = live_split(network("R1111"), fashion, fashion.train, 300, torch.float32)
    whole = split.represent(slice(0, 300))
    store = write_store(tmp_path / "R1111", {"train": whole, "test": whole})
    ordered: list[OrderedSplit] = [
        ResidentSplitInOrder(ResidentSource.load(store, dtype=torch.float64, device=CPU)),
        StoredSplitInOrder(store, dtype=torch.float64, device=CPU),
        LiveSplitInOrder(split),
    ]
    for position in range(5):
        for start, stop in ((0, 64), (192, 256), (256, 300)):
            first, *others = (source.images(position, start, stop) for source in ordered)
            assert first.shape[0] == stop - start
            for other in others:
                torch.testing.assert_close(other, first, rtol=1e-6, atol=1e-6)
    for source in ordered:
        assert torch.equal(source.ids, torch.arange(300))
        assert len(source.labels) == 300


def test_what_a_live_sender_gives_went_through_the_stores_dtype(fashion: Dataset) -> None:
    rounded = live_split(network("R1111"), fashion, fashion.train, 4, torch.bfloat16).represent(slice(0, 4))
    exact = live_split(network("R1111"), fashion, fashion.train, 4).represent(slice(0, 4))
    for x, y in zip(rounded, exact, strict=True):
        assert x.dtype == torch.float64
        assert torch.equal(x, y.bfloat16().double())
        assert not torch.equal(x, y)


def test_a_view_depends_on_seed_epoch_and_number_alone(fashion: Dataset) -> None:
    split = live_split(network("R1111"), fashion, fashion.train, 48)

    def epoch(batch: int, epoch: int = 0, seed: int = 0, augment: bool = True) -> Tensor:
        order = ImageOrder(seed=seed, block=8, window=16)
        drawn = contents(split.shuffled(order, epoch, batch, augment=augment), split.shapes[:1])
        return torch.cat([x for _, x in drawn], 1)[0]

    first = epoch(8)
    torch.testing.assert_close(epoch(12), first, rtol=1e-12, atol=1e-12)
    plain = epoch(8, augment=False)
    assert not torch.equal(first, plain)
    # the images as the views show them, made without the source
    index = ImageOrder(seed=0, block=8, window=16).epoch(0, 48)
    views = Views.draw(48, 32, 32, torch_generator("views", 0, 0))
    x = views.apply(fashion.normalisation.apply(fashion.train.images[index]))
    expected = frozen(network("R1111")).representations(x)[0].permute(0, 2, 3, 1)
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-12)
    # another epoch or seed shows other views of the same images, not only another order
    for other, order in ((epoch(8, 1), (0, 1)), (epoch(8, 0, 1), (1, 0))):
        seen = ImageOrder(seed=order[0], block=8, window=16).epoch(order[1], 48)
        back, again = torch.argsort(index), torch.argsort(seen)
        same = (first[back] - other[again]).flatten(1).abs().amax(1) < 1e-9
        assert same.float().mean() < 0.2


def test_training_with_views_is_repeatable_and_leaves_the_test_images_alone(fashion: Dataset) -> None:
    chain = network("R1111")
    live = live_source(chain, fashion)
    first, second, plain = (trained(live, chain, augment=augment) for augment in (True, True, False))
    for one, again, other in zip(first, second, plain, strict=True):
        assert torch.equal(one.weight_FD, again.weight_FD)
        assert one.train_loss != other.train_loss
    found, expected = (contents(source.test.in_order(8), live.shapes) for source in (live, resident_source(live)))
    for one, other in zip(found, expected, strict=True):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_stored_representations_cannot_show_new_views(fashion: Dataset, tmp_path: Path) -> None:
    chain = network("R1111")
    live = live_source(chain, fashion)
    streamed = StreamedSource(numbered(tmp_path / "R1111", 300), dtype=torch.float64, device=CPU)
    for source in (resident_source(live), streamed):
        with pytest.raises(ConfigError, match="new views of the images .* use source='live'"):
            next(source.train.shuffled(ORDER, 0, 8, augment=True))
