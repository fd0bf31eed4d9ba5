"""A receiver whose BatchNorm normalises by batch statistics, stitch by stitch, while stitches are trained.

The published study ran like this: its code put the whole stitched network into training mode. BatchNorm cannot be
folded then, and every stitch has running statistics of its own, with which it is evaluated. Nothing but BatchNorm is in
training mode, and all weights stay frozen, those of BatchNorm included.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fastsitch.chains.chain import Chain
from fastsitch.chains.position import Position
from fastsitch.errors import ConfigError, NetworkError
from fastsitch.receivers.batch_statistics_norm import BATCH, USE_FROZEN, StitchNorm
from fastsitch.receivers.batch_statistics_segment import StitchSegment, segment_weights
from fastsitch.receivers.contract import FrozenHead, FrozenSegment, Statistics
from fastsitch.receivers.frozen_segments import freeze_head, freeze_segment


class BatchStatisticsNetwork:
    """A frozen chain with BatchNorm left unfolded, in one dtype on one device.

    It has no state and any number of groups share it: :meth:`for_stitches` gives the receiver of one group, which has.
    The chain is only read. Segments other than those of the small ResNets run through autograd. Raises NetworkError for
    BatchNorm layers other than nn.BatchNorm2d with running statistics, and for a head that has any.
    """

    def __init__(self, chain: Chain, *, dtype: torch.dtype, device: torch.device) -> None:
        self.positions: tuple[Position, ...] = chain.positions
        self.dtype = dtype
        self.device = device
        if any(isinstance(module, _BatchNorm) for module in chain.head.modules()):
            raise NetworkError(f"{BATCH}: expected a head without BatchNorm; {USE_FROZEN}")
        first, *others = chain.segments
        # no stitch passes through it: those into position 0 replace its output
        self.first = freeze_segment(first, dtype, device)
        self.others = [segment_weights(segment, dtype, device) for segment in others]
        self.head = freeze_head(chain.head, dtype, device)

    def for_stitches(self, counts: Sequence[int]) -> "StitchReceiver":
        """The receiver of ``counts[j]`` stitches into each position j; running statistics start as the network's."""
        return StitchReceiver(self, counts)


class StitchReceiver:
    """A receiver for a fixed number of stitches, with running statistics for each of them; see FrozenReceiver."""

    masked = False
    micro_batch = 1

    def __init__(self, network: BatchStatisticsNetwork, counts: Sequence[int]) -> None:
        self.positions = network.positions
        self.dtype = network.dtype
        self.device = network.device
        self.head: FrozenHead = network.head
        passing = list(accumulate(counts))[:-1]
        self._passed: list[StitchSegment] = [
            segment.for_stitches(stitches) for segment, stitches in zip(network.others, passing, strict=True)
        ]
        self.segments: list[FrozenSegment] = [network.first, *self._passed]

    def statistics(self, stitch: int) -> Statistics:
        """Running statistics of one stitch, copied to the CPU, in the accumulation dtype."""
        return {
            f"{layer}.{name}": tensor_KD[stitch].cpu().clone()
            for layer, norm in self._layers(stitch).items()
            for name, tensor_KD in (("running_mean", norm.running_mean_KD), ("running_var", norm.running_var_KD))
        }

    def load_statistics(self, stitch: int, statistics: Statistics) -> None:
        """Set the running statistics of one stitch.

        Raises ConfigError unless there is one of the right size for every BatchNorm layer that it passes through.
        """
        wanted = self.statistics(stitch)
        if {name: tensor.shape for name, tensor in wanted.items()} != {
            name: tensor.shape for name, tensor in statistics.items()
        }:
            raise ConfigError(
                f"running statistics of {len(statistics)} tensors do not fit the receiver: expected "
                + (", ".join(f"{name} ({len(tensor)})" for name, tensor in wanted.items()) or "none")
            )
        for layer, norm in self._layers(stitch).items():
            norm.running_mean_KD[stitch].copy_(statistics[f"{layer}.running_mean"])
            norm.running_var_KD[stitch].copy_(statistics[f"{layer}.running_var"])

    def _layers(self, stitch: int) -> dict[str, StitchNorm]:
        """The BatchNorm layers that a stitch passes through, by name; more stitches pass through later segments."""
        return {
            f"block{p}.{name}": norm
            for p, segment in enumerate(self._passed, 1)
            for name, norm in segment.norms.items()
            if stitch < len(norm.running_mean_KD)
        }
