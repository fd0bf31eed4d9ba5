"""The matched stitches of a sender, one receiver at a time, shared by all seeds."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence

from fastsitch.activations.ordered import OrderedSplit
from fastsitch.networks.names import NetworkName
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.geometry import DEFAULT_RULES, Rules
from fastsitch.stitching.matching import RIDGE, Matched, match
from fastsitch.stitching.moments import SenderMoments, pair_moments
from fastsitch.sweep.plan import PlannedUnit

log = logging.getLogger(__name__)


class MatchedStitches:
    """Matches one sender to receivers; what concerns the sender alone is computed for the first of them."""

    def __init__(self, sender: OrderedSplit, rules: Rules = DEFAULT_RULES) -> None:
        self._moments = SenderMoments(sender, rules)
        self._receiver: NetworkName | None = None
        self._matched: dict[tuple[int, int], Matched] = {}

    def of(
        self,
        planned: PlannedUnit,
        cells: Sequence[Cell],
        expected: OrderedSplit,
        report: Callable[[float], None] | None = None,
    ) -> dict[Cell, Matched]:
        """The matched stitches of a unit's cells; ``expected`` are the receiver's own representations.

        The cells are at the same positions for all units of a pair. ``report`` is told the cells done so far, which are
        fractions of one until all are done.
        """
        if planned.receiver != self._receiver:

            def tell(done: int, total: int) -> None:
                if report is not None:
                    report(done / total)

            self._matched = match(pair_moments(self._moments, expected, tell, [(cell.i, cell.j) for cell in cells]))
            self._receiver = planned.receiver
            methods = Counter(stitch.method for stitch in self._matched.values())
            log.info(
                "%s matched to %s: ridge %.0e, %s",
                planned.sender,
                planned.receiver,
                RIDGE,
                ", ".join(f"{count} by {method}" for method, count in methods.items()),
            )
        return {cell: self._matched[cell.i, cell.j] for cell in cells}
