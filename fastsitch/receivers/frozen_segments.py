"""Frozen segments and heads: those of the small ResNets without autograd, all others with it."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsitch.chains.module_copies import copy_modules
from fastsitch.networks.resnet import BasicBlock, Classifier, Stem
from fastsitch.receivers.contract import FrozenHead, FrozenSegment, Saved, SegmentMemory
from fastsitch.receivers.convolution import accumulation_dtype, convolve, folded, input_gradient
from fastsitch.receivers.relu_mask import apply_mask, mask_bytes, pack_mask
from fastsitch.receivers.residual_block import FrozenBlock, micro_batches, write_gradient

_POOLED_IMAGES = 256
"""Samples per mean over the last position."""


class _FrozenStem:
    rectifies = False
    keeps_input = False

    def __init__(self, stem: Stem, dtype: torch.dtype, device: torch.device) -> None:
        self.weight, bias = folded(stem.conv, stem.bn, dtype, device)
        self.bias = bias.to(device, dtype)

    def infer(self, x: Tensor, out: Tensor, samples: int) -> None:
        for chunk in micro_batches(x, out, samples):
            torch.clamp_min(convolve(x[chunk], self.weight, self.bias, 1), 0, out=out[chunk])

    def memory(self, out: Tensor) -> Saved:
        return [torch.empty(out.shape[0], mask_bytes(out[0].numel()), dtype=torch.uint8, device=out.device)]

    def forward(self, x: Tensor, out: Tensor, saved: Saved, samples: int) -> None:
        (mask,) = saved
        self.infer(x, out, samples)
        for chunk in micro_batches(x, out, samples):
            mask[chunk] = pack_mask(out[chunk])

    def backward(self, g: Tensor, x: Tensor, saved: Saved, samples: int, rectified: int) -> None:
        (mask,) = saved
        for chunk in micro_batches(x, g, samples):
            masked = apply_mask(g[chunk], mask[chunk])
            write_gradient(x[chunk], input_gradient(masked, x[chunk], self.weight, 1), rectified - chunk.start)


class AutogradSegment:
    """Any other segment: a frozen copy, differentiated by autograd."""

    rectifies = False
    keeps_input = True

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.module = frozen_copy(module, dtype, device)
        self.cost = SegmentMemory(0, 0, None)

    def note_cost(self, x: Tensor, out: Tensor) -> None:
        """Measure what autograd keeps for the images in x; the way back is taken for twice what it reads and gives."""
        held = {tensor.untyped_storage().data_ptr() for tensor in (*self.module.state_dict().values(), x)}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        saved: Saved = []
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.forward(x, torch.empty_like(out), saved, len(x))
        self.cost = SegmentMemory(sum(kept.values()) // len(x), 2 * (x.nbytes + out.nbytes) // len(x), None)

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
        write_gradient(x[:samples], torch.autograd.grad(y, leaf, g[:samples])[0], rectified)


class _FrozenClassifier:
    def __init__(self, head: Classifier, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = accumulation_dtype(dtype)
        self.weight = head.linear.weight.detach().to(device, self.dtype, copy=True)
        self.bias = head.linear.bias.detach().to(device, self.dtype, copy=True)

    def forward(self, x: Tensor) -> Tensor:
        # a mean in another dtype first copies what it reads: no more than fits into the cache at a time
        pooled = [images.mean((2, 3), dtype=self.dtype) for images in torch.split(x, _POOLED_IMAGES)]
        return F.linear(torch.cat(pooled), self.weight, self.bias)

    def backward(self, g: Tensor, x: Tensor, rectified: int) -> None:
        pooled = (g @ self.weight) / (x.shape[2] * x.shape[3])
        write_gradient(x, pooled.to(x.dtype)[:, :, None, None].expand_as(x), rectified)


class AutogradHead:
    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = accumulation_dtype(dtype)
        self.module = frozen_copy(module, dtype, device)
        self.cost = SegmentMemory(0, 0, None)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, self.module(x)).to(self.dtype)

    def backward(self, g: Tensor, x: Tensor, rectified: int) -> None:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = self.module(leaf)
        write_gradient(x, torch.autograd.grad(logits, leaf, g.to(logits.dtype))[0], rectified)


def frozen_copy(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A copy of a module in eval mode, all of it in ``dtype``, that needs no gradients."""
    (frozen,) = copy_modules([module])
    # a module may override these, and return nothing
    nn.Module.to(frozen, device, dtype)
    frozen.eval()
    return nn.Module.requires_grad_(frozen, False)


def freeze_segment(segment: nn.Module, dtype: torch.dtype, device: torch.device) -> FrozenSegment:
    """A segment with BatchNorm folded in, or a frozen copy that runs through autograd."""
    # those of the small ResNets are written by hand: as graphs they take 1.15 of the time at width 16 and 1.05 at
    # width 64 (a pass and back, fp32 on 2 cores with AVX2, medians, n = 10)
    if isinstance(segment, Stem):
        return _FrozenStem(segment, dtype, device)
    if isinstance(segment, BasicBlock):
        return FrozenBlock(segment, dtype, device)
    return AutogradSegment(segment, dtype, device)


def freeze_head(head: nn.Module, dtype: torch.dtype, device: torch.device) -> FrozenHead:
    """A frozen head."""
    return _FrozenClassifier(head, dtype, device) if isinstance(head, Classifier) else AutogradHead(head, dtype, device)
