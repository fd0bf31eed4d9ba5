"""What kind of stitch joins two representations."""

from dataclasses import dataclass

from fastsitch.errors import ConfigError

Shape = tuple[int, int, int]
"""Channels, height, width of one representation."""


@dataclass(frozen=True)
class Geometry:
    """Sender and receiver shapes, and the ratio between them: ``down`` = k, ``up`` = u, at most one above 1."""

    sender: Shape
    receiver: Shape
    down: int = 1
    up: int = 1

    @classmethod
    def between(cls, sender: Shape, receiver: Shape) -> "Geometry":
        """The stitch from one shape to another; raises ConfigError where the sizes are not multiples.

        Source: Hernandez et al. 2022, section 3 (strided convolution, 1x1 convolution, nearest upsampling).
        """
        _, height, width = sender
        _, rows, columns = receiver
        if height % rows == 0 and width % columns == 0 and height // rows == width // columns:
            return cls(sender, receiver, down=height // rows)
        if rows % height == 0 and columns % width == 0 and rows // height == columns // width:
            return cls(sender, receiver, up=rows // height)
        raise ConfigError(
            f"no stitch from {height}x{width} to {rows}x{columns}: expected sizes where one is the same whole multiple "
            "of the other in both directions; use images whose side is a multiple of 8"
        )

    @property
    def kind(self) -> str:
        """``equal``, ``down k`` or ``up u``, as shown to users."""
        if self.down > 1:
            return f"down {self.down}"
        return f"up {self.up}" if self.up > 1 else "equal"

    @property
    def features(self) -> int:
        """Inputs of the stitch's GEMM: C * k * k."""
        return self.sender[0] * self.down**2

    @property
    def parameters(self) -> int:
        """Weights and biases of one stitch."""
        return (self.features + 1) * self.receiver[0]

    @property
    def rows(self) -> int:
        """Rows of the stitch's GEMM per image: cells at the stitch's own resolution."""
        return (self.sender[1] // self.down) * (self.sender[2] // self.down)
