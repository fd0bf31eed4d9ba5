"""Segments of any network as graphs: frozen maps folded, in micro-batches, with as little kept as can be."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsitch.chains.chain import Chain
from fastsitch.chains.vet_chain import different_images
from fastsitch.networks.resnet import SmallResNet
from fastsitch.receivers.attention import has_fused_attention
from fastsitch.receivers.contract import Saved, SegmentMemory
from fastsitch.receivers.convolution import accumulation_dtype
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.receivers.frozen_segments import AutogradHead, AutogradSegment
from fastsitch.receivers.residual_block import CHUNK_BYTES, write_gradient
from fastsitch.vocabulary import Attention

if TYPE_CHECKING:
    from fastsitch.receivers.graph_halves import GraphHalves

_MOST_IMAGES = {"cpu": 256, "cuda": 1024}
"""Of a micro-batch: a power of two, so that those of all segments fit into the network's."""

_CHECKED = 5
"""Images on which a graph is compared with its module: neither of the numbers that it was traced for."""


class GraphSegment:
    """The contract is that of ``contract.FrozenSegment``."""

    keeps_input = True

    def __init__(self, halves: "GraphHalves", constants: Sequence[Tensor], device: torch.device) -> None:
        self.rectifies = halves.rectifies
        self._halves = halves
        self._constants = constants
        most = CHUNK_BYTES[device.type] // halves.largest_bytes
        self.images = min(_MOST_IMAGES[device.type], 1 << max(0, most.bit_length() - 1))
        self._compiled = False
        self._infer: Callable[..., Any] = halves.infer
        self._forward: Callable[..., Any] = halves.forward
        self._backward: Callable[..., Any] = halves.backward

    @property
    def attends(self) -> bool:
        """Whether it has attention in torch's fused form."""
        return has_fused_attention(self._halves.infer.graph)

    @property
    def cost(self) -> SegmentMemory:
        """What it takes beside representations and weights."""
        return SegmentMemory(self._halves.kept_bytes, self._halves.working_bytes, self.images)

    def compile(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Let ``wrap`` compile the programs; buffers must then hold whole micro-batches, of one size.

        What the last one computes beyond its samples is never read.
        """
        self._compiled = True
        self._infer, self._forward, self._backward = map(wrap, (self._infer, self._forward, self._backward))

    def infer(self, x: Tensor, out: Tensor, samples: int) -> None:
        for chunk in self._micro_batches(samples):
            self._write(self._infer(chunk.stop - chunk.start, *self._constants, x[chunk]), out[chunk])

    def memory(self, out: Tensor) -> Saved:
        return []

    def forward(self, x: Tensor, out: Tensor, saved: Saved, samples: int) -> None:
        saved.clear()
        for chunk in self._micro_batches(samples):
            y, kept = self._forward(chunk.stop - chunk.start, *self._constants, x[chunk])
            self._write(y, out[chunk])
            saved += kept

    def backward(self, g: Tensor, x: Tensor, saved: Saved, samples: int, rectified: int) -> None:
        chunks = list(self._micro_batches(samples))
        each = len(saved) // len(chunks)
        for chunk in chunks:
            kept = saved[:each]
            # what is done with takes no memory
            del saved[:each]
            images = chunk.stop - chunk.start
            g_x = self._backward(images, *self._constants, x[chunk], *kept, g[chunk])
            write_gradient(x[chunk], g_x, rectified - chunk.start)

    def backward_again(self, g: Tensor, x: Tensor, rectified: int) -> None:
        """The same for a forward pass that kept nothing, which is run again; g is the gradient of the output itself."""
        for chunk in self._micro_batches(len(x)):
            images = chunk.stop - chunk.start
            y, kept = self._forward(images, *self._constants, x[chunk])
            arriving = torch.ops.aten.threshold_backward(g[chunk], y, 0) if self.rectifies else g[chunk]
            g_x = self._backward(images, *self._constants, x[chunk], *kept, arriving)
            write_gradient(x[chunk], g_x, rectified - chunk.start)

    def _micro_batches(self, samples: int) -> Iterator[slice]:
        for start in range(0, samples, self.images):
            yield slice(start, start + self.images if self._compiled else min(start + self.images, samples))

    def _write(self, y: Tensor, out: Tensor) -> None:
        if self.rectifies:
            torch.clamp_min(y, 0, out=out)
        else:
            out.copy_(y)


class GraphHead:
    """The contract is that of ``contract.FrozenHead``; nothing is kept between its two passes."""

    def __init__(self, segment: GraphSegment, logits: Tensor) -> None:
        self._segment = segment
        self._classes, self._dtype = logits.shape[1], logits.dtype

    @property
    def cost(self) -> SegmentMemory:
        return _at_once(self._segment.cost)

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.empty(len(x), self._classes, dtype=self._dtype, device=x.device)
        self._segment.infer(x, logits, len(x))
        return logits.to(accumulation_dtype(self._dtype))

    def backward(self, g: Tensor, x: Tensor, rectified: int) -> None:
        self._segment.backward_again(g.to(self._dtype), x, rectified)


def use_graphs(network: FrozenNetwork, chain: Chain, attention: Attention = "fused") -> FrozenNetwork:
    """Let segments and head of ``network``, the frozen form of ``chain``, that run through autograd run as graphs.

    Not the first segment: stitches replace its output. What cannot be traced, or gives other values or gradients than
    its module, stays as it is, and the log says why.
    """
    if isinstance(chain, SmallResNet):
        return network
    # takes a second to import
    from fastsitch.receivers.make_graph import as_graph

    x = different_images(chain, _CHECKED).to(network.device, network.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for j, (segment, position) in enumerate(zip(network.segments, network.positions, strict=True)):
            out = position.empty(len(x), network.dtype, network.device)
            segment.infer(x, out, len(x))
            if j > 0 and isinstance(segment, AutogradSegment):
                made = as_graph(
                    segment, chain.segments[j], x, out, f"what leads to position {position.name}", attention
                )
                network.segments[j] = made or segment
            x = out
        if isinstance(network.head, AutogradHead):
            logits = network.head.module(x)
            head = AutogradSegment(chain.head, x.dtype, x.device)
            found = as_graph(head, chain.head, x, logits, "the head", attention)
            if found is None:
                network.head.cost = _at_once(head.cost)
            else:
                network.head = GraphHead(found, logits)
    return network


def _at_once(cost: SegmentMemory) -> SegmentMemory:
    """That of a part whose way back follows at once."""
    return SegmentMemory(0, cost.kept + cost.working, cost.images)


def segment_costs(network: FrozenNetwork) -> list[SegmentMemory]:
    """What each segment, and last the head, takes of a network that runs as graphs or through autograd."""
    parts = [*network.segments, network.head]
    known = [part for part in parts if isinstance(part, GraphSegment | AutogradSegment | GraphHead | AutogradHead)]
    assert len(known) == len(parts), "the memory of small ResNets follows from their shapes"
    return [part.cost for part in known]
