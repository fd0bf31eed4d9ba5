"""How many floating-point operations the convolutions and the stitches take, counted from shapes.

A multiplication and an addition count as two. Only the residual blocks' convolutions and the stitches are counted.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastsitch.networks.names import BLOCKS
from fastsitch.networks.resnet import position_shapes
from fastsitch.stitching.geometry import Geometry, Shape

STUDY_IMAGES, STUDY_EPOCHS, STUDY_WIDTH, STUDY_SETTINGS = 50_000, 4, 64, 4


@dataclass(frozen=True)
class Convolution:
    """One convolution of a residual block, by what decides its cost; height and width are those of its output."""

    channels_in: int
    channels: int
    kernel: int
    height: int
    width: int

    @property
    def flops(self) -> float:
        """Per image, forward; the gradient of its input takes as many."""
        return 2.0 * self.height * self.width * self.channels * self.channels_in * self.kernel**2


def block_convolutions(before: Shape, after: Shape) -> list[Convolution]:
    """The convolutions of the residual block between two positions: two 3x3, and a projection where shapes change."""
    channels, height, width = after
    own = [
        Convolution(before[0], channels, 3, height, width),
        Convolution(channels, channels, 3, height, width),
    ]
    return own if before == after else [*own, Convolution(before[0], channels, 1, height, width)]


def block_flops(shapes: Sequence[Shape]) -> list[float]:
    """Per image, forward, of blocks 1 ... p of a small ResNet with these positions."""
    return [
        sum(convolution.flops for convolution in block_convolutions(before, after))
        for before, after in itertools.pairwise(shapes)
    ]


def stem_flops(shapes: Sequence[Shape], channels_in: int = 3) -> float:
    """Per image, forward."""
    channels, height, width = shapes[0]
    return Convolution(channels_in, channels, 3, height, width).flops


@dataclass(frozen=True)
class Flops:
    """Of training: convolutions of the receiver (forward, gradient of activations), stitches (forward, weights)."""

    convolutions: float
    stitches: float

    @property
    def total(self) -> float:
        return self.convolutions + self.stitches


def training_flops(sender: Sequence[Shape], receiver: Sequence[Shape], cells: Iterable[tuple[int, int]]) -> Flops:
    """Per image of a training step of ``cells`` (i, j), the sender's representations being there already."""
    blocks = block_flops(receiver)
    convolutions = stitches = 0.0
    for i, j in cells:
        geometry = Geometry.between(sender[i], receiver[j])
        convolutions += 2 * sum(blocks[j:])
        stitches += 2 * 2.0 * geometry.rows * geometry.features * receiver[j][0]
    return Flops(convolutions, stitches)


def study_flops() -> Flops:
    """The published study's T2T half without similarity-trained stitches: 256 pairs, 50,000 images, 4 epochs."""
    networks = [
        [shape for _, shape in position_shapes(blocks, STUDY_WIDTH, (32, 32))]
        for name, blocks in BLOCKS.items()
        if name.startswith("R") and name[1:].isdigit()
    ]
    images = STUDY_IMAGES * STUDY_EPOCHS
    convolutions = stitches = 0.0
    for sender, receiver in itertools.product(networks, networks):
        own = training_flops(sender, receiver, itertools.product(range(len(sender)), range(len(receiver))))
        convolutions += images * own.convolutions
        stitches += images * own.stitches
    return Flops(convolutions, stitches)
