"""Libraries say of weights that they cannot load where in their own code that shows; here, which file it is and why."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastsitch.errors import NetworkError, plain
from fastsitch.networks.weight_files import read_file

_SHOWN = 150


@contextmanager
def naming_weights(
    paths: Callable[[], Sequence[Path]], what: str, build: Callable[[], object], *, published: bool
) -> Iterator[None]:
    """Raise NetworkError that names files of weights, and what to do, where a library cannot load them.

    ``paths`` gives those that are there; with none, or where the network cannot be ``build`` without weights either, it
    is no matter of theirs. What was ``published`` can be downloaded again.
    """
    try:
        yield
    except (NetworkError, MemoryError):
        raise
    # a library's code: it may raise anything
    except Exception as error:
        files = [path for path in paths() if path.is_file()]
        if not files or not _works(build):
            raise
        again = "remove it, and it is downloaded again" if published else "put the whole file there again"
        for path in files:
            _require_readable(path, again)
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        remedy = again if published else "put those there that belong to the config.json beside them, or correct that"
        raise NetworkError(
            f"{plain(str(files[0]))}{others} does not hold weights of {what} ({type(error).__name__}: "
            f"{_brief(error)}): {remedy}"
        ) from error


def _require_readable(path: Path, again: str) -> None:
    try:
        read_file(path, plain(str(path)))
    except NetworkError as error:
        # what is not unpickled comes with a line of code that converts it
        rest = f"\n  mv weights.pt {shlex.quote(plain(str(path)))}" if "\n" in error.message else f"; {again}"
        raise NetworkError(f"{error.message}{rest}") from None


def _works(build: Callable[[], object]) -> bool:
    try:
        build()
    # a library's code: it may raise anything
    except Exception:
        return False
    return True


def _brief(error: Exception) -> str:
    text = plain(" ".join(str(error).split()))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
