"""How many floating-point operations training stitches takes.

A multiplication and an addition count as two. Only the residual blocks' convolutions and the stitches are counted.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastsitch.network_names import BLOCKS
from fastsitch.networks.resnet import position_shapes, resnet_flops
from fastsitch.stitching.geometry import Geometry, Shape

STUDY_IMAGES, STUDY_EPOCHS, STUDY_WIDTH, STUDY_SETTINGS = 50_000, 4, 64, 4
_STUDY_CLASSES, _STUDY_INPUT = 10, (3, 32, 32)


@dataclass(frozen=True)
class Flops:
    """Of training: convolutions of the receiver (forward, gradient of activations), stitches (forward, weights)."""

    convolutions: float
    stitches: float

    @property
    def total(self) -> float:
        return self.convolutions + self.stitches


def training_flops(
    blocks: Sequence[float], sender: Sequence[Shape], receiver: Sequence[Shape], cells: Iterable[tuple[int, int]]
) -> Flops:
    """Per image of a training step of ``cells`` (i, j), the sender's representations being there already.

    ``blocks`` are the forward FLOPs of the receiver's blocks 1 ... p, whose gradients take as many.
    """
    convolutions = stitches = 0.0
    for i, j in cells:
        convolutions += 2 * sum(blocks[j:])
        stitches += stitch_flops(Geometry.between(sender[i], receiver[j]))
    return Flops(convolutions, stitches)


def stitch_flops(geometry: Geometry) -> float:
    """Per image of a training step of one stitch: its product, and the gradient of its weights."""
    return 2 * 2.0 * geometry.rows * geometry.features * geometry.receiver[0]


def study_flops() -> Flops:
    """The published study's T2T half without similarity-trained stitches: 256 pairs, 50,000 images, 4 epochs."""
    architectures = [blocks for name, blocks in BLOCKS.items() if name.startswith("R") and name[1:].isdigit()]
    shapes = {
        blocks: [shape for _, shape in position_shapes(blocks, STUDY_WIDTH, _STUDY_INPUT[1:])]
        for blocks in architectures
    }
    images = STUDY_IMAGES * STUDY_EPOCHS
    convolutions = stitches = 0.0
    for sender, receiver in itertools.product(architectures, architectures):
        _, *blocks, _ = resnet_flops(receiver, STUDY_WIDTH, _STUDY_CLASSES, _STUDY_INPUT)
        cells = itertools.product(range(len(shapes[sender])), range(len(shapes[receiver])))
        pair = training_flops(blocks, shapes[sender], shapes[receiver], cells)
        convolutions += images * pair.convolutions
        stitches += images * pair.stitches
    return Flops(convolutions, stitches)
