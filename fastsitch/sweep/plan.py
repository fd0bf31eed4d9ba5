"""From a configuration to units, cells and groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from fastsitch.networks.names import NetworkName
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.sweep.config import SweepConfig


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


def unit_cells(unit: Unit, senders: int, receivers: int) -> list[Cell]:
    """All cells of a unit, for so many sender and receiver positions, by receiver position."""
    return [Cell(unit, i, j) for j in range(receivers) for i in range(senders)]


def split_groups(cells: Sequence[Cell], group_size: int) -> list[list[Cell]]:
    """Split a unit's cells into the fewest groups of at most ``group_size``, as equal as can be.

    Each takes every n-th cell, so that all have the same mix of receiver positions: the same memory and the same time.
    """
    groups = -(-len(cells) // group_size)
    return [list(cells[first::groups]) for first in range(groups)]
