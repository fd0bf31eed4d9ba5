"""Which outputs of a pretrained network stand for the classes of a data set, by their names."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastsitch.errors import NetworkError, argument

_SHOWN = 5
_MOST_BYTES = 2**20
_CERTAIN = 0.9
"""Share of the classes of a network by whose order the others are known."""


def matched_outputs(
    classes: Sequence[str], labels: Sequence[Sequence[str]], given: Mapping[str, str], network: str
) -> tuple[int, ...]:
    """The output for each class of a data set.

    ``labels`` are the names of every output, such as a synset id and words; ``given`` says for some classes which
    output is meant, by its index or one of its names. An output without names stands for no class but by its index.
    Raises NetworkError for classes that no output, or several, stand for, and for two classes of one output.
    """
    named = _outputs_by_name(labels)
    unknown = [name for name in given if name not in classes]
    if unknown:
        raise NetworkError(
            f"{argument('classes_from')} names {_listed(unknown)}: no such classes; the data set has {_listed(classes)}"
        )
    found: list[int] = []
    missing: list[str] = []
    several: list[str] = []
    indices = {str(k): k for k in range(len(labels))}
    named_so = "" if named.keys() <= indices.keys() else f", or a name such as {examples(labels)}"
    in_order = _all_in_order(classes, named, len(labels))
    for index, name in enumerate(classes):
        wanted = given.get(name, name)
        by_index = indices.get(wanted.lstrip("0") or "0")
        if name in given and by_index is not None:
            found.append(by_index)
            continue
        outputs = _outputs(wanted, named)
        if name in given and not outputs:
            raise NetworkError(
                f"{argument('classes_from')} says that {name} is the output {wanted[:60]}, which {network} does not "
                f"have: expected an index from 0 to {len(labels) - 1}{named_so}"
            )
        if len(outputs) == 1:
            found += outputs
        elif in_order and name not in given:
            found.append(index)
        else:
            (several if outputs else missing).append(name)
    remedy = f"say it in a file for {argument('classes_from')}, a line each such as 'class,output'"
    if missing:
        raise NetworkError(
            f"{network} has no output named {_listed(missing)}: expected folders named by its outputs, such as "
            f"{examples(labels)}; {remedy}"
        )
    if several:
        raise NetworkError(f"{network} has several outputs named {_listed(several)}: {remedy}")
    twice = [name for name, output in zip(classes, found, strict=True) if found.count(output) > 1]
    if twice:
        raise NetworkError(f"{_listed(twice)} are one output of {network}: expected one for each class; {remedy}")
    return tuple(found)


def fits_some(classes: Sequence[str], labels: Sequence[Sequence[str]]) -> bool:
    """Whether any class has the name of an output: then all of them should."""
    named = _outputs_by_name(labels)
    return any(_outputs(name, named) for name in classes)


def examples(labels: Sequence[Sequence[str]]) -> str:
    """Names of the first and of the last output that have any, for messages."""
    named = [names for names in labels if names]
    return " or ".join(dict.fromkeys((named[0][0], named[-1][-1])))


def _outputs_by_name(labels: Sequence[Sequence[str]]) -> dict[str, set[int]]:
    named: dict[str, set[int]] = {}
    for index, names in enumerate(labels):
        for name in names:
            named.setdefault(_plain(name), set()).add(index)
    return named


def _outputs(name: str, named: Mapping[str, set[int]]) -> set[int]:
    """Those that have a name or, where it is several with commas (``tench, Tinca tinca``), all known ones of these."""
    known = [named[part] for part in (_plain(name), *map(_plain, name.split(","))) if part in named]
    return set.intersection(*known) if known else set()


def _all_in_order(classes: Sequence[str], named: Mapping[str, set[int]], outputs: int) -> bool:
    """Whether the classes are those of the network, by their number and by the order of those whose output is certain.

    Of the thousand of ImageNet, two are called crane.
    """
    if len(classes) != outputs:
        return False
    certain = [(index, *found) for index, name in enumerate(classes) if len(found := _outputs(name, named)) == 1]
    return len(certain) >= _CERTAIN * outputs and all(index == output for index, output in certain)


def read_class_outputs(path: Path) -> dict[str, str]:
    """``class,output`` or ``class<TAB>output`` per line, the output by index or name; raises NetworkError."""
    try:
        if path.exists() and not path.is_file():
            raise NetworkError(f"{argument('classes_from', path)} is no regular file: expected lines of class,output")
        # spreadsheets put a byte order mark first
        with path.open(encoding="utf-8-sig") as file:
            lines = file.read(_MOST_BYTES).splitlines()
    except OSError as error:
        raise NetworkError(f"cannot read {argument('classes_from', path)} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise NetworkError(
            f"{argument('classes_from', path)} is no text in UTF-8: expected lines of class,output"
        ) from None
    given: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, output = (part.strip() for part in line.partition("\t" if "\t" in line else ","))
        if not name or not output or name in given:
            raise NetworkError(
                f"{path}:{number}: expected class,output, such as n01440764,0, each class once; found {line[:60]!r}"
            )
        given[name] = output
    return given


def _plain(name: str) -> str:
    """Upper and lower case, underscores, hyphens and blanks make no difference."""
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
