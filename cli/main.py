"""The entry point: all commands, and one place where errors become lines and exit codes."""

import errno
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

import typer

from fastsitch import __version__
from fastsitch.cli import bench, console, images, info, networks, paper, results, work
from fastsitch.cli.options import with_addresses
from fastsitch.errors import FastsitchError
from fastsitch.machine import out_of_memory

app = typer.Typer(
    name="fastsitch",
    help="Model stitching at the speed of the hardware.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for register in (
    work.register,
    networks.register,
    results.register,
    images.register,
    bench.register,
    paper.register,
    info.register,
):
    register(app)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fastsitch {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_version, is_eager=True),
) -> None:
    """Model stitching at the speed of the hardware."""


def main() -> None:
    """Run the command line; ends with 0 done, 1 failed while running, 2 bad usage or input."""
    console.show_log()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    sys.exit(_run())


def _run() -> int:
    try:
        code = app(args=with_addresses(sys.argv[1:]), standalone_mode=False)
        # typer turns Ctrl-C into a return value
        return _interrupted() if code == 130 else code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except typer.TyperException as error:
        return _fail(f"{error.format_message()} (fastsitch --help shows commands and options)", error.exit_code)
    except FastsitchError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.errno not in _REFUSED or not error.filename:
            return _unexpected(error)
        wanted = "expected a place that can be read and written; see --root, --activations, --data-dir and --out"
        return _fail(f"{error.filename}: {error.strerror}: {wanted}", 2)
    except Exception as error:
        return _unexpected(error)


_REFUSED = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)
"""What the system says of places that are not as a command needs them; a full or failing disk is another matter."""


def _unexpected(error: Exception) -> int:
    """A bug or a failing machine: one line, unless the traceback is wanted."""
    if out_of_memory(error):
        reason = str(error).strip().split("\n")[0]
        return _fail(f"out of memory: try a smaller --batch-size, --memory or --source streamed ({reason})", 1)
    return _fail(f"failed: {type(error).__name__}: {error} (--debug shows where)", 1)


class _Interrupt(KeyboardInterrupt):
    """Ctrl-C. Python ends with its own exit code after a plain KeyboardInterrupt inside ``exec``, caught or not."""


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise _Interrupt


def _interrupted() -> int:
    return _fail("interrupted; what is finished is kept, the same command does the rest", 1)


def _fail(message: str, code: int) -> int:
    if console.debugging():
        traceback.print_exc()
    sys.stderr.write(f"fastsitch: {message}\n")
    return code


if __name__ == "__main__":
    main()
