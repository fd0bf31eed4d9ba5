"""Names of networks: ``R1111``, ``R1111@3`` (seed 3), ``R1111-random@0`` (an untrained control)."""

import re
from dataclasses import dataclass
from itertools import product

from fastsitch.errors import NetworkError

BLOCKS: dict[str, tuple[int, ...]] = {
    **{"R" + "".join(map(str, blocks)): blocks for blocks in product((1, 2), repeat=4)},
    "ResNet18": (2, 2, 2, 2),
    "ResNet34": (3, 4, 6, 3),
}
"""Residual blocks per stage of every built-in architecture."""

_NAME = re.compile(r"(?P<architecture>[A-Za-z0-9]+)(?P<random>-random)?(@(?P<seed>\d{1,9}))?")


@dataclass(frozen=True, order=True)
class NetworkName:
    """One network of a data set: architecture, whether it is an untrained control, seed."""

    architecture: str
    random: bool = False
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> "NetworkName":
        """Read a name; raises NetworkError with the known architectures when there is no such network."""
        match = _NAME.fullmatch(text.strip())
        if match is None or match["architecture"] not in BLOCKS:
            raise NetworkError(
                f"unknown network {text!r}: expected an architecture out of R1111 ... R2222 (each digit 1 or 2), "
                "ResNet18, ResNet34, with an optional seed as in R1111@3 or control as in R1111-random@0"
            )
        return cls(match["architecture"], match["random"] is not None, int(match["seed"] or 0))

    def __str__(self) -> str:
        text = self.architecture + ("-random" if self.random else "")
        return f"{text}@{self.seed}" if self.random or self.seed else text

    def control(self, seed: int) -> "NetworkName":
        """The untrained control of this architecture with the given seed."""
        return NetworkName(self.architecture, True, seed)
