"""Units and cells: what is trained, and what it is called for ever."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True, kw_only=True)
class Unit:
    """What is scheduled, saved and resumed as one: all cells of one pair, setting, loss and seed."""

    sender: str
    receiver: str
    setting: str
    loss: str
    seed: int

    @property
    def pair(self) -> str:
        """``SENDER--RECEIVER.SETTING``, the name of the pair's exported files."""
        return f"{self.sender}--{self.receiver}.{self.setting}"

    @property
    def name(self) -> str:
        """The name of the unit's own files."""
        return f"{self.pair}.{self.loss}.seed{self.seed}"


@dataclass(frozen=True, order=True)
class Cell:
    """One stitch: from sender position i into receiver position j of a unit."""

    unit: Unit
    i: int
    j: int

    @property
    def identity(self) -> tuple[str | int, ...]:
        """What the stitch's initial weights depend on, and nothing else does."""
        unit = self.unit
        return ("stitch", unit.sender, self.i, unit.receiver, self.j, unit.setting, unit.loss, unit.seed)
