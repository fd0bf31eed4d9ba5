"""The entry point: all commands, and one place where errors become lines and exit codes."""

import errno
import re
import sys
import traceback

import typer

from fastsitch import __version__
from fastsitch.cli import progress_display
from fastsitch.cli.bench_command import bench
from fastsitch.cli.demo_command import demo
from fastsitch.cli.doctor_command import doctor
from fastsitch.cli.interrupts import hear_interrupts
from fastsitch.cli.list_command import list_root
from fastsitch.cli.network_commands import add, precompute, train
from fastsitch.cli.options import GroupedCommand, with_addresses
from fastsitch.cli.paper_command import paper
from fastsitch.cli.probe_command import probe
from fastsitch.cli.result_commands import compare, export, images, plot, tables
from fastsitch.cli.sweep_command import sweep
from fastsitch.errors import FastsitchError, printable

app = typer.Typer(
    name="fastsitch",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    # boxes in help, where they show the groups; errors are plain lines
    rich_markup_mode="markdown",
)

_GROUPS = {
    "Start": (demo,),
    "Networks and data": (train, add, precompute, probe),
    "Stitches": (sweep, paper),
    "Results": (export, plot, tables, images, compare),
    "This machine": (bench, list_root, doctor),
}
"""Commands in the order of the work."""

for title, commands in _GROUPS.items():
    for command in commands:
        name = "list" if command is list_root else command.__name__
        app.command(name, cls=GroupedCommand, rich_help_panel=title)(command)


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
    progress_display.show_log()
    hear_interrupts()
    sys.exit(_run())


def _run() -> int:
    try:
        code = app(args=with_addresses(sys.argv[1:]), standalone_mode=False)
        # typer turns Ctrl-C into a return value
        return _interrupted() if code == 130 else code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except typer.TyperException as error:
        # without a command, help was shown
        message = error.format_message()
        return _fail(_usage(error), error.exit_code) if message else error.exit_code
    except FastsitchError as error:
        return _fail(error.as_typed(), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.errno in _FULL:
            where = f"{error.filename}: " if error.filename else ""
            return _fail(f"{where}{error.strerror}; make room and run the same command again", 1)
        if error.errno not in _REFUSED or not error.filename:
            return _unexpected(error)
        if error.errno == errno.EISDIR:
            return _fail(f"{error.filename} is a folder: expected a file; remove it", 2)
        wanted = "expected a file or folder that can be read and written; see --root, --activations, --data-dir, --out"
        return _fail(f"cannot use {error.filename} ({error.strerror}): {wanted}", 2)
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
"""What the system says of files that are not as a command needs them; a full or failing disk is another matter."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of disks, quotas and limits that are reached."""


_CHOICE = re.compile(r"Invalid value for '([^']*)': (?:Value error, )?'(.*)' is not one of (.*?)\.?", re.DOTALL)


_NUMBER = re.compile(r"Invalid value for '([^']*)': .*valid (integer|number).*", re.DOTALL)


def _typed_value(option: str) -> str:
    """What was typed for an option."""
    for position, text in enumerate(sys.argv[:-1]):
        if text == option:
            return sys.argv[position + 1]
    return next((text.partition("=")[2] for text in sys.argv if text.startswith(f"{option}=")), "")


def _usage(error: typer.TyperException) -> str:
    """What typer says of a wrong command line, in the form of all other refusals."""
    message = error.format_message()
    number = _NUMBER.fullmatch(message)
    if number is not None:
        option, kind = number.groups()
        given = _typed_value(option)
        return f"{option}{f' {given}' if given else ''}: expected a {'whole number' if kind == 'integer' else kind}"
    wrong = _CHOICE.fullmatch(message)
    if wrong is None:
        context = getattr(error, "ctx", None)
        if context is None or context.parent is None:
            return f"{message} (fastsitch --help shows the commands)"
        return f"{message} (fastsitch {context.info_name} --help shows the options)"
    option, value, choices = wrong.groups()
    return f"{option} {value}: expected one of {choices.replace(chr(39), '')}"


def _unexpected(error: Exception) -> int:
    """A bug or a failing machine: one line, unless the traceback is wanted."""
    if _is_out_of_memory(error):
        reason = str(error).strip().split("\n")[0]
        return _fail(f"out of memory: try a smaller --batch-size, --memory or --source streamed ({reason})", 1)
    return _fail(f"failed: {type(error).__name__}: {error} (--debug shows where)", 1)


def _is_out_of_memory(error: Exception) -> bool:
    # what failed may be the import of torch
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from fastsitch.machine import out_of_memory

    return out_of_memory(error)


def _interrupted() -> int:
    return _fail("interrupted; finished units are saved, run the same command to resume", 1)


def _fail(message: str, code: int) -> int:
    if progress_display.debugging():
        traceback.print_exc()
    # a path, or what somebody typed, may be as long as a page, and command the terminal
    # a line of its own, such as a command to paste, is indented; other ends of lines come from names
    message = "\n  ".join(map(printable, message.split("\n  ")))
    message = re.sub(r"\S{400,}", lambda found: f"{found[0][:200]}...", message)
    sys.stderr.write(f"fastsitch: {message[:_LONGEST]}\n")
    return code


_LONGEST = 5000
"""Letters of a message; a list of the positions of a large network takes some thousands."""


if __name__ == "__main__":
    main()
