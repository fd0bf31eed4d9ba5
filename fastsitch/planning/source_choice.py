"""Which source a sweep draws its representations from, and why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastsitch.activations.representation_batch import Shape
from fastsitch.activations.resident_source import MEMORY_LIMIT
from fastsitch.activations.stream_plan import stream_capacity
from fastsitch.activations.streamed_source import READ_AHEAD
from fastsitch.chains import layout
from fastsitch.errors import ConfigError, MemoryLimitError, argument
from fastsitch.root import Root
from fastsitch.runs.sweep_config import SweepConfig
from fastsitch.runs.sweep_plan import SweepPlan
from fastsitch.vocabulary import SourceName

RESIDENT_SHARE = 0.5
"""Share of the free memory that resident representations may take when the source is chosen automatically."""

STORED_ITEMSIZE = 2
"""Bytes per value of a store that a sweep makes itself."""


@dataclass(frozen=True, kw_only=True)
class SourceCosts:
    """What the sources of a sweep take, in bytes."""

    memory: Mapping[str, int]
    """By source: what the sender that needs most of it holds in the device's memory, beside it the receiver's
    representations where stitches are trained on them."""
    missing: int
    """Disk for the stores that do not exist yet, beyond what interrupted attempts at them take already."""


@dataclass(frozen=True, kw_only=True)
class SourceRates:
    """How fast a sender's representations can be had."""

    read: float
    """Bytes per second read from the disk."""
    image: int
    """Bytes of one image at every position, as stored."""
    live: float
    """Images per second that the sender computes."""


@dataclass(frozen=True, kw_only=True)
class SourceChoice:
    """A source, one line that says why, and the bytes it holds in the device's memory."""

    name: SourceName
    reason: str
    memory: int


def source_costs(root: Root, plan: SweepPlan, *, images: tuple[int, int], pixels: int, itemsize: int) -> SourceCosts:
    """Costs for so many training and test images of so many bytes each, in a compute dtype of ``itemsize`` bytes."""
    config, units, shapes = plan.config, plan.units, plan.shapes
    # matching by training draws from two networks at a time
    drawn = [
        [unit.sender_network, unit.receiver_network] if config.regresses else [unit.sender_network] for unit in units
    ]
    largest = max(sum(elements(shapes[name]) for name in names) for names in drawn)
    batch = config.recipe.batch_size
    # training draws single batches, evaluation pairs of them
    train = stream_capacity(images[0], batch, block=config.block, window=config.window)
    test = stream_capacity(images[1], 2 * batch, block=config.block, window=0)
    ahead = READ_AHEAD * config.block * STORED_ITEMSIZE
    return SourceCosts(
        memory={
            "resident": largest * sum(images) * itemsize,
            "streamed": largest * ((train + test) * itemsize + ahead),
            # once as the sender gives it, once stacked by shape
            "live": len(drawn[0]) * pixels * sum(images) + 2 * largest * 2 * batch * itemsize,
        },
        missing=sum(
            root.store(config.dataset, name).disk_needed(elements(shapes[name]) * sum(images) * STORED_ITEMSIZE)
            for name in config.stored_networks(units)
        ),
    )


def choose_source(
    config: SweepConfig,
    costs: SourceCosts,
    *,
    available: int,
    free_disk: int,
    disk: Path | None = None,
    rates: Callable[[], SourceRates] | None = None,
) -> SourceChoice:
    """The source of a sweep, given the bytes free in the device's memory and on the ``disk`` that stores are made on.

    ``rates`` is asked where speed decides. Raises MemoryLimitError or ConfigError when a source that was asked for by
    name cannot work. Without ``rates`` it is a prediction: nothing is refused, and streaming is taken to be faster.
    """
    where = f" in {disk}" if disk is not None else ""
    missing = f"stores that are missing need {_size(costs.missing)} of disk, {_size(free_disk)} are free{where}"
    fits_disk = costs.missing <= free_disk

    def choice(name: SourceName, why: str) -> SourceChoice:
        return SourceChoice(name=name, reason=f"{name}: {why}", memory=costs.memory[name])

    if config.augments:
        return choice("live", f"recipe {config.recipe.name} shows new views of the images in every epoch")
    if config.source != "auto":
        if rates is not None:
            _require_possible(config, costs, available)
            if config.source != "live" and not fits_disk:
                raise ConfigError(
                    f"{argument('source', config.source)}: {missing}: free some disk, or use "
                    f"{argument('source', 'live')}"
                )
        return choice(config.source, f"as asked for, {_size(costs.memory[config.source])} of memory")
    share = RESIDENT_SHARE * available
    resident = f"{_size(costs.memory['resident'])} fit into {_size(share)}"
    if not fits_disk:
        return choice("live", missing)
    if costs.memory["resident"] <= share:
        return choice("resident", resident)
    too_large = resident.replace("fit", "do not fit")
    if costs.memory["streamed"] > MEMORY_LIMIT * available:
        return choice("live", f"{too_large}, nor does a window of {_size(costs.memory['streamed'])}")
    if rates is None:
        return choice("streamed", f"{too_large}; or live, if that is faster when the run begins")
    measured = rates()
    read = measured.read / measured.image
    reading = f"reading {measured.read / 1e9:.1f} GB/s = {read:,.0f} images/s"
    living = f"{measured.live:,.0f} images/s live"
    if read >= measured.live:
        return choice("streamed", f"{too_large}; {reading} against {living}")
    return choice("live", f"{too_large}; {living} against {reading}")


def _require_possible(config: SweepConfig, costs: SourceCosts, available: int) -> None:
    """Raise MemoryLimitError where the source that was asked for by name takes too much memory."""
    needed, limit = costs.memory[config.source], MEMORY_LIMIT * available
    if needed > limit:
        others = [name for name in ("streamed", "live") if costs.memory[name] <= limit]
        remedy = (
            "use " + " or ".join(argument("source", name) for name in others)
            if others
            else f"allow more, or use a smaller {argument('batch_size')}"
        )
        raise MemoryLimitError(
            f"{argument('source', config.source)} needs {_size(needed)} of memory, a sweep may take "
            f"{_size(available)}: {remedy}"
        )


def elements(shapes: Sequence[Shape]) -> int:
    """Values of one image at all positions."""
    return sum(map(layout.elements, shapes))


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
