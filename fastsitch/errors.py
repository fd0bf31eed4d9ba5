"""The errors a user can cause. Each says what was expected, what was found and what to do.

A message names an argument by :func:`argument`: read from Python it is the argument of the function that was called
(``batch_size=0``), on the command line the option (``--batch-size 0``).
"""

import re
from collections.abc import Sequence

_BEGIN, _MIDDLE, _END = "\ue000", "\ue001", "\ue002"
_ARGUMENT = re.compile(f"{_BEGIN}([^{_MIDDLE}]*){_MIDDLE}([^{_END}]*){_END}")


_LONGEST = 200


def plain(text: str) -> str:
    """A text that others wrote, for a message of one line: without control characters, and not too long."""
    shown = printable(text)
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "..."


def printable(text: str) -> str:
    """A text without control characters and ends of lines."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def argument(name: str, *value: object, option: str | None = None) -> str:
    """The text by which a message names an argument, with its value if one is given.

    ``option`` is what the command line calls it, where that is not ``--name`` with hyphens.
    """
    flag = option or "--" + name.replace("_", "-")
    if not value:
        return f"{_BEGIN}{name}{_MIDDLE}{flag}{_END}"
    (given,) = value
    items = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    text = plain(",".join(map(str, items)))
    python = f"{name}={given!r}" if isinstance(given, int | float | None) else f"{name}={text!r}"
    shown = "(none)" if given is None or not items else text or "''"
    typed = flag if given is True else f"{flag} {shown}"
    return f"{_BEGIN}{python}{_MIDDLE}{typed}{_END}"


class FastsitchError(Exception):
    """Base of all errors that fastsitch raises on purpose.

    Attributes:
        exit_code: what the command line ends with: 2 for bad usage or input, 1 for what failed while it ran.
    """

    exit_code = 2

    @property
    def message(self) -> str:
        """The message with its arguments still marked, for an error that repeats it."""
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        return _ARGUMENT.sub(r"\1", self.message)

    def as_typed(self) -> str:
        """The message with options in place of arguments, for those who typed a command."""
        return _ARGUMENT.sub(r"\2", self.message)


class ConfigError(FastsitchError, ValueError):
    """An option or a combination of options that cannot work."""


class DataError(FastsitchError, ValueError):
    """A data set that is missing or malformed."""


class NetworkError(FastsitchError, LookupError):
    """A network that is unknown, untrained or inconsistent with what is asked of it."""


class StoreError(FastsitchError, ValueError):
    """An activation store that is incomplete, altered, stale or foreign."""


class RunError(FastsitchError, ValueError):
    """A run that does not exist, differs from the one asked for, or is damaged."""


class BusyError(FastsitchError, RuntimeError):
    """Another process is writing the same thing."""

    exit_code = 1


class FailedError(FastsitchError, RuntimeError):
    """Work that began and could not be finished: a training that diverged, a full disk."""

    exit_code = 1


class MemoryLimitError(FastsitchError, RuntimeError):
    """Not enough memory for what was asked."""
