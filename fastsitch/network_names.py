"""Names of networks: ``R1111``, ``R1111@3`` (seed 3), ``R1111-random@0`` (an untrained control)."""

import re
from dataclasses import dataclass
from itertools import product

from fastsitch.errors import ConfigError, NetworkError

BLOCKS: dict[str, tuple[int, ...]] = {
    **{"R" + "".join(map(str, blocks)): blocks for blocks in product((1, 2), repeat=4)},
    "ResNet18": (2, 2, 2, 2),
    "ResNet34": (3, 4, 6, 3),
}
"""Residual blocks per stage of every built-in architecture."""

_NAME = re.compile(r"(?P<architecture>[A-Za-z][A-Za-z0-9_]{0,63})(?P<random>-random)?(@(?P<seed>[0-9]{1,9}))?")
_RESERVED = re.compile(r"R[0-9]*|r[0-9]{4}|ResNet[0-9]*")
"""What reads like the name of a built-in architecture is one, or a mistake."""


@dataclass(frozen=True, order=True)
class NetworkName:
    """One network of a data set: architecture, whether it is an untrained control, seed."""

    architecture: str
    random: bool = False
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> "NetworkName":
        """Read the name of a built-in architecture, or of one that may have been added to the root.

        Raises NetworkError with the known architectures when it can be neither.
        """
        match = _NAME.fullmatch(text)
        if match is None or (match["architecture"] not in BLOCKS and _RESERVED.fullmatch(match["architecture"])):
            raise NetworkError(
                f"unknown network {text!r}: expected an architecture out of R1111 ... R2222 (each digit 1 or 2), "
                "ResNet18, ResNet34, or the name of one that was added, with an optional seed as in R1111@3 or control "
                "as in R1111-random@0"
            )
        return cls(match["architecture"], match["random"] is not None, int(match["seed"] or 0))

    @classmethod
    def parse_new(cls, text: str) -> "NetworkName":
        """Read the name of a network that is to be added; raises ConfigError with the rule for such names."""
        try:
            return cls.parse(text)
        except NetworkError:
            raise ConfigError(
                f"network name {text!r}: expected up to 64 letters, digits and _, the first a letter, such as "
                "resnet50, with an optional seed as in resnet50@3; names like R1111 or ResNet18 are taken"
            ) from None

    def __str__(self) -> str:
        text = self.architecture + ("-random" if self.random else "")
        return f"{text}@{self.seed}" if self.random or self.seed else text

    @property
    def built_in(self) -> bool:
        """Whether the architecture is one of the small ResNets."""
        return self.architecture in BLOCKS

    def control(self, seed: int) -> "NetworkName":
        """The untrained control of this architecture with the given seed."""
        return NetworkName(self.architecture, True, seed)
