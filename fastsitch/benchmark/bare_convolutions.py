"""The lower bound: the receiver's folded convolutions alone, forward and gradient of activations."""

import itertools
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsitch.benchmark.folded_receiver import FoldedBlock, FoldedConv, FoldedTail
from fastsitch.benchmark.timing_rounds import recorded
from fastsitch.chains.chain_flops import chain_flops
from fastsitch.networks.resnet import SmallResNet
from fastsitch.stitching.geometry import Shape


class BareConvolutions:
    """The convolutions of every block of a cascade with ``counts[j]`` stitches into position j, on its shapes.

    Plain aten calls without bias, on random channels-last data; nothing is added, rectified or kept.
    """

    def __init__(
        self,
        chain: SmallResNet,
        counts: Sequence[int],
        images: int,
        dtype: torch.dtype,
        device: torch.device,
        pools: dict[str, Tensor] | None = None,
    ) -> None:
        """``pools`` holds random data, which objects that are given the same dictionary share."""
        shapes = [position.shape for position in chain.positions]
        samples = [count * images for count in itertools.accumulate(counts)][:-1]
        blocks = [cast(FoldedBlock, block) for block in FoldedTail(chain, dtype).to(device).blocks]
        self.names = [position.name for position in chain.positions[1:]]
        self.samples = samples
        _, *block_flops, _ = chain_flops(chain)
        self.flops = [flops * count for flops, count in zip(block_flops, samples, strict=True)]
        """Of every block, forward; the gradient takes as many."""
        pools = {} if pools is None else pools

        def data(role: str, count: int, shape: Shape) -> Tensor:
            """Channels-last views of one random tensor per role, as large as the largest block needs."""
            largest = max(
                number * max(_elements(before), _elements(after))
                for number, (before, after) in zip(samples, itertools.pairwise(shapes), strict=True)
            )
            if role not in pools or len(pools[role]) < largest:
                pools[role] = torch.randn(largest, device=device).to(dtype)
            channels, height, width = shape
            values = pools[role][: count * _elements(shape)]
            return values.view(count, height, width, channels).permute(0, 3, 1, 2)

        self._blocks = [
            (
                block,
                data("x", count, before),
                data("hidden", count, after),
                data("g", count, after),
                data("g hidden", count, after),
            )
            for block, count, (before, after) in zip(blocks, samples, itertools.pairwise(shapes), strict=True)
            if count
        ]

    def run(self) -> None:
        """All blocks forward, then all backward."""
        for k in range(len(self._blocks)):
            self.forward(k)
        for k in reversed(range(len(self._blocks))):
            self.backward(k)

    def forward(self, k: int) -> None:
        """The convolutions of the k-th block that has samples."""
        block, x, hidden, _, _ = self._blocks[k]
        F.conv2d(x, block.conv1.weight, None, block.conv1.stride, block.conv1.padding)
        F.conv2d(hidden, block.conv2.weight, None, block.conv2.stride, block.conv2.padding)
        if block.projection is not None:
            F.conv2d(x, block.projection.weight, None, block.projection.stride)

    def backward(self, k: int) -> None:
        """The gradients of their inputs."""
        block, x, hidden, g, g_hidden = self._blocks[k]
        _input_gradient(g, hidden, block.conv2)
        _input_gradient(g_hidden, x, block.conv1)
        if block.projection is not None:
            _input_gradient(g, x, block.projection)


class BareGroups:
    """The bare convolutions of several groups, one group after the other; groups of the same shapes share data."""

    def __init__(
        self,
        chain: SmallResNet,
        counts: Sequence[list[int]],
        images: int,
        dtype: torch.dtype,
        device: torch.device,
        pools: dict[str, Tensor],
    ) -> None:
        # the largest first: the others then share its data
        distinct = sorted({tuple(group) for group in counts}, key=sum, reverse=True)
        # a group of stitches into the last position alone touches no convolution
        bare = {
            group: BareConvolutions(chain, group, images, dtype, device, pools) for group in distinct if any(group[:-1])
        }
        with torch.no_grad():
            runs = {group: recorded(convolutions.run, device) for group, convolutions in bare.items()}
        self._groups = [runs[tuple(group)] for group in counts if tuple(group) in runs]

    @torch.no_grad()
    def run(self, steps: int) -> None:
        """So many steps of the first group, then of the next."""
        for run_group in self._groups:
            for _ in range(steps):
                run_group()


def _input_gradient(g: Tensor, x: Tensor, conv: FoldedConv) -> None:
    stride, padding = [conv.stride] * 2, [conv.padding] * 2
    torch.ops.aten.convolution_backward(
        g, x, conv.weight, None, stride, padding, [1, 1], False, [0, 0], 1, [True, False, False]
    )


def _elements(shape: Shape) -> int:
    channels, height, width = shape
    return channels * height * width
