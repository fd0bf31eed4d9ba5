"""The choice of a source on this machine, where it depends on how fast representations can be read and computed."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from fastsitch.activations.batch import Shape
from fastsitch.activations.files import forget, reading_rate
from fastsitch.activations.live import PASS_IMAGES, LiveSplit
from fastsitch.activations.store import ActivationStore
from fastsitch.data import Dataset
from fastsitch.files import free_space
from fastsitch.networks.names import NetworkName
from fastsitch.root import Root
from fastsitch.sweep.choose_source import (
    STORED_ITEMSIZE,
    SourceChoice,
    SourceRates,
    choose_source,
    elements,
    source_costs,
)
from fastsitch.sweep.config import SweepConfig
from fastsitch.sweep.plan import plan_units
from fastsitch.sweep.senders import Load, Representations

_SAMPLE_BYTES = 64 << 20


def choose_measured(
    root: Root,
    config: SweepConfig,
    shapes: Mapping[NetworkName, Sequence[Shape]],
    dataset: Dataset,
    load: Load,
    *,
    dtype: torch.dtype,
    device: torch.device,
    budget: int,
) -> SourceChoice:
    """The source of a sweep that begins now; see :func:`fastsitch.sweep.choose_source.choose_source`."""

    def rates() -> SourceRates:
        """Of the sender with the largest representations, or of the disk while it has no store."""
        name = max((planned.sender for planned in plan_units(config)), key=lambda name: elements(shapes[name]))
        path = root.store(config.dataset, name)
        store = ActivationStore.open(path) if path.exists() else None
        live = Representations(root, dataset, load, source="live", dtype=dtype, device=device)
        return SourceRates(
            read=reading_rate(path, _SAMPLE_BYTES) if store is None else store_rate(store),
            image=elements(shapes[name]) * STORED_ITEMSIZE if store is None else store.image_bytes,
            live=live_rate(live.live(name, dataset.train)),
        )

    costs = source_costs(
        root,
        config,
        shapes,
        images=(len(dataset.train), len(dataset.test)),
        pixels=dataset.train.images[0].numel(),
        itemsize=dtype.itemsize,
    )
    return choose_source(config, costs, available=budget, free_disk=free_space(root.disk), rates=rates)


def store_rate(store: ActivationStore) -> float:
    """Bytes per second of reading some training chunks of every position, spread over the store, from the disk."""
    pieces = max(1, _SAMPLE_BYTES // (len(store.positions) * (4 << 20)))
    read, seconds = 0, 0.0
    for position in store.positions:
        step = store.chunk_images("train", position.index)
        # the last chunk, which may be short, is left out where there are others
        chunks = max(1, store.sizes["train"] // step)
        for number in sorted({k * chunks // pieces for k in range(pieces)}):
            forget(store.path, store.chunk_file("train", position.index, number))
            begun = time.perf_counter()
            values = store.read("train", position.index, number * step, min((number + 1) * step, store.sizes["train"]))
            seconds += time.perf_counter() - begun
            read += values.nbytes
    return read / seconds


def live_rate(split: LiveSplit) -> float:
    """Images per second of running the sender; the median of 3, after one that warms up."""
    images = min(PASS_IMAGES, len(split))
    times = [_seconds(lambda: split.represent(slice(0, images)), split.labels.device) for _ in range(4)]
    return images / statistics.median(times[1:])


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
