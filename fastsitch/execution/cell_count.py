"""How far a sweep is, in cells, and how long it will take."""

import math
import time
from collections.abc import Sequence

from fastsitch.progress import Progress, Report
from fastsitch.runs.run import Run
from fastsitch.stitching.cells import Unit


class CellCount:
    """Progress of a run in cells: those of finished units, and what is done of the units under way.

    Statistics of pairs are a piece of work of their own, in images. The time left is that of the cells at the pace at
    which cells are trained, and that of the statistics to come at the mean of those before: the two have nothing to do
    with each other. It counts from :meth:`begin` on; where workers train several units at once and nobody calls that,
    it follows from the units that are finished.
    """

    def __init__(self, run: Run, missing: Sequence[Unit], report: Report) -> None:
        self._total = run.plan.count(run.units)
        self._finished: float = self._total - run.plan.count(missing)
        self._finished_before = self._finished
        self._under_way: dict[Unit, float] = {}
        self._report = report
        self._began = time.monotonic()
        self._clock: float | None = None
        self._trained = self._training_seconds = 0.0
        self._pairs = {_pair(unit) for unit in missing} if run.config.solves else set()
        """Whose statistics are to come."""
        self._statistics_seconds: list[float] = []

    def begin(self, unit: Unit) -> None:
        """A unit is under way, and no other."""
        self._clock = time.monotonic()

    def report(self, unit: Unit, progress: Progress) -> None:
        """What is done of a unit that is under way: its cells, or the images of its statistics."""
        if progress.unit != "cells":
            self._tell_statistics(unit, progress)
            return
        before = self._under_way.get(unit, 0.0)
        if self._clock is not None:
            now = time.monotonic()
            self._training_seconds += now - self._clock
            # a group that was too large begins again
            self._trained += max(0.0, progress.done - before)
            self._clock = now
        self._under_way[unit] = progress.done
        self._tell(unit)

    def finish(self, unit: Unit, cells: int) -> None:
        """A unit is saved."""
        self._pairs.discard(_pair(unit))
        before = self._under_way.pop(unit, 0.0)
        if self._clock is not None:
            self._training_seconds += time.monotonic() - self._clock
            self._trained += cells - before
            self._clock = None
        self._finished += cells
        self._tell(unit)

    def _tell_statistics(self, unit: Unit, progress: Progress) -> None:
        # workers report them too, several at once
        if self._clock is None:
            return
        if progress.done >= progress.total:
            now = time.monotonic()
            self._statistics_seconds.append(now - self._clock)
            self._clock = now
            self._pairs.discard(_pair(unit))
        self._report(progress)

    def _tell(self, unit: Unit) -> None:
        done = self._finished + sum(self._under_way.values())
        self._report(Progress(done, self._total, "cells", "sweep", unit.name, self._left(done)))

    def _left(self, done: float) -> float:
        if self._trained > 0:
            statistics = sum(self._statistics_seconds) / max(1, len(self._statistics_seconds))
            return (self._total - done) * self._training_seconds / self._trained + len(self._pairs) * statistics
        finished = self._finished - self._finished_before
        if finished == 0:
            return math.nan
        return (self._total - done) * (time.monotonic() - self._began) / finished


def _pair(unit: Unit) -> tuple[object, object]:
    return unit.sender_network, unit.receiver_network
