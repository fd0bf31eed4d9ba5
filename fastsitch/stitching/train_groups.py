"""All cells of a unit, group by group, in smaller groups where memory does not suffice after all."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.source import Source
from fastsitch.errors import MemoryLimitError, argument
from fastsitch.machine import out_of_memory, release_memory
from fastsitch.progress import Progress, Report, ignore
from fastsitch.receivers.contract import Receiver
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell, split_groups
from fastsitch.stitching.engine import evaluate_matched, train_group
from fastsitch.stitching.geometry import DEFAULT_RULES, Rules
from fastsitch.stitching.matching import Matched
from fastsitch.stitching.recipe import TrainingRecipe
from fastsitch.stitching.regression import regress_group

log = logging.getLogger(__name__)

Results = dict[Cell, CellResult]

Work = Callable[[list[Cell], Report], Results]
"""work(group, report): what is done with the cells of one group, all of which have the same receiver."""


@dataclass(frozen=True, kw_only=True)
class StitchWork:
    """What can be done with stitches from one sender into one receiver, a group at a time."""

    receiver: Receiver
    source: Source
    recipe: TrainingRecipe
    order: ImageOrder
    kernel: str = "torch"
    rules: Rules = DEFAULT_RULES

    def train(self, init: Mapping[Cell, Matched] | None = None) -> Work:
        """Train on the task loss, from the matched stitches ``init`` if they are given."""

        def work(group: list[Cell], report: Report) -> Results:
            return train_group(
                self.receiver,
                self.source,
                group,
                self.recipe,
                self.order,
                kernel=self.kernel,
                init=init,
                rules=self.rules,
                report=report,
            )

        return work

    def regress(self, expected: Source) -> Work:
        """Train on the squared error to the receiver's own representations."""
        receiver = self.receiver
        assert isinstance(receiver, FrozenNetwork), "batch statistics are for the task loss"

        def work(group: list[Cell], report: Report) -> Results:
            return regress_group(
                receiver,
                self.source,
                expected,
                group,
                self.recipe,
                self.order,
                kernel=self.kernel,
                rules=self.rules,
                report=report,
            )

        return work

    def evaluate(self, matched: Mapping[Cell, Matched]) -> Work:
        """Evaluate stitches that are matched exactly: there is nothing left to train."""

        def work(group: list[Cell], report: Report) -> Results:
            stitches = {cell: matched[cell] for cell in group}
            # twice the batch of training: what training keeps for gradients takes more
            images = 2 * self.recipe.batch_size
            return evaluate_matched(
                self.receiver, self.source, stitches, images=images, kernel=self.kernel, rules=self.rules
            )

        return work


def train_in_groups(cells: Sequence[Cell], size: int, work: Work, report: Report = ignore) -> tuple[Results, int]:
    """Do ``work`` on ``cells`` in groups of at most ``size``; returns the results and the size that was possible.

    A group for which memory cannot be had is halved, and so are those after it. ``report`` gets the cells done. Raises
    MemoryLimitError when a single cell is too much.
    """
    results: Results = {}
    waiting = split_groups(cells, size)
    while waiting:
        group, done = waiting[0], len(results)

        def report_group(progress: Progress, done: int = done) -> None:
            report(replace(progress, done=done + progress.done, total=len(cells)))

        reason = _try(work, group, report_group, results)
        if reason is None:
            waiting = waiting[1:]
            continue
        # what the failed attempt held is gone only now that its traceback is; a log line takes memory too
        release_memory()
        if len(group) == 1:
            raise MemoryLimitError(
                f"memory does not suffice for a single stitch ({reason}): use a smaller {argument('batch_size')}, "
                f"{argument('source', 'streamed')}, or a larger machine"
            )
        size = -(-len(group) // 2)
        log.warning("memory did not suffice for a group of %d cells: going on with %d at a time", len(group), size)
        left = {cell for group in waiting for cell in group}
        waiting = split_groups([cell for cell in cells if cell in left], size)
    return results, size


def _try(work: Work, group: list[Cell], report: Report, results: Results) -> str | None:
    """Do the work on a group, into ``results``; the first line of the reason when memory could not be had."""
    try:
        results |= work(group, report)
    except (RuntimeError, MemoryError, SystemError, OSError) as error:
        if not out_of_memory(error):
            raise
        return str(error).strip().split("\n")[0] or type(error).__name__
    return None
