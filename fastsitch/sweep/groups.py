"""Training a unit group by group, in smaller groups where memory does not suffice after all."""

import logging
from collections.abc import Callable, Sequence

from fastsitch.errors import MemoryLimitError
from fastsitch.machine import out_of_memory, release_memory
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.engine import CellResult
from fastsitch.sweep.plan import split_groups

log = logging.getLogger(__name__)

Train = Callable[[list[Cell]], dict[Cell, CellResult]]


def train_in_groups(cells: Sequence[Cell], size: int, train: Train) -> tuple[dict[Cell, CellResult], int]:
    """Train ``cells`` in groups of at most ``size``; returns the results and the size that was possible.

    A group for which memory cannot be had is halved, and so are those after it. Raises MemoryLimitError when a single
    cell is too much.
    """
    results: dict[Cell, CellResult] = {}
    waiting = split_groups(cells, size)
    while waiting:
        group = waiting[0]
        reason = _try(train, group, results)
        if reason is None:
            waiting = waiting[1:]
            continue
        if len(group) == 1:
            raise MemoryLimitError(
                f"memory does not suffice for a single stitch ({reason}): use a smaller --batch-size, "
                "--source streamed, or a larger machine"
            )
        size = -(-len(group) // 2)
        log.warning("memory did not suffice for a group of %d cells: going on with %d at a time", len(group), size)
        left = {cell for own in waiting for cell in own}
        waiting = split_groups([cell for cell in cells if cell in left], size)
        # what the failed attempt held is gone only now that its traceback is
        release_memory()
    return results, size


def _try(train: Train, group: list[Cell], results: dict[Cell, CellResult]) -> str | None:
    """Train a group into ``results``; the first line of the reason when memory could not be had."""
    try:
        results |= train(group)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return str(error).strip().split("\n")[0] or type(error).__name__
    return None
