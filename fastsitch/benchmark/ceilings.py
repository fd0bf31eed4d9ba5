"""The speed of the receiver's convolutions alone, block by block."""

from dataclasses import dataclass
from functools import partial

import torch

from fastsitch.benchmark.bare_convolutions import BareConvolutions
from fastsitch.benchmark.timing_rounds import Spread, alternate, recorded
from fastsitch.networks.resnet import SmallResNet


@dataclass(frozen=True)
class BlockCeiling:
    """One block of the receiver: FLOP/s of its convolutions forward, and of the gradients of their inputs."""

    name: str
    samples: int
    flops: float
    """Forward; the gradient takes as many."""
    forward: Spread
    gradient: Spread


@dataclass(frozen=True)
class Ceiling:
    """All blocks; ``rate`` is FLOP/s of one pass forward and back over all of them."""

    width: int
    images: int
    blocks: list[BlockCeiling]
    flops: float
    rate: Spread


@torch.no_grad()
def measure_ceiling(
    chain: SmallResNet, counts: list[int], images: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> Ceiling:
    """Speeds at the shapes of a cascade with ``counts[j]`` stitches, of ``images`` images each, into position j.

    There is at least one into position 0.
    """
    assert counts[0] > 0
    bare = BareConvolutions(chain, counts, images, dtype, device)
    blocks = range(len(bare.names))
    whole = alternate({"all": recorded(bare.run, device)}, repeats, device)["all"]
    forward = alternate({str(k): recorded(partial(bare.forward, k), device) for k in blocks}, repeats, device)
    gradient = alternate({str(k): recorded(partial(bare.backward, k), device) for k in blocks}, repeats, device)
    return Ceiling(
        width=chain.positions[0].shape[0],
        images=images,
        blocks=[
            BlockCeiling(
                name,
                bare.samples[k],
                bare.flops[k],
                Spread.of([bare.flops[k] / time for time in forward[str(k)]]),
                Spread.of([bare.flops[k] / time for time in gradient[str(k)]]),
            )
            for k, name in enumerate(bare.names)
        ],
        flops=2 * sum(bare.flops),
        rate=Spread.of([2 * sum(bare.flops) / time for time in whole]),
    )
