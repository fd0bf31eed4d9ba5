"""What ``auto`` means for a sweep on this machine: the same rules for runs and for predictions."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from fastsitch.errors import MemoryLimitError, argument
from fastsitch.machine import resolve_compile, resolve_kernel, resolve_precision
from fastsitch.network_names import NetworkName
from fastsitch.planning.group_memory import Pair, StepKind, largest_group, matching_memory, smallest_group_memory
from fastsitch.planning.machine_profile import Tuning, find_tuning, tuned_attention, tuned_compile, tuned_group_size
from fastsitch.planning.source_choice import SourceChoice
from fastsitch.receivers.contract import SegmentMemory
from fastsitch.runs.run_record import Resolved
from fastsitch.runs.sweep_config import SweepConfig
from fastsitch.runs.sweep_plan import SweepPlan
from fastsitch.vocabulary import Attention, Compile

log = logging.getLogger(__name__)

Segments = Mapping[NetworkName, Sequence[SegmentMemory]]


def resolve(
    root: Path,
    plan: SweepPlan,
    source: SourceChoice,
    device: torch.device,
    *,
    memory: str,
    budget: int,
    segments: Callable[[Attention], Segments] | None = None,
) -> Resolved:
    """Everything that ``auto`` chooses, given the source and the bytes a sweep may take (``memory``, as asked for).

    ``segments``: what those of receivers take that are no small ResNets, by the form of attention.

    Raises MemoryLimitError when a budget that was named does not hold a single cell.
    """
    config = plan.config
    precision = resolve_precision(config.precision, device)
    width = max(shapes[0][0] for shapes in plan.shapes.values())
    added = sorted({str(unit.receiver_network) for unit in plan.units if not unit.receiver_network.built_in})
    tuning = find_tuning(
        root, device, width=width, batch_size=config.recipe.batch_size, precision=precision, receivers=added
    )
    kernel = resolve_kernel(config.kernel, device)
    compile = _resolve_compile(config, tuning, device)
    step = step_kind(config, device, precision, kernel, compile)
    attention = tuned_attention(tuning)
    costs = {} if segments is None else segments(attention)
    return Resolved(
        device=device.type,
        precision=precision,
        kernel=kernel,
        compile=compile,
        group_size=_group_size(plan, step, tuning, budget - source.memory, costs, memory=memory),
        source=source.name,
        sources=source.others,
        attention=attention,
    )


def step_kind(config: SweepConfig, device: torch.device, precision: str, kernel: str, compile: str) -> StepKind:
    """What the memory of a training step depends on beside its cells, once ``auto`` is decided."""
    return StepKind.of(
        device,
        precision,
        kernel,
        compile,
        config.recipe.batch_size,
        config.receiver_bn,
        regresses=config.regresses,
        rules=config.rules,
    )


def _resolve_compile(config: SweepConfig, tuning: Tuning | None, device: torch.device) -> Compile:
    if config.receiver_bn == "frozen":
        return resolve_compile(tuned_compile(tuning, config.compile), device)
    if resolve_compile(config.compile, device) == "on":
        log.info("compile off: with batch statistics the receiver's blocks run eagerly")
    return "off"


def _group_size(
    plan: SweepPlan, step: StepKind, tuning: Tuning | None, free: int, segments: Segments, *, memory: str
) -> int:
    """The largest group that fits and is not slower than a smaller one, or the one asked for."""
    config, named = plan.config, memory != "auto"
    pairs = [
        Pair(
            plan.shapes[unit.sender_network],
            plan.shapes[unit.receiver_network],
            tuple(plan.geometries(unit)),
            segments.get(unit.receiver_network),
        )
        for unit in plan.units
    ]
    fits = _largest_group(config, pairs, step, free, named=named) if named or config.group_size == "auto" else 0
    if config.group_size == "auto":
        # what was measured are steps through the receiver
        return fits if config.regresses else tuned_group_size(tuning, fits)
    group_size = int(config.group_size)
    if named and min(group_size, max(len(pair.cells) for pair in pairs)) > fits:
        raise MemoryLimitError(
            f"{argument('group_size', group_size)}: {argument('memory', memory)} is enough for groups of {fits}; allow "
            f"more, or use {argument('group_size', 'auto')}"
        )
    return group_size


def _largest_group(config: SweepConfig, pairs: list[Pair], step: StepKind, free: int, *, named: bool) -> int:
    if config.solves:
        free -= max(
            matching_memory(sender, receiver, preconditioned=config.preconditions, rules=config.rules, cells=cells)
            for sender, receiver, cells, _ in pairs
        )
    needed = smallest_group_memory(pairs, step)
    if named and needed > free:
        raise MemoryLimitError(
            f"{argument('memory')} leaves {max(0, free) / 1e9:.2f} GB for a group of stitches, a single one needs "
            f"about {needed / 1e9:.2f} GB: allow more, or use a smaller {argument('batch_size')} or "
            f"{argument('source', 'streamed')}"
        )
    return largest_group(pairs, step, free)
