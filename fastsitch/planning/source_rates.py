"""The choice of a source on this machine, where it depends on how fast representations can be read and computed."""

import time

import torch

from fastsitch.activations.live_source import LiveSplit
from fastsitch.activations.represent import PASS_IMAGES
from fastsitch.activations.representations import Load, Representations
from fastsitch.activations.store import ActivationStore
from fastsitch.chains.chain_flops import chain_flops
from fastsitch.data import Dataset
from fastsitch.files import free_space
from fastsitch.network_names import NetworkName
from fastsitch.planning.source_choice import SourceChoice, SourceRates, choose_source, source_costs
from fastsitch.root import Root
from fastsitch.runs.sweep_plan import SweepPlan
from fastsitch.timing import median_seconds

_SAMPLE_BYTES = 64 << 20


def choose_measured(
    root: Root,
    plan: SweepPlan,
    dataset: Dataset,
    load: Load,
    *,
    dtype: torch.dtype,
    device: torch.device,
    budget: int,
) -> SourceChoice:
    """The sources of a sweep that begins now; see :func:`fastsitch.planning.source_choice.choose_source`."""
    disk: list[float] = []

    def rates(name: NetworkName) -> SourceRates:
        """Of a sender: from its store, or of the disk while it has none."""
        folder = root.store(plan.config.dataset, name)
        if folder.exists():
            read = store_rate(ActivationStore.open(folder))
        else:
            # the same for all that have none
            disk.extend([] if disk else [folder.reading_rate(_SAMPLE_BYTES)])
            read = disk[0]
        network = load(name)
        live = Representations(
            root, dataset, load, source=lambda _: "live", chosen=plan.chosen, dtype=dtype, device=device
        )
        return SourceRates(
            read=read,
            live=live_rate(live.live(name, dataset.train)),
            flops=sum(chain_flops(network.chain)[:-1]),
        )

    costs = source_costs(
        root,
        plan,
        images=(len(dataset.train), len(dataset.test)),
        pixels=dataset.train.image_bytes,
        itemsize=dtype.itemsize,
    )
    return choose_source(
        plan.config, costs, available=budget, free_disk=free_space(root.disk), disk=root.disk, rates=rates
    )


def store_rate(store: ActivationStore) -> float:
    """Bytes per second of reading some training chunks of every position, spread over the store, from the disk."""
    pieces = max(1, _SAMPLE_BYTES // (len(store.positions) * (4 << 20)))
    read, seconds = 0, 0.0
    for position in store.positions:
        step = store.chunk_images("train", position.index)
        # the last chunk, which may be short, is left out where there are others
        chunks = max(1, store.sizes["train"] // step)
        for number in sorted({k * chunks // pieces for k in range(pieces)}):
            store.path.forget(store.chunk_file("train", position.index, number))
            begun = time.perf_counter()
            values = store.read("train", position.index, number * step, min((number + 1) * step, store.sizes["train"]))
            seconds += time.perf_counter() - begun
            read += values.nbytes
    return read / seconds


def live_rate(split: LiveSplit) -> float:
    """Images per second of running the sender; the median of 3, after one that warms up."""
    images = min(PASS_IMAGES, len(split))
    return images / median_seconds(lambda: split.represent(slice(0, images)), split.labels.device, calls=3)
