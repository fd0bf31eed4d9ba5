"""How long the published study would take: from this machine's measured speed, and, as a model, on an H100."""

from dataclasses import dataclass

import torch

from fastsitch.benchmark.ceilings import Ceiling, measure_ceiling
from fastsitch.benchmark.flops import STUDY_SETTINGS, STUDY_WIDTH, study_flops
from fastsitch.identity import torch_generator
from fastsitch.network_names import BLOCKS
from fastsitch.networks.resnet import SmallResNet, initialise

H100_RATE = 400e12
"""FLOP/s: a target for these convolutions in bf16 on an H100, not a measurement."""


@dataclass(frozen=True)
class Projection:
    """The study: 16 networks, 256 pairs, width 64, 50,000 images, 4 epochs, vanilla stitches."""

    flops: float
    """Of one setting: convolutions and stitches."""
    ceiling: Ceiling
    """Of the convolutions of R2222 at width 64, measured here."""
    fraction: float
    """Of the ceiling that a step reached, measured here at the width of the benchmark."""
    seconds: float
    """One setting (T2T) on this machine: convolutions at that fraction of that ceiling."""
    seconds_all_settings: float
    h100_seconds: float
    """A model: all FLOPs at H100_RATE."""
    h100_seconds_all_settings: float


def project(fraction: float, dtype: torch.dtype, device: torch.device, repeats: int) -> Projection:
    """Measure the ceiling at the study's width and extrapolate."""
    chain = SmallResNet(BLOCKS["R2222"], width=STUDY_WIDTH)
    initialise(chain, torch_generator("bench", "R2222"))
    images = 4096 if device.type == "cuda" else 64
    counts = [1] + [0] * (len(chain.positions) - 1)
    ceiling = measure_ceiling(chain.to(device), counts, images, dtype, device, repeats)
    flops = study_flops()
    # the stitches' time is part of what keeps a step from its ceiling
    here = flops.convolutions / (ceiling.rate.median * fraction)
    modelled = flops.total / H100_RATE
    return Projection(
        flops=flops.total,
        ceiling=ceiling,
        fraction=fraction,
        seconds=here,
        seconds_all_settings=STUDY_SETTINGS * here,
        h100_seconds=modelled,
        h100_seconds_all_settings=STUDY_SETTINGS * modelled,
    )
