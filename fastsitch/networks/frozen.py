"""A network that no longer learns: BatchNorm folded, weights cast once, gradients only of activations.

Maps are (B, C, H, W) in channels-last memory; segments other than those of the small ResNets take and give whatever
tensors the network itself uses, whose rows lie contiguous (see :mod:`fastsitch.networks.layout`).
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.networks.blocks import FrozenBlock, MaskedBlock, Saved, parts, replace
from fastsitch.networks.chain import Chain, Position
from fastsitch.networks.folded import accumulation_dtype, convolve, folded, input_gradient
from fastsitch.networks.masks import apply_mask, mask_bytes, pack_mask
from fastsitch.networks.resnet import BasicBlock, Classifier, Stem

_POOLED_IMAGES = 256
"""Samples per mean over the last position."""


class FrozenSegment(Protocol):
    """What the engine asks of a segment.

    ``x`` and ``out`` may have room for more samples than the ``samples`` that count. Gradients take the place of the
    activations they belong to, so that nothing beside the activations needs memory.
    """

    @property
    def rectifies(self) -> bool:
        """Whether ``backward`` wants the gradient of the *input* of the segment's last ReLU.

        Whoever replaces the segment's output by its gradient has that output at hand, and applies the ReLU's.
        """
        ...

    @property
    def keeps_input(self) -> bool:
        """Whether ``backward`` reads values of x, so that x may not be overwritten in between."""
        ...

    def infer(self, x: Tensor, out: Tensor, samples: int) -> None:
        """Write the output for x into ``out``."""
        ...

    def memory(self, out: Tensor) -> Saved:
        """Room for what the gradient needs, for as many samples as ``out`` has."""
        ...

    def forward(self, x: Tensor, out: Tensor, saved: Saved, samples: int) -> None:
        """The same as ``infer``; fills ``saved``."""
        ...

    def backward(self, g: Tensor, x: Tensor, saved: Saved, samples: int, rectified: int) -> None:
        """Replace x by its gradient, given that of the output.

        The first ``rectified`` samples of x are outputs of a ReLU, and the gradient of its input is wanted.
        """
        ...


class FrozenHead(Protocol):
    """From the last representation to logits in the accumulation dtype, and back."""

    def forward(self, x: Tensor) -> Tensor: ...

    def backward(self, g: Tensor, x: Tensor, rectified: int) -> None:
        """Replace x by its gradient, as segments do."""
        ...


Statistics = Mapping[str, Tensor]
"""Running statistics of one stitch, (D,) each: ``block2.bn1.running_mean``, ``block2.bn1.running_var`` and so on, for
every BatchNorm layer of the segments that it passes. Segment p ends in position p."""


class FrozenReceiver(Protocol):
    """What a pass for many stitches asks of a receiver; see :class:`FrozenNetwork`."""

    @property
    def positions(self) -> tuple[Position, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def masked(self) -> bool: ...
    @property
    def segments(self) -> Sequence[FrozenSegment]: ...
    @property
    def head(self) -> FrozenHead: ...

    def statistics(self, stitch: int) -> Statistics:
        """Running statistics of one stitch, copied to the CPU; none where BatchNorm is folded."""
        ...


class Receiver(Protocol):
    """What the engine asks of a receiver: its shapes, and its form for so many stitches into each position."""

    @property
    def positions(self) -> tuple[Position, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    def for_stitches(self, counts: Sequence[int]) -> FrozenReceiver:
        """What the stitches pass through, ``counts[j]`` of them from position j on."""
        ...


class FrozenNetwork:
    """The frozen form of a chain, in one dtype on one device.

    BatchNorm is folded into the convolutions in fp32 (fp64 for a chain in fp64), then cast. Networks other than the
    small ResNets run as they are, through autograd. The chain itself is only read. ``masked`` keeps bits instead of
    activations (the default on CUDA). ``micro_batch``: buffers have room for a multiple of so many samples.
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


class _FrozenStem:
    rectifies = False
    keeps_input = False

    def __init__(self, stem: Stem, dtype: torch.dtype, device: torch.device) -> None:
        self.weight, bias = folded(stem.conv, stem.bn, dtype, device)
        self.bias = bias.to(device, dtype)

    def infer(self, x: Tensor, out: Tensor, samples: int) -> None:
        for part in parts(x, out, samples):
            torch.clamp_min(convolve(x[part], self.weight, self.bias, 1), 0, out=out[part])

    def memory(self, out: Tensor) -> Saved:
        return [torch.empty(out.shape[0], mask_bytes(out[0].numel()), dtype=torch.uint8, device=out.device)]

    def forward(self, x: Tensor, out: Tensor, saved: Saved, samples: int) -> None:
        (mask,) = saved
        self.infer(x, out, samples)
        for part in parts(x, out, samples):
            mask[part] = pack_mask(out[part])

    def backward(self, g: Tensor, x: Tensor, saved: Saved, samples: int, rectified: int) -> None:
        (mask,) = saved
        for part in parts(x, g, samples):
            masked = apply_mask(g[part], mask[part])
            replace(x[part], input_gradient(masked, x[part], self.weight, 1), rectified - part.start)


class _AutogradSegment:
    """Any other segment: a frozen copy, differentiated by autograd."""

    rectifies = False
    keeps_input = True

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.module = frozen_copy(module, dtype, device)

    def infer(self, x: Tensor, out: Tensor, samples: int) -> None:
        with torch.no_grad():
            out[:samples].copy_(self.module(x[:samples]))

    def memory(self, out: Tensor) -> Saved:
        return []

    def forward(self, x: Tensor, out: Tensor, saved: Saved, samples: int) -> None:
        with torch.enable_grad():
            leaf = x[:samples].detach().requires_grad_()
            y = self.module(leaf)
        out[:samples].copy_(y.detach())
        saved[:] = [leaf, y]

    def backward(self, g: Tensor, x: Tensor, saved: Saved, samples: int, rectified: int) -> None:
        leaf, y = saved
        saved.clear()
        replace(x[:samples], torch.autograd.grad(y, leaf, g[:samples])[0], rectified)


class _FrozenClassifier:
    def __init__(self, head: Classifier, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = accumulation_dtype(dtype)
        self.weight = head.linear.weight.detach().to(device, self.dtype, copy=True)
        self.bias = head.linear.bias.detach().to(device, self.dtype, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        # a mean in another dtype first copies what it reads: no more than fits into the cache at a time
        pooled = [part.mean((2, 3), dtype=self.dtype) for part in torch.split(x, _POOLED_IMAGES)]
        return F.linear(torch.cat(pooled), self.weight, self.bias)

    def backward(self, g: Tensor, x: Tensor, rectified: int) -> None:
        pooled = (g @ self.weight) / (x.shape[2] * x.shape[3])
        replace(x, pooled.to(x.dtype)[:, :, None, None].expand_as(x), rectified)


class _AutogradHead:
    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = accumulation_dtype(dtype)
        self.module = frozen_copy(module, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, self.module(x)).to(self.dtype)

    def backward(self, g: Tensor, x: Tensor, rectified: int) -> None:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = self.module(leaf)
        replace(x, torch.autograd.grad(logits, leaf, g.to(logits.dtype))[0], rectified)


def frozen_copy(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A copy of a module in eval mode, all of it in ``dtype``, that asks for no gradients."""
    frozen = copy.deepcopy(module).to(device, dtype)
    frozen.eval()
    return frozen.requires_grad_(False)


def freeze_segment(segment: nn.Module, dtype: torch.dtype, device: torch.device) -> FrozenSegment:
    """A segment with BatchNorm folded in, or a frozen copy that runs through autograd."""
    if isinstance(segment, Stem):
        return _FrozenStem(segment, dtype, device)
    if isinstance(segment, BasicBlock):
        return FrozenBlock(segment, dtype, device)
    return _AutogradSegment(segment, dtype, device)


def freeze_head(head: nn.Module, dtype: torch.dtype, device: torch.device) -> FrozenHead:
    """A head that no longer learns."""
    return (
        _FrozenClassifier(head, dtype, device) if isinstance(head, Classifier) else _AutogradHead(head, dtype, device)
    )
