"""What ``auto`` means for a sweep on this machine: one place for runs and for predictions."""

import logging
from pathlib import Path

import torch

from fastsitch.errors import MemoryLimitError
from fastsitch.machine import resolve_compile, resolve_kernel, resolve_precision
from fastsitch.sweep.choose_source import SourceChoice
from fastsitch.sweep.config import SweepConfig
from fastsitch.sweep.memory import Pair, StepKind, largest_group, matching_memory, smallest_group_memory
from fastsitch.sweep.plan import Positions, plan_units, planned_cells
from fastsitch.sweep.profile import Tuning, find_tuning, tuned_compile, tuned_group_size
from fastsitch.sweep.results import Resolved

log = logging.getLogger(__name__)


def resolve(
    root: Path,
    config: SweepConfig,
    positions: Positions,
    source: SourceChoice,
    device: torch.device,
    *,
    memory: str,
    budget: int,
) -> Resolved:
    """Everything that ``auto`` chooses, given the source and the bytes a sweep may take (``memory``, as asked for).

    Raises MemoryLimitError when a budget that was named does not hold a single cell.
    """
    precision = resolve_precision(config.precision, device)
    width = max(own[0][1][0] for own in positions.values())
    tuning = find_tuning(root, device, width=width, batch_size=config.recipe.batch_size, precision=precision)
    kernel = resolve_kernel(config.kernel, device)
    compile = _resolve_compile(config, tuning, device)
    pairs = _pairs(config, positions)
    if config.group_size == "auto" or memory != "auto":
        kind = StepKind.of(
            device,
            precision,
            kernel,
            compile,
            config.recipe.batch_size,
            config.receiver_bn,
            regresses=config.regresses,
            rules=config.rules,
        )
        fits = _largest_group(config, pairs, kind, budget - source.memory, named=memory != "auto")
    if config.group_size == "auto":
        # what was measured are steps through the receiver
        group_size = fits if config.regresses else tuned_group_size(tuning, fits)
    else:
        group_size = int(config.group_size)
        largest = max(len(cells) for _, _, cells in pairs)
        if memory != "auto" and min(group_size, largest) > fits:
            raise MemoryLimitError(
                f"--group-size {group_size}: --memory {memory} is enough for groups of {fits}; allow more, or use "
                f"--group-size auto"
            )
    return Resolved(
        device=device.type,
        precision=precision,
        kernel=kernel,
        compile=compile,
        group_size=group_size,
        source=source.name,
    )


def _resolve_compile(config: SweepConfig, tuning: Tuning | None, device: torch.device) -> str:
    if config.receiver_bn == "frozen":
        return resolve_compile(tuned_compile(tuning, config.compile), device)
    if resolve_compile(config.compile, device) == "on":
        log.info("compile off: with --receiver-bn batch the receiver's blocks run eagerly")
    return "off"


def _pairs(config: SweepConfig, positions: Positions) -> list[Pair]:
    """The networks of every unit, and its cells."""
    shapes = {name: [shape for _, shape in own] for name, own in positions.items()}
    return [
        (
            shapes[planned.sender],
            shapes[planned.receiver],
            [(cell.i, cell.j) for cell in planned_cells(config, planned, positions)],
        )
        for planned in plan_units(config)
    ]


def _largest_group(config: SweepConfig, pairs: list[Pair], kind: StepKind, room: int, *, named: bool) -> int:
    if config.solves:
        room -= max(
            matching_memory(sender, receiver, preconditioned=config.preconditions, rules=config.rules, cells=cells)
            for sender, receiver, cells in pairs
        )
    needed = smallest_group_memory(pairs, kind)
    if named and needed > room:
        raise MemoryLimitError(
            f"--memory leaves {max(0, room) / 1e9:.2f} GB for a group of stitches, a single one needs about "
            f"{needed / 1e9:.2f} GB: allow more, or use a smaller --batch-size or --source streamed"
        )
    return largest_group(pairs, kind, room)
