"""From a configuration to units, cells and groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product

from fastsitch.errors import ConfigError
from fastsitch.networks.layout import Shape
from fastsitch.networks.names import NetworkName
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.sweep.config import SweepConfig

Positions = Mapping[NetworkName, Sequence[tuple[str, Shape]]]
"""Name and shape of every position of every network in a sweep."""


@dataclass(frozen=True)
class PlannedUnit:
    """A unit, and the two networks it really joins: controls stand in where the setting says R."""

    unit: Unit
    sender: NetworkName
    receiver: NetworkName


def plan_units(config: SweepConfig) -> list[PlannedUnit]:
    """All units of a sweep, the sender outermost, so that its representations are loaded once."""
    units = []
    for sender, setting, receiver, seed in product(config.senders, config.settings, config.receivers, config.seeds):
        unit = Unit(sender=sender, receiver=receiver, setting=setting, loss=config.loss, seed=seed)
        units.append(PlannedUnit(unit, *networks_of(unit)))
    order = list(dict.fromkeys(planned.sender for planned in units))
    return sorted(units, key=lambda planned: order.index(planned.sender))


def networks_of(unit: Unit) -> tuple[NetworkName, NetworkName]:
    """The networks a unit joins. Controls of senders have seed 0, of receivers 1, so that R2R joins two networks."""
    sender, receiver = NetworkName.parse(unit.sender), NetworkName.parse(unit.receiver)
    return (
        sender if unit.setting[0] == "T" else sender.control(0),
        receiver if unit.setting[-1] == "T" else receiver.control(1),
    )


def unit_cells(unit: Unit, senders: Sequence[int], receivers: Sequence[int]) -> list[Cell]:
    """The cells of a unit at these sender and receiver positions, by receiver position."""
    return [Cell(unit, i, j) for j in receivers for i in senders]


def chosen_positions(names: Sequence[str], patterns: Sequence[str]) -> list[int]:
    """The positions whose names match one of the patterns, by index; all where there is no pattern."""
    return [
        k for k, name in enumerate(names) if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


def planned_cells(config: SweepConfig, planned: PlannedUnit, positions: Positions) -> list[Cell]:
    """The cells of a unit that the sweep asks for, by receiver position."""
    senders, receivers = (
        chosen_positions([name for name, _ in positions[network]], config.positions)
        for network in (planned.sender, planned.receiver)
    )
    return unit_cells(planned.unit, senders, receivers)


def require_positions(config: SweepConfig, positions: Positions) -> None:
    """Raise ConfigError for a pattern that no network has a position for, and a network that no pattern matches."""
    names = {str(network): tuple(name for name, _ in own) for network, own in positions.items()}
    known = list(dict.fromkeys(name for own in names.values() for name in own))
    asked = f"--positions {','.join(config.positions)}"
    unknown = [pattern for pattern in config.positions if not chosen_positions(known, [pattern])]
    if unknown:
        raise ConfigError(
            f"{asked}: no network of the sweep has a position {' or '.join(unknown)}: expected some of "
            f"{', '.join(known)}"
        )
    alike: dict[tuple[str, ...], list[str]] = {}
    for network, own in names.items():
        if not chosen_positions(own, config.positions):
            alike.setdefault(own, []).append(network)
    if alike:
        there = "; ".join(f"{', '.join(networks)} has {', '.join(own)}" for own, networks in alike.items())
        raise ConfigError(f"{asked}: a network has none of these: {there}")


def split_groups(cells: Sequence[Cell], group_size: int) -> list[list[Cell]]:
    """Split a unit's cells into the fewest groups of at most ``group_size``, as equal as can be.

    Each takes every n-th cell, so that all have the same mix of receiver positions: the same memory and the same time.
    """
    groups = -(-len(cells) // group_size)
    return [list(cells[first::groups]) for first in range(groups)]
