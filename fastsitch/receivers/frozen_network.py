"""A frozen network: BatchNorm folded, weights cast once, gradients only of activations.

Maps are (B, C, H, W) in channels-last memory; segments other than those of the small ResNets take and give the
tensors that the network itself uses, with contiguous rows (see :mod:`fastsitch.chains.layout`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsitch.chains.chain import Chain
from fastsitch.chains.position import Position
from fastsitch.receivers.contract import FrozenSegment, Statistics
from fastsitch.receivers.frozen_segments import freeze_head, freeze_segment
from fastsitch.receivers.residual_block import FrozenBlock, MaskedBlock


class FrozenNetwork:
    """The frozen form of a chain, in one dtype on one device.

    BatchNorm is folded into the convolutions in fp32 (fp64 for a chain in fp64), then cast. Networks other than the
    small ResNets run as they are, through autograd. The chain itself is only read. ``masked`` keeps bits instead of
    activations (the default on CUDA). ``micro_batch``: buffers hold a multiple of so many samples.
    """

    def __init__(self, chain: Chain, *, dtype: torch.dtype, device: torch.device, masked: bool | None = None) -> None:
        self.positions: tuple[Position, ...] = chain.positions
        self.dtype = dtype
        self.device = device
        self.micro_batch = 1
        masked = device.type == "cuda" if masked is None else masked
        self.segments: list[FrozenSegment] = [freeze_segment(segment, dtype, device) for segment in chain.segments]
        if masked:
            self.segments = [
                MaskedBlock(segment.weights) if isinstance(segment, FrozenBlock) else segment
                for segment in self.segments
            ]
        self.head = freeze_head(chain.head, dtype, device)

    @property
    def masked(self) -> bool:
        """Whether no segment but the first reads values of its input on the way back."""
        return not any(segment.keeps_input for segment in self.segments[1:])

    def for_stitches(self, counts: Sequence[int]) -> "FrozenNetwork":
        """This network: it is the same for all stitches, however many there are."""
        return self

    def statistics(self, stitch: int) -> Statistics:
        """None: they are folded into the weights."""
        return {}

    def representations(self, x: Tensor) -> list[Tensor]:
        """The representation at every position; x is cast to the network's dtype."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        outputs = []
        for segment, position in zip(self.segments, self.positions, strict=True):
            out = position.empty(x.shape[0], self.dtype, self.device)
            segment.infer(x, out, x.shape[0])
            outputs.append(out)
            x = out
        return outputs

    def tail(self, x: Tensor, j: int) -> Tensor:
        """Logits when ``x`` stands for the output of position ``j``."""
        for segment, position in zip(self.segments[j + 1 :], self.positions[j + 1 :], strict=True):
            out = position.empty(x.shape[0], self.dtype, self.device)
            segment.infer(x, out, x.shape[0])
            x = out
        return self.head.forward(x)
