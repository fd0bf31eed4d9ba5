"""The speed of the receiver's products alone, part by part."""

from dataclasses import dataclass
from functools import partial

import torch

from fastsitch.benchmark.bare_products import BareProducts
from fastsitch.benchmark.timing_rounds import Spread, alternate, recorded
from fastsitch.chains.chain import Chain


@dataclass(frozen=True)
class BlockCeiling:
    """One part of the receiver, or its head: FLOP/s of its products forward, and of the gradient of its input."""

    name: str
    samples: int
    flops: float
    """Forward."""
    gradient_flops: float
    forward: Spread
    gradient: Spread


@dataclass(frozen=True)
class Ceiling:
    """All parts; ``rate`` is FLOP/s of one pass forward and back over all of them."""

    images: int
    blocks: list[BlockCeiling]
    flops: float
    rate: Spread


@torch.no_grad()
def measure_ceiling(
    chain: Chain, counts: list[int], images: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> Ceiling:
    """Speeds at the shapes of a cascade with ``counts[j]`` stitches, of ``images`` images each, into position j.

    There is at least one into position 0.
    """
    assert counts[0] > 0
    bare = BareProducts(chain, counts, images, dtype, device)
    # a segment may do no product at all
    parts = [k for k, flops in enumerate(bare.flops) if flops]
    whole = alternate({"all": recorded(bare.run, device)}, repeats, device)["all"]
    forward = alternate({str(k): recorded(partial(bare.forward, k), device) for k in parts}, repeats, device)
    gradient = alternate({str(k): recorded(partial(bare.backward, k), device) for k in parts}, repeats, device)
    return Ceiling(
        images=images,
        blocks=[
            BlockCeiling(
                bare.names[k],
                bare.samples[k],
                bare.flops[k],
                bare.gradient_flops[k],
                Spread.of([bare.flops[k] / time for time in forward[str(k)]]),
                Spread.of([bare.gradient_flops[k] / time for time in gradient[str(k)]]),
            )
            for k in parts
        ],
        flops=bare.total_flops,
        rate=Spread.of([bare.total_flops / time for time in whole]),
    )
