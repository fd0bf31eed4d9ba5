"""From a configuration to units, cells and groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from fastsitch.networks.names import NetworkName
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.geometry import Shape
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
    """Split a unit's cells into the fewest groups of at most ``group_size``, as equal as can be."""
    groups = -(-len(cells) // group_size)
    bounds = [round(k * len(cells) / groups) for k in range(groups + 1)]
    return [list(cells[start:end]) for start, end in pairwise(bounds)]


def group_memory(counts: Sequence[int], receiver: Sequence[Shape], batch_size: int, itemsize: int) -> int:
    """Predicted peak bytes of a training step with ``counts[j]`` stitches into receiver position j.

    A model: the receiver's batch at every position and the inner ReLU of every block are kept; on the way back,
    gradients of the block at work. Parameters and the mini-batch are small beside these and left out.
    """
    kept, working, carried = 0, 0, 0
    for count, shape in zip(counts, receiver, strict=True):
        size = shape[0] * shape[1] * shape[2] * batch_size * itemsize
        stitches = carried + count
        kept += (stitches + carried) * size
        working = max(working, (stitches + 3 * carried) * size)
        carried = stitches
    return kept + working


def automatic_group_size(
    pairs: Sequence[tuple[int, Sequence[Shape]]], batch_size: int, itemsize: int, budget: int
) -> int:
    """The largest group size that fits ``budget`` bytes for every pair (sender positions, receiver shapes).

    Judged by a group of cells into position 0, the most expensive one.
    """
    most = max(senders * len(shapes) for senders, shapes in pairs)
    per_cell = max(group_memory([1] + [0] * (len(shapes) - 1), shapes, batch_size, itemsize) for _, shapes in pairs)
    return max(1, min(most, budget // per_cell))
