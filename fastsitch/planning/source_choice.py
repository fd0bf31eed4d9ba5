"""Which source each sender of a sweep draws its representations from, and why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastsitch.activations.representation_batch import Shape
from fastsitch.activations.resident_source import MEMORY_LIMIT
from fastsitch.activations.stream_plan import stream_capacity
from fastsitch.activations.streamed_source import READ_AHEAD
from fastsitch.chains import layout
from fastsitch.errors import ConfigError, MemoryLimitError, argument
from fastsitch.network_names import NetworkName
from fastsitch.root import Root
from fastsitch.runs.sweep_config import SweepConfig
from fastsitch.runs.sweep_plan import SweepPlan
from fastsitch.vocabulary import SourceName

RESIDENT_SHARE = 0.5
"""Share of the free memory that resident representations may take when the source is chosen automatically."""

STORED_ITEMSIZE = 2
"""Bytes per value of a store that a sweep makes itself."""


@dataclass(frozen=True, kw_only=True)
class SenderCosts:
    """What the sources of one sender take, in bytes."""

    memory: Mapping[SourceName, int]
    """By source: what is held in the device's memory, beside it the representations of the receiver that has most of
    them where stitches are trained on them."""
    missing: int
    """Disk for its store, beyond what an interrupted attempt at it takes already; 0 where there is one."""
    image: int
    """Of one image, stored, at all positions that the sweep asks for."""


@dataclass(frozen=True, kw_only=True)
class SourceCosts:
    """What the sources of a sweep take."""

    senders: Mapping[NetworkName, SenderCosts]
    expected: int = 0
    """Disk for the stores of receivers that are missing, where stitches are matched, in bytes."""

    def memory(self, source: SourceName) -> int:
        """Of the sender that needs most of it."""
        return max(costs.memory[source] for costs in self.senders.values())

    @property
    def missing(self) -> int:
        """Disk for all stores that do not exist yet, in bytes."""
        return self.expected + sum(costs.missing for costs in self.senders.values())


@dataclass(frozen=True, kw_only=True)
class SourceRates:
    """How fast a sender's representations can be had."""

    read: float
    """Bytes per second read from the disk."""
    live: float
    """Images per second that the sender computes."""
    flops: float = 0.0
    """Of computing one image; 0 where they are not known."""


@dataclass(frozen=True, kw_only=True)
class SourceChoice:
    """A source for every sender, one line that says why, and the bytes they hold in the device's memory at most."""

    senders: Mapping[NetworkName, SourceName]
    reason: str
    memory: int
    largest: NetworkName
    """The sender with most representations, whose source is that of networks which are not senders."""

    @property
    def name(self) -> SourceName:
        """The source of the largest sender."""
        return self.senders[self.largest]

    @property
    def others(self) -> dict[str, SourceName]:
        """The senders that have another one."""
        return {str(name): source for name, source in self.senders.items() if source != self.name}

    @property
    def stored(self) -> bool:
        """Whether any sender has a store."""
        return any(source != "live" for source in self.senders.values())


def source_costs(root: Root, plan: SweepPlan, *, images: tuple[int, int], pixels: int, itemsize: int) -> SourceCosts:
    """Costs for so many training and test images of so many bytes each, in a compute dtype of ``itemsize`` bytes."""
    config, units = plan.config, plan.units
    batch = config.recipe.batch_size
    # training draws single batches, evaluation pairs of them
    train = stream_capacity(images[0], batch, block=config.block, window=config.window)
    test = stream_capacity(images[1], 2 * batch, block=config.block, window=0)
    ahead = READ_AHEAD * config.block * STORED_ITEMSIZE

    def missing(name: NetworkName) -> int:
        stored = elements(plan.held(name)) * sum(images) * STORED_ITEMSIZE
        return root.store(config.dataset, name).disk_needed(stored)

    senders = {}
    for name in dict.fromkeys(unit.sender_network for unit in units):
        # matching by training draws from two networks at a time
        receivers = {unit.receiver_network for unit in units if config.regresses and unit.sender_network == name}
        largest = elements(plan.held(name)) + max((elements(plan.held(other)) for other in receivers), default=0)
        senders[name] = SenderCosts(
            memory={
                "resident": largest * sum(images) * itemsize,
                "streamed": largest * ((train + test) * itemsize + ahead),
                # once as the sender gives it, once stacked by shape
                "live": (1 + config.regresses) * pixels * sum(images) + 2 * largest * 2 * batch * itemsize,
            },
            missing=missing(name),
            image=elements(plan.held(name)) * STORED_ITEMSIZE,
        )
    expected = [name for name in config.stored_networks(units) if name not in senders]
    return SourceCosts(senders=senders, expected=sum(map(missing, expected)))


def choose_source(
    config: SweepConfig,
    costs: SourceCosts,
    *,
    available: int,
    free_disk: int,
    disk: Path | None = None,
    rates: Callable[[NetworkName], SourceRates] | None = None,
) -> SourceChoice:
    """The source of every sender, given the bytes free in the device's memory and on the ``disk`` of the stores.

    ``rates`` is asked where speed decides. Raises MemoryLimitError or ConfigError when a source that was asked for by
    name cannot work. Without ``rates`` it is a prediction: nothing is refused, and streaming is taken to be faster.
    """
    where = f" in {disk}" if disk is not None else ""

    def room(missing: int) -> str:
        return f"stores that are missing need {_size(missing)} of disk, {_size(free_disk)} are free{where}"

    if config.augments:
        return _alike(costs, "live", f"recipe {config.recipe.name} shows new views of the images in every epoch")
    if config.source != "auto":
        if rates is not None:
            _require_possible(config, costs, available)
            if config.source != "live" and costs.missing > free_disk:
                raise ConfigError(
                    f"{argument('source', config.source)}: {room(costs.missing)}: free some disk, or use "
                    f"{argument('source', 'live')}"
                )
        return _alike(costs, config.source, f"as asked for, {_size(costs.memory(config.source))} of memory")
    chosen: dict[NetworkName, tuple[SourceName, str]] = {}
    left = free_disk - costs.expected
    for name, sender in costs.senders.items():
        if sender.missing > left:
            chosen[name] = "live", room(sender.missing + free_disk - left)
            continue
        chosen[name] = _of_sender(sender, available, None if rates is None else lambda name=name: rates(name))  # type: ignore[misc]
        if chosen[name][0] != "live":
            left -= sender.missing
    return _of_each(costs, chosen)


def _of_sender(costs: SenderCosts, available: int, rates: Callable[[], SourceRates] | None) -> tuple[SourceName, str]:
    """Where the disk has room for its store."""
    share = RESIDENT_SHARE * available
    resident = f"{_size(costs.memory['resident'])} fit into {_size(share)}"
    if costs.memory["resident"] <= share:
        return "resident", resident
    too_large = resident.replace("fit", "do not fit")
    if costs.memory["streamed"] > MEMORY_LIMIT * available:
        return "live", f"{too_large}, nor does a window of {_size(costs.memory['streamed'])}"
    if rates is None:
        return "streamed", f"{too_large}; or live, if that is faster when the run begins"
    measured = rates()
    read = measured.read / costs.image
    reading = f"reading {measured.read / 1e9:.1f} GB/s = {read:,.0f} images/s"
    living = f"{measured.live:,.0f} images/s live"
    if measured.flops:
        # the same comparison: FLOPs per byte of a position's store against those that the machine does meanwhile
        here = measured.live * measured.flops / measured.read
        living += f" ({measured.flops / costs.image:,.0f} FLOPs per stored byte, {here:,.0f} in the time of reading it)"
    if read >= measured.live:
        return "streamed", f"{too_large}; {reading} against {living}"
    return "live", f"{too_large}; {living} against {reading}"


def _alike(costs: SourceCosts, source: SourceName, why: str) -> SourceChoice:
    """One source for all."""
    return SourceChoice(
        senders=dict.fromkeys(costs.senders, source),
        reason=f"{source}: {why}",
        memory=costs.memory(source),
        largest=_largest(costs),
    )


def _of_each(costs: SourceCosts, chosen: Mapping[NetworkName, tuple[SourceName, str]]) -> SourceChoice:
    largest = _largest(costs)
    if len({source for source, _ in chosen.values()}) == 1:
        source, why = chosen[largest]
        reason = f"{source}: {why}"
    else:
        reason = "; ".join(f"{name} {source}: {why}" for name, (source, why) in chosen.items())
    return SourceChoice(
        senders={name: source for name, (source, _) in chosen.items()},
        reason=reason,
        memory=max(costs.senders[name].memory[source] for name, (source, _) in chosen.items()),
        largest=largest,
    )


def _largest(costs: SourceCosts) -> NetworkName:
    return max(costs.senders, key=lambda name: costs.senders[name].memory["resident"])


def _require_possible(config: SweepConfig, costs: SourceCosts, available: int) -> None:
    """Raise MemoryLimitError where the source that was asked for by name takes too much memory."""
    needed, limit = costs.memory(config.source), MEMORY_LIMIT * available
    if needed > limit:
        smaller: tuple[SourceName, ...] = ("streamed", "live")
        others = [name for name in smaller if costs.memory(name) <= limit]
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
