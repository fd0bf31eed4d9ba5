"""A receiver whose BatchNorm normalises by batch statistics, stitch by stitch, while stitches are trained.

So the published study really ran: its code put the whole stitched network into training mode. BatchNorm cannot be
folded then, and every stitch has running statistics of its own, which serve when it is evaluated. Nothing but BatchNorm
is in training mode, and all weights stay frozen, those of BatchNorm included.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fastsitch.errors import ConfigError, NetworkError
from fastsitch.networks.chain import Chain, Position
from fastsitch.networks.frozen import FrozenHead, FrozenSegment, Statistics, freeze_head, freeze_segment
from fastsitch.networks.stitch_norm import StitchNorm
from fastsitch.networks.stitch_segments import StitchSegment, segment_weights


class BatchStatisticsNetwork:
    """The frozen parts of a chain with BatchNorm beside the convolutions, in one dtype on one device.

    It has no state and serves any number of groups: :meth:`for_stitches` gives the receiver of one group, which has.
    The chain is only read. Segments other than those of the small ResNets run through autograd. Raises NetworkError for
    BatchNorm layers other than nn.BatchNorm2d with running statistics, and for a head that has any.
    """

    def __init__(self, chain: Chain, *, dtype: torch.dtype, device: torch.device) -> None:
        self.positions: tuple[Position, ...] = chain.positions
        self.dtype = dtype
        self.device = device
        if any(isinstance(module, _BatchNorm) for module in chain.head.modules()):
            raise NetworkError("--receiver-bn batch: expected a head without BatchNorm; use --receiver-bn frozen")
        first, *others = chain.segments
        # no stitch passes it: those into position 0 replace its output
        self.first = freeze_segment(first, dtype, device)
        self.others = [segment_weights(segment, dtype, device) for segment in others]
        self.head = freeze_head(chain.head, dtype, device)

    def for_stitches(self, counts: Sequence[int]) -> "StitchReceiver":
        """The receiver of ``counts[j]`` stitches into each position j; running statistics are the network's own."""
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
        self._passes: list[StitchSegment] = [
            own.for_stitches(stitches) for own, stitches in zip(network.others, passing, strict=True)
        ]
        self.segments: list[FrozenSegment] = [network.first, *self._passes]

    def statistics(self, stitch: int) -> Statistics:
        """Running statistics of one stitch, copied to the CPU, in the accumulation dtype."""
        return {
            f"{layer}.{name}": tensor_KD[stitch].cpu().clone()
            for layer, norm in self._layers(stitch).items()
            for name, tensor_KD in (("running_mean", norm.running_mean_KD), ("running_var", norm.running_var_KD))
        }

    def load_statistics(self, stitch: int, statistics: Statistics) -> None:
        """Put given running statistics in place of one stitch's own.

        Raises ConfigError unless there is one of the right size for every BatchNorm layer that the stitch passes.
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
        """The BatchNorm layers that a stitch passes, by name; later segments are passed by more stitches."""
        return {
            f"block{p}.{name}": norm
            for p, own in enumerate(self._passes, 1)
            for name, norm in own.norms.items()
            if stitch < len(norm.running_mean_KD)
        }
