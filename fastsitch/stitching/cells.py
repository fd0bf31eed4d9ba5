"""Units and cells: what is trained, and the names that identify it."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastsitch.network_names import NetworkName
from fastsitch.vocabulary import Loss, Setting


@dataclass(frozen=True, order=True, kw_only=True)
class Unit:
    """What is scheduled, saved and resumed as one: all cells of one pair, setting, loss and seed.

    Attributes:
        sender: name of the network whose representations are sent.
        receiver: name of the network that receives them.
        setting: which of the two are trained: T2T, T2R, R2T or R2R (T trained, R randomly initialised).
        loss: "task" or "match".
        seed: of the stitches' initial weights and of the order of the images.
    """

    sender: str
    receiver: str
    setting: Setting
    loss: Loss
    seed: int

    @property
    def sender_network(self) -> NetworkName:
        """The network that is really run: where the setting says R, an untrained control, of seed 0 for senders."""
        name = NetworkName.parse(self.sender)
        return name if self.setting[0] == "T" else name.control(0)

    @property
    def receiver_network(self) -> NetworkName:
        """As :attr:`sender_network`; controls of receivers have seed 1, so that R2R joins two networks."""
        name = NetworkName.parse(self.receiver)
        return name if self.setting[-1] == "T" else name.control(1)

    @property
    def pair(self) -> str:
        """``SENDER--RECEIVER.SETTING``, the name of the pair's exported files."""
        return f"{self.sender}--{self.receiver}.{self.setting}"

    @property
    def name(self) -> str:
        """The name of the unit's files."""
        return f"{self.pair}.{self.loss}.seed{self.seed}"


@dataclass(frozen=True, order=True)
class Cell:
    """One stitch.

    Attributes:
        unit: the pair of networks, the setting, the loss and the seed.
        i: index of the position in the sender.
        j: index of the position in the receiver.
    """

    unit: Unit
    i: int
    j: int

    @property
    def identity(self) -> tuple[str | int, ...]:
        """All that the stitch's initial weights depend on."""
        unit = self.unit
        return ("stitch", unit.sender, self.i, unit.receiver, self.j, unit.setting, unit.loss, unit.seed)


def unit_cells(unit: Unit, senders: Sequence[int], receivers: Sequence[int]) -> list[Cell]:
    """The cells of a unit at these sender and receiver positions, by receiver position."""
    return [Cell(unit, i, j) for j in receivers for i in senders]


def split_groups(cells: Sequence[Cell], group_size: int) -> list[list[Cell]]:
    """Split a unit's cells into the fewest groups of at most ``group_size``, as equal as can be.

    Each takes every n-th cell, so that all have the same mix of receiver positions: the same memory and the same time.
    """
    groups = -(-len(cells) // group_size)
    return [list(cells[first::groups]) for first in range(groups)]
