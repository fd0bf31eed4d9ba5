"""Command lines with one thing wrong each: refused with exit code 2 in one to three lines that name the thing."""

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import typer

from bench.fault_cases.hooks import tiny_study
from bench.fault_cases.stage import MOST_MEMORY, Ended, Outcome, Stage
from bench.fault_cases.words import CONTRADICTIONS, ELSEWHERE, LINES, LONG, ODD, RED, WRONG, Line
from fastsitch.cli.main import app


def require_all_options_known() -> None:
    """Fail where a command has an option that no fault is known for."""
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        declared = {text for option in command.params for text in option.opts if text.startswith("--")}
        missing = declared - LINES[name].options.keys() - ELSEWHERE - {"--root", "--out"}
        assert not missing, f"{name} has options without faults: {missing}"


@dataclass(frozen=True)
class Fault:
    """A command line, what is wrong with it, and what a refusal may call that."""

    arguments: tuple[str, ...]
    title: str
    names: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()


def line_case(stage: Stage, draw: random.Random, number: int) -> Outcome:
    """One command line with one thing wrong."""
    names = list(LINES)
    command = names[number % len(names)]
    stage.restore("finished")
    fault = draw.choice(_FAULTS)(command, LINES[command], draw)
    return try_line(stage, fault)


def require_lines_that_work(stage: Stage) -> None:
    """Fail where a line that is to be spoiled does not work as it is."""
    for line in LINES.values():
        if line.begins:
            stage.restore("finished")
            ended = stage.run(*line.arguments, hook=tiny_study)
            assert ended.code == 0, (line.arguments, ended.stderr)


def try_line(stage: Stage, fault: Fault) -> Outcome:
    """Run a wrong line in a root where there is something of everything."""
    before = stage.files()
    ended = stage.run(*fault.arguments, hook=tiny_study, **dict(fault.variables))
    word, wrong = judge_refusal(ended, fault.names)
    if stage.files() != before:
        word += ", something left"
    return Outcome.of(
        fault.arguments[0] if fault.arguments and fault.arguments[0] in LINES else "(none)",
        fault.title,
        word,
        wrong,
        tuple(argument[:100] for argument in fault.arguments),
        ended,
    )


def judge_refusal(ended: Ended, names: Sequence[str]) -> tuple[str, str]:
    """How it ended, and what was wrong about that: ``kind: detail``, or nothing."""
    lines = ended.stderr.splitlines()
    if ended.traceback:
        return "traceback", "traceback: "
    if ended.code == 0:
        return "accepted", "believed: it was accepted"
    if ended.code != 2:
        return "failed", f"wrong exit: it ended with {ended.code}"
    if not 1 <= len(lines) <= 3:
        return "refused", f"wrong exit: {len(lines)} lines"
    if not any(_shown(name) in ended.stderr or repr(name)[1:-1][:60] in ended.stderr for name in names if name):
        return "refused", f"wrong exit: nothing names {' or '.join(repr(name[:60]) for name in names)}"
    if any(not letter.isprintable() for line in lines for letter in line):
        return "refused by name", "wrong exit: control characters in the message"
    if max(map(len, lines)) > 2000:
        return "refused by name", f"wrong exit: a line of {max(map(len, lines))} letters"
    if ended.memory > MOST_MEMORY:
        return "refused by name", f"wrong exit: it took {ended.memory >> 20} MiB"
    return "refused by name", ""


def _shown(name: str) -> str:
    """A name as a message shows it."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)[:60]


def _wrong_value(command: str, line: Line, draw: random.Random) -> Fault:
    option = draw.choice(list(line.options))
    kind = line.options[option]
    if not isinstance(kind, str):
        words = [str(choice) for choice in get_args(kind)]
        word = draw.choice(words)
        wrong = [_misspelt(word, words, draw), word.upper(), word + " ", "", word + "," + word, *ODD]
        value = draw.choice([text for text in wrong if text not in words])
    else:
        value = draw.choice(WRONG[kind])
    arguments = list(line.arguments)
    if option in arguments:
        arguments[arguments.index(option) + 1] = value
    else:
        arguments += [option, value]
    # click tells an option from a value by its first letter
    if draw.random() < 0.3:
        position = arguments.index(option)
        arguments[position : position + 2] = [f"{option}={value}"]
    return Fault(tuple(arguments), f"{option} {value[:40]!r}", (option, *_telling(value, option)))


def _wrong_argument(command: str, line: Line, draw: random.Random) -> Fault:
    if not line.positional:
        return _wrong_value(command, line, draw)
    position, kind = draw.choice(line.positional)
    value = draw.choice(WRONG[kind])
    arguments = [*line.arguments]
    arguments[position] = value
    role = {"run": "run ", "new network": "network name"}.get(kind, "network")
    return Fault(tuple(arguments), f"argument {value[:40]!r}", (*_telling(value), *([role] if len(value) < 3 else [])))


def _telling(value: str, option: str = "") -> tuple[str, ...]:
    """What may name a wrong value in a message, if it cannot be there by chance; of a file or folder also its path."""
    path = value.partition(":")[2]
    # a file or folder also by its path, without the size and the colour of images
    names = [value, *([repr(value)] if value.strip() else []), *([f"/{path.partition('@')[0]} "] if path else [])]
    spoken = {"--dataset": ("unknown data set",), "--positions": ("no position of",)}.get(option, ())
    if option == "--layout":
        return (*names, "for layout")
    return (*(name for name in names if len(name.strip()) >= 3), *(spoken if len(value) < 3 else ()))


def _misspelt(word: str, known: Sequence[str], draw: random.Random) -> str:
    """A word with one letter too few, too many or wrong, which is none of the known ones."""
    while True:
        position, letter = draw.randrange(len(word)), draw.choice(string.ascii_lowercase)
        found = word[:position] + draw.choice(["", letter, letter + word[position]]) + word[position + 1 :]
        if found not in known and found.strip("-"):
            return found


def _misspelt_command(command: str, line: Line, draw: random.Random) -> Fault:
    wrong = draw.choice([_misspelt(command, list(LINES), draw), command.upper(), command + "s ", RED, LONG])
    return Fault((wrong, *line.arguments[1:]), f"command {wrong[:40]!r}", (wrong,))


def _unknown_option(command: str, line: Line, draw: random.Random) -> Fault:
    known = [*line.options, *ELSEWHERE]
    option = "--" + _misspelt(draw.choice(list(line.options))[2:], [text[2:] for text in known], draw)
    wrong = draw.choice([option, option + "=x", "--frobnicate", "-q", "—force", "--no-debug"])
    arguments = [*line.arguments]
    arguments.insert(1 if wrong.startswith("--") and draw.random() < 0.5 else len(arguments), wrong)
    return Fault(tuple(arguments), f"unknown option {wrong}", (wrong.partition("=")[0],))


def _no_value(command: str, line: Line, draw: random.Random) -> Fault:
    option = draw.choice([text for text in line.options if text != "--ray"])
    arguments = [*line.arguments]
    if option in arguments:
        position = arguments.index(option)
        del arguments[position : position + 2]
    return Fault((*arguments, option), f"{option} without a value", (option,))


def _left_out(command: str, line: Line, draw: random.Random) -> Fault:
    things: list[tuple[int, int, str]] = [(position, 1, "") for position, _ in line.positional]
    things += [(line.arguments.index(option), 2, option) for option in line.required]
    if not things:
        return _unknown_option(command, line, draw)
    position, count, option = draw.choice(things)
    arguments = [*line.arguments]
    del arguments[position : position + count]
    title = f"without {option or 'its argument'}"
    return Fault(tuple(arguments), title, (option,) if option else ("Missing argument", "no network"))


def _too_many(command: str, line: Line, draw: random.Random) -> Fault:
    if command in ("train", "precompute"):
        return _wrong_argument(command, line, draw)
    extra = draw.choice(["extra", "R1111", "run", RED, LONG])
    return Fault((*line.arguments, extra), f"argument too many {extra[:40]!r}", (extra,))


def _flag_with_value(command: str, line: Line, draw: random.Random) -> Fault:
    flag = draw.choice(["--debug"] + (["--force"] if command in ("train", "add", "precompute") else []))
    return Fault((*line.arguments, f"{flag}=yes"), f"{flag}=yes", (flag,))


def _contradiction(command: str, line: Line, draw: random.Random) -> Fault:
    arguments, name = draw.choice(CONTRADICTIONS)
    return Fault(arguments, f"contradiction: {name}", (name,))


def _variable(command: str, line: Line, draw: random.Random) -> Fault:
    """A wrong value in the environment, where the command line names no folder."""
    if command in ("demo", "bench", "paper"):
        return _wrong_value(command, line, draw)
    name = draw.choice(["FASTSITCH_ROOT", *(["FASTSITCH_ACTIVATIONS"] if "--activations" in line.options else [])])
    value = draw.choice(["few.npz", "mine.py", "/dev/null"])
    arguments = [*line.arguments]
    if name == "FASTSITCH_ROOT":
        position = arguments.index("--root")
        del arguments[position : position + 2]
    return Fault(tuple(arguments), f"{name}={value}", (value, name), ((name, value),))


_FAULTS: tuple[Callable[[str, Line, random.Random], Fault], ...] = (
    *(9 * (_wrong_value,)),
    *(2 * (_wrong_argument,)),
    *(2 * (_contradiction,)),
    _misspelt_command,
    _unknown_option,
    _no_value,
    _left_out,
    _too_many,
    _flag_with_value,
    _variable,
)
