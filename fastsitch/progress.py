"""How far some work is: one type and one callback for all of it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far some work is.

    Attributes:
        done: how much is done; what is half done counts in part.
        total: how much there is to do.
        unit: what is counted: steps, images, cells, ...
        task: the piece of work, such as ``train R1111``; rates count anew when it changes.
        note: more to show, such as the loss.
        left: seconds that are left, where they do not follow from what is done; NaN where nobody knows yet.
    """

    done: float
    total: float
    unit: str = ""
    task: str = ""
    note: str = ""
    left: float | None = None


Report = Callable[[Progress], None]
"""report(progress): called while the work goes on, in the process that asked for it."""


def ignore(progress: Progress) -> None:
    """For callers who want no reports."""
