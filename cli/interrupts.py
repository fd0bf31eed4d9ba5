"""Ctrl-C, also where a library swallows it."""

import signal
from types import FrameType
from typing import NoReturn

_heard = False


class Interrupt(KeyboardInterrupt):
    """Ctrl-C. Python ends with its own exit code after a plain KeyboardInterrupt inside ``exec``, caught or not."""


def hear_interrupts() -> None:
    """Raise :class:`Interrupt` at Ctrl-C, unless the process ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def raise_interrupt() -> None:
    """Raise :class:`Interrupt` if Ctrl-C was heard: torch's imports go on after any error of a module they try."""
    if _heard:
        raise Interrupt


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    global _heard
    _heard = True
    raise Interrupt
