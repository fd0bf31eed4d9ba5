"""The matched stitches of a sender, one receiver at a time, shared by all seeds."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fastsitch.activations.ordered_split import OrderedSplit
from fastsitch.network_names import NetworkName
from fastsitch.progress import Progress, Report, ignore
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.geometry import DEFAULT_RULES, Rules
from fastsitch.stitching.matching import RIDGE, Matched, match
from fastsitch.stitching.moments import SenderMoments, pair_moments

log = logging.getLogger(__name__)


class MatchedStitches:
    """Matches one sender to receivers; what concerns the sender alone is computed for the first of them."""

    def __init__(self, sender: OrderedSplit, rules: Rules = DEFAULT_RULES) -> None:
        self._moments = SenderMoments(sender, rules)
        self._receiver: NetworkName | None = None
        self._matched: dict[tuple[int, int], Matched] = {}

    def of(
        self, unit: Unit, cells: Sequence[Cell], expected: OrderedSplit, report: Report = ignore
    ) -> dict[Cell, Matched]:
        """The matched stitches of a unit's cells; ``expected`` are the receiver's own representations.

        The cells are at the same positions for all units of a pair. ``report`` gets the images that statistics are
        accumulated over.
        """
        if unit.receiver_network != self._receiver:
            task = f"statistics of {unit.sender_network} and {unit.receiver_network}"

            def report_images(progress: Progress) -> None:
                report(replace(progress, task=task))

            positions = [(cell.i, cell.j) for cell in cells]
            self._matched = match(pair_moments(self._moments, expected, report_images, positions))
            self._receiver = unit.receiver_network
            methods = Counter(stitch.method for stitch in self._matched.values())
            log.info(
                "%s matched to %s: ridge %.0e, %s",
                unit.sender_network,
                unit.receiver_network,
                RIDGE,
                ", ".join(f"{count} by {method}" for method, count in methods.items()),
            )
        return {cell: self._matched[cell.i, cell.j] for cell in cells}
