"""The launches of the published study: all ordered pairs of 16 small ResNets of width 64 on 32 x 32 images."""

import itertools
from collections import Counter

import torch

from fastsitch.kernels.shapes import StitchShape

BATCH = 256
STAGES = ((64, 32), (128, 16), (256, 8), (512, 4))
"""(channels, size) of the positions of each stage; the stem has the shape of the first."""


def stage_positions(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Positions of each shape in a network with that many blocks per stage; the stem is one more of the first."""
    return (blocks[0] + 1, *blocks[1:])


def study_launches() -> Counter[StitchShape]:
    """The launches of one training step over all 256 ordered pairs, and how often each occurs."""
    launches: Counter[StitchShape] = Counter()
    networks = list(itertools.product((1, 2), repeat=4))
    for sender, receiver in itertools.product(networks, repeat=2):
        for s, r in itertools.product(range(4), repeat=2):
            launches[study_shape(s, r, stage_positions(sender)[s])] += stage_positions(receiver)[r]
    return launches


def study_shape(sender_stage: int, receiver_stage: int, stitches: int) -> StitchShape:
    """All sender positions of one stage into one receiver position."""
    channels, size = STAGES[sender_stage]
    receiver_channels, receiver_size = STAGES[receiver_stage]
    down = max(1, size // receiver_size)
    return StitchShape(
        source=tuple(range(stitches)),
        images=BATCH,
        height=size // down,
        width=size // down,
        channels=channels,
        receiver_channels=receiver_channels,
        down=down,
        up=max(1, receiver_size // size),
        dtype=torch.bfloat16,
        gather=True,
    )
