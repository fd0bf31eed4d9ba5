"""How much memory a group takes, from shapes alone, and how many cells therefore fit into one."""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from typing import NamedTuple

import torch

from fastsitch.chains.layout import elements
from fastsitch.errors import ConfigError, argument
from fastsitch.machine import DTYPES
from fastsitch.receivers.compiled_blocks import micro_batch
from fastsitch.receivers.contract import SegmentMemory
from fastsitch.receivers.relu_mask import mask_bytes
from fastsitch.receivers.residual_block import CHUNK_BYTES
from fastsitch.stitching.geometry import DEFAULT_RULES, Geometry, Rules, Shape

_SHARE = {"cpu": 0.75, "cuda": 0.9}
"""Of the memory that is free, what a sweep may take where no budget is named: a CPU has other things to hold."""

_OVERHEAD = {"cpu": 64 * 10**6, "cuda": 512 * 10**6}
"""Workspaces of the libraries, and what the allocator keeps: measured on the CPU, assumed on CUDA."""

_GRAPH_OVERHEAD = {"cpu": 16 * 10**6, "cuda": 512 * 10**6}
"""The same where segments are graphs: measured on a CPU in fp32, assumed on CUDA."""

_EVALUATION_OVERHEAD = {"cpu": 36 * 10**6, "cuda": 512 * 10**6}
"""The same where the receiver only evaluates."""


class Pair(NamedTuple):
    """Shapes of a sender's and a receiver's positions, and the cells (i, j) to train, earliest receiver position first.

    ``segments``: what the receiver's segments take, and last its head; None for the small ResNets, for which it follows
    from shapes.
    """

    sender: Sequence[Shape]
    receiver: Sequence[Shape]
    cells: Sequence[tuple[int, int]]
    segments: Sequence[SegmentMemory] | None = None


_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """What the memory of a training step depends on, beside the cells."""

    images: int
    itemsize: int
    """Bytes per number of the compute dtype."""
    device: str
    masked: bool = False
    """Whether the receiver keeps bits instead of activations."""
    micro_batch: int = 1
    gathers: bool = True
    """Whether the stitches' inputs are copied into a mini-batch (the torch path) or read where they are."""
    batch_statistics: bool = False
    """Whether the receiver's BatchNorm is not folded and keeps its inputs, in micro-batches of whole stitches."""
    regresses: bool = False
    """Whether stitches are trained on the expected representation: then the receiver only evaluates them."""
    rules: Rules = DEFAULT_RULES
    """What stitches do where shapes leave a choice."""

    @classmethod
    def of(
        cls,
        device: torch.device,
        precision: str,
        kernel: str,
        compile: str,
        images: int,
        receiver_bn: str = "frozen",
        *,
        regresses: bool = False,
        rules: Rules = DEFAULT_RULES,
    ) -> "StepKind":
        """That of a resolved configuration."""
        batch = receiver_bn == "batch"
        return cls(
            images=images,
            itemsize=DTYPES[precision].itemsize,
            device=device.type,
            masked=not batch and (device.type == "cuda" or compile == "on"),
            micro_batch=micro_batch(device) if compile == "on" else 1,
            gathers=kernel == "torch",
            batch_statistics=batch,
            regresses=regresses,
            rules=rules,
        )


def group_memory(
    cells: Sequence[tuple[int, int]],
    sender: Sequence[Shape],
    receiver: Sequence[Shape],
    kind: StepKind,
    segments: Sequence[SegmentMemory] | None = None,
) -> int:
    """Predicted peak bytes of training the cells (i, j) together, beyond the sender's representations.

    A model: buffers of the receiver's batch, what its segments keep (those of a small ResNet, unless ``segments`` are
    given), the mini-batch, parameters, and the largest temporaries. Evaluation runs two batches at a time and keeps
    nothing, which is always less. Where the receiver only evaluates, one batch at a time, training holds the outputs of
    one position after the other.
    """
    counts = [sum(j == position for _, position in cells) for j in range(len(receiver))]
    ends = list(accumulate(counts))
    sizes = [elements(shape) for shape in receiver]
    capacity = [-(-end * kind.images // kind.micro_batch) * kind.micro_batch for end in ends]
    buffers = [samples * size * kind.itemsize for samples, size in zip(capacity, sizes, strict=True)]
    carried = [0, *(end * kind.images for end in ends[:-1])]
    if kind.regresses:
        outputs = max(count * size for count, size in zip(counts, sizes, strict=True)) * kind.images
        # a sum of squares in fp32 copies what has another dtype
        summed = 4 if kind.itemsize < 4 else 0
        kept = max(max(buffers[::2]) + max(buffers[1::2], default=0), outputs * (kind.itemsize + summed))
        # the expected representations of a mini-batch
        kept += sum(sizes) * kind.images * kind.itemsize
    elif segments is not None:
        *inner, _ = segments
        kept = sum(buffers) + sum(samples * each.kept for samples, each in zip(carried, inner, strict=True))
    elif kind.masked:
        whole = [-(-samples // kind.micro_batch) * kind.micro_batch for samples in carried]
        kept = max(buffers[::2]) + max(buffers[1::2], default=0)
        kept += sum(2 * samples * mask_bytes(size) for samples, size in zip(whole, sizes, strict=True))
    else:
        kept = sum(buffers)
        tensors = [_norms(*pair) if kind.batch_statistics else 1 for pair in pairwise(receiver)]
        kept += sum(
            count * samples * size * kind.itemsize
            for count, samples, size in zip(tensors, carried[1:], sizes[1:], strict=True)
        )
    if segments is not None and not kind.regresses:
        temporaries = [
            min(samples, each.images or samples) * each.working
            for samples, each in zip([*carried, ends[-1] * kind.images], segments, strict=True)
        ]
    else:
        temporaries = [_temporaries(sizes[j - 1], sizes[j], carried[j], kind) for j in range(1, len(sizes))]
    parameters = _parameters(cells, sender, receiver, kind)
    overhead = _EVALUATION_OVERHEAD if kind.regresses else _OVERHEAD
    if segments is not None and not kind.regresses:
        overhead = _GRAPH_OVERHEAD
        # of the parameters' copies, that of the results is made when what is kept is gone
        kept = max(0, kept - (_stitch_bytes(cells, sender, receiver, kind) if kind.device == "cpu" else 0))
    return (
        kept
        + parameters
        + _inputs(cells, sender, receiver, kind)
        # those, and the mean and deviation of the last batch
        + (2 * statistics_bytes(cells, receiver) if kind.batch_statistics else 0)
        + max(temporaries, default=0)
        + overhead[kind.device]
    )


def matching_memory(
    sender: Sequence[Shape],
    receiver: Sequence[Shape],
    *,
    preconditioned: bool = False,
    rules: Rules = DEFAULT_RULES,
    cells: Collection[tuple[int, int]] | None = None,
) -> int:
    """Predicted bytes of matching a pair: products of the inputs, shared by all receivers, and twice those of cells.

    Of all cells (i, j), or of those given. With a preconditioner also the inverses of the former, in fp32, and three
    copies of the largest while it is made.
    """
    if cells is None:
        cells = list(product(range(len(sender)), range(len(receiver))))
    geometries = [(i, Geometry.between(sender[i], receiver[j], rules)) for i, j in cells]
    inputs = {(i, geometry.operand): geometry.features for i, geometry in geometries}
    crossed = sum(geometry.features * geometry.receiver[0] for _, geometry in geometries)
    squares = [features**2 for features in inputs.values()]
    inverses = 4 * sum(squares) + 3 * 8 * max(squares) if preconditioned else 0
    return 8 * (sum(squares) + 2 * crossed) + inverses


def statistics_bytes(cells: Sequence[tuple[int, int]], receiver: Sequence[Shape]) -> int:
    """Bytes of the running means and variances of cells (i, j), in fp32."""
    channels = [_norms(*pair) * pair[1][0] for pair in pairwise(receiver)]
    return 2 * 4 * sum(sum(channels[j:]) for _, j in cells)


def largest_group(pairs: Iterable[Pair], kind: StepKind, budget: int) -> int:
    """The most cells per group that let every group of every pair fit into ``budget`` bytes.

    At least 1. Groups of a pair are equal, so each pair is split into as few of them as will do.
    """
    most, limit = 1, math.inf
    for sender, receiver, cells, segments in {
        (tuple(one), tuple(other), tuple(cells), None if costs is None else tuple(costs))
        for one, other, cells, costs in pairs
    }:
        most = max(most, len(cells))
        groups = 1
        # the first group has the earliest cells, which pass through the most blocks
        while groups < len(cells) and group_memory(cells[::groups], sender, receiver, kind, segments) > budget:
            groups += 1
        if groups > 1:
            limit = min(limit, -(-len(cells) // (groups - 1)) - 1)
    return int(min(most, limit))


def smallest_group_memory(pairs: Iterable[Pair], kind: StepKind) -> int:
    """Predicted bytes of the largest group of one cell."""
    return max(group_memory(pair.cells[:1], pair.sender, pair.receiver, kind, pair.segments) for pair in pairs)


def memory_budget(requested: str | int, available: int, device: str) -> int:
    """Bytes from ``auto`` (a share of what is free) or a size such as 8GB, 8GiB, 500M or 2e9; raises ConfigError."""
    requested = str(requested)
    if requested == "auto":
        return int(_SHARE[device] * available)
    match = re.fullmatch(r"([0-9.]+(?:[eE][0-9]+)?)\s*(?:([KMGT])(i?))?B?", requested.strip(), re.IGNORECASE)
    try:
        budget = _bytes(float(match[1]), match[2] or "", binary=bool(match[3])) if match else 0
    except (ValueError, OverflowError):
        budget = 0
    if budget < 1:
        raise ConfigError(f"{argument('memory', requested)}: expected auto or a size such as 8GB, 8GiB or 500MB")
    return budget


def _bytes(number: float, prefix: str, *, binary: bool) -> int:
    """8 GB are 8 * 1000**3 bytes, 8 GiB are 8 * 1024**3."""
    return int(number * (1024 if binary else 1000) ** _UNITS[prefix.upper()])


def _parameters(
    cells: Sequence[tuple[int, int]], sender: Sequence[Shape], receiver: Sequence[Shape], kind: StepKind
) -> int:
    """Masters, gradients and momentum in fp32, a copy in the compute dtype; on the CPU also the results."""
    masters = _stitch_bytes(cells, sender, receiver, kind)
    cast = masters * kind.itemsize // 4 if kind.itemsize < 4 else 0
    return (4 if kind.device == "cpu" else 3) * masters + cast


def _stitch_bytes(
    cells: Sequence[tuple[int, int]], sender: Sequence[Shape], receiver: Sequence[Shape], kind: StepKind
) -> int:
    """Weights and biases in the dtype of the masters."""
    parameters = sum(Geometry.between(sender[i], receiver[j], kind.rules).parameters for i, j in cells)
    return parameters * max(4, kind.itemsize)


def _inputs(
    cells: Sequence[tuple[int, int]], sender: Sequence[Shape], receiver: Sequence[Shape], kind: StepKind
) -> int:
    """The mini-batch at every resolution that some stitch reads it at, and on the rows that it is aligned with."""
    geometries = {Geometry.between(sender[i], receiver[j], kind.rules) for i, j in cells}
    aligned = {geometry.alignment for geometry in geometries if geometry.alignment is not None}
    read = {(geometry.sender, geometry.down) for geometry in geometries if geometry.alignment is None and kind.gathers}
    read |= {(shape, 1) for shape, _ in read} | {(alignment.sender, 1) for alignment in aligned}
    per_image = sum(sender.count(shape) * elements(shape) for shape, _ in read)
    per_image += sum(
        sender.count(alignment.sender) * alignment.rows * alignment.features
        for alignment in aligned
        if not alignment.whole
    )
    return per_image * kind.images * kind.itemsize


def _temporaries(before: int, after: int, samples: int, kind: StepKind) -> int:
    """What one micro-batch of a block's backward pass allocates: both gradients, and a third tensor beside them."""
    largest = max(before, after) * kind.itemsize
    if kind.batch_statistics:
        stitches = max(1, CHUNK_BYTES[kind.device] // (largest * kind.images))
        return min(samples, stitches * kind.images) * (before + 2 * after) * kind.itemsize
    fixed = kind.micro_batch if kind.micro_batch > 1 else min(samples, max(8, CHUNK_BYTES[kind.device] // largest))
    if kind.regresses:
        # evaluation alone
        return fixed * after * kind.itemsize
    return fixed * (before + 2 * after) * kind.itemsize


def _norms(before: Shape, after: Shape) -> int:
    """BatchNorm layers of a block: two, and one more of its projection where shapes change."""
    return 2 if before == after else 3
