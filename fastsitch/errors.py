"""The errors a user can cause. Each says what was expected, what was found and what to do."""


class FastsitchError(Exception):
    """Base of all errors that fastsitch raises on purpose; ``exit_code`` is what the command line ends with."""

    exit_code = 2


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
