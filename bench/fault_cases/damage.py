"""Files of a root that are damaged at random, and what commands that may read them make of it."""

import fnmatch
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.fault_cases.stage import (
    DATA,
    MOST_MEMORY,
    PRECOMPUTE,
    ROOT,
    SWEEP,
    TRAIN,
    Ended,
    Outcome,
    Stage,
    Whole,
    differences,
)

READERS: dict[str, tuple[str, ...]] = {
    "list": ("list", *ROOT),
    "train": (*TRAIN,),
    "train mine": ("train", "mine", *DATA, "--epochs", "1", *ROOT),
    "add": ("add", "mine", "--from", "mine.py:small", *DATA, *ROOT),
    "precompute": PRECOMPUTE,
    "precompute mine": ("precompute", "mine", *ROOT),
    "precompute control": ("precompute", "R1111-random@0", *ROOT),
    "sweep": (*SWEEP, "--run", "run"),
    "sweep anew": (*SWEEP, "--run", "anew", "--lr", "0.2"),
    "sweep streamed": (*SWEEP, "--run", "streamed", "--lr", "0.2", "--source", "streamed"),
    "sweep live": (*SWEEP, "--run", "live", "--lr", "0.2", "--source", "live"),
    "sweep mine": ("sweep", "--senders", "mine", "--receivers", "mine", "--run", "own", *SWEEP[7:]),
    "match": (*SWEEP, "--run", "matched", "--loss", "match"),
    "match anew": (*SWEEP, "--run", "matching", "--loss", "match", "--solver", "sgd"),
    "export": ("export", "run", "--out", "o/matrices", *ROOT),
    "plot": ("plot", "run", "--out", "o/plots", *ROOT),
    "plot overview": ("plot", "run", "--figure", "overview", "--out", "o/more", *ROOT),
    "tables": ("tables", "run", "--out", "o/tables", *ROOT),
    "tables anew": ("tables", "other", *ROOT),
    "images": ("images", "run", "--count", "2", "--out", "o/images", *ROOT),
    "images anew": ("images", "run", "--count", "3", "--seed", "1", "--out", "o/others", *ROOT),
    "compare": ("compare", "run", *ROOT),
}
"""Commands that read what is damaged, or something beside it."""

_NETWORKS = (
    "train",
    "precompute",
    "precompute control",
    "sweep",
    "sweep anew",
    "sweep live",
    "tables",
    "images",
    "list",
)
_STORES = ("precompute", "sweep", "sweep anew", "sweep streamed", "match anew", "tables anew", "images anew", "list")
_UNITS = ("sweep", "export", "plot", "tables", "images", "compare", "list")


@dataclass(frozen=True)
class Kind:
    """Files of one kind, who reads them, and what makes them again."""

    pattern: str
    readers: tuple[str, ...]
    remedy: Callable[[str], tuple[str, ...]] | None = None
    """By the damaged file's path."""


def _force_store(name: str) -> tuple[str, ...]:
    return ("precompute", name.split("/")[3], "--force", *ROOT)


def _force_network(name: str) -> tuple[str, ...]:
    network = Path(name).name.split(".")[0]
    return ("train", network, *DATA, "--width", "4", "--epochs", "1", "--force", *ROOT)


def _unit_again(name: str) -> tuple[str, ...]:
    run = name.split("/")[3]
    options = {"run": (), "other": ("--lr", "0.5"), "matched": ("--loss", "match")}[run]
    return (*SWEEP, "--run", run, *options)


def _define_again(name: str) -> tuple[str, ...]:
    return (*READERS["add"], "--force")


KINDS = {
    "weights": Kind("root/models/*/R*.safetensors", _NETWORKS, _force_network),
    "network record": Kind("root/models/*/R*.json", _NETWORKS, _force_network),
    "added weights": Kind(
        "root/models/*/mine*", ("train mine", "precompute mine", "sweep mine", "list"), _force_network
    ),
    "definition": Kind("root/networks/*/*.json", ("train mine", "add", "sweep mine", "list"), _define_again),
    "factory": Kind("mine.py", ("train mine", "add", "precompute mine", "sweep mine", "list")),
    "manifest": Kind("root/activations/*/R*/manifest.json", _STORES, _force_store),
    "store metadata": Kind("root/activations/*/R*zarr.json", _STORES, _force_store),
    "store chunk": Kind("root/activations/*/R*/[0-9]/*.0", _STORES, _force_store),
    "labels and ids": Kind("root/activations/*/R*/[li][ad]*/0", _STORES, _force_store),
    "run record": Kind("root/runs/*/run/run.json", (*_UNITS, "images anew")),
    "matrices": Kind("root/runs/*/run/units/*.npz", _UNITS, _unit_again),
    "stitches": Kind("root/runs/*/run/units/*.safetensors", _UNITS, _unit_again),
    "matched matrices": Kind("root/runs/*/matched/units/*", ("match", "list"), _unit_again),
    "errors": Kind("root/runs/*/run/errors/*.npz", ("tables", "sweep", "export", "list")),
    "input stitches": Kind("root/runs/*/run/images/units/*", ("images", "images anew", "sweep", "list")),
    "exports": Kind("o/*/*", ("export", "plot", "images")),
    "data": Kind("few.npz", ("train", "precompute", "sweep", "sweep anew", "tables", "images", "export", "list")),
}


def damage_case(stage: Stage, draw: random.Random, number: int) -> Outcome:
    """Damage one file, then run a command."""
    names = list(KINDS)
    title = names[number % len(names)]
    kind = KINDS[title]
    reader = draw.choice(kind.readers)
    arguments = READERS[reader]
    whole = stage.whole("finished", arguments)
    stage.set("finished")
    # the pattern of a chunk is that of no folder
    fitting = sorted(name for name in whole.before if fnmatch.fnmatch(name, kind.pattern) and not name.endswith("/"))
    # locks are empty
    fitting = [name for name in fitting if (stage.place / name).stat().st_size]
    name = draw.choice(fitting)
    fault = f"{title} {Path(name).name}: {_damage(stage.place, name, fitting, draw)}"
    damaged = content_of(stage, name)
    ended = stage.run(*arguments)
    word, wrong = judge(stage, name, damaged, ended, whole)
    if not wrong and word == "refused by name" and kind.remedy is not None:
        if (stage.place / name).is_dir() and "; remove it" in ended.stderr:
            # what it says comes before what makes the file again
            shutil.rmtree(stage.place / name)
        word, wrong = _remedied(stage, kind.remedy(name), arguments, whole)
    if ended.memory > MOST_MEMORY:
        wrong = wrong or f"wrong exit: it took {ended.memory >> 20} MiB"
    return Outcome.of(
        reader.partition(" ")[0].replace("match", "sweep"),
        f"damaged: {fault}",
        word,
        wrong.replace(": ", f": {name}: ", 1),
        arguments,
        ended,
    )


def judge(stage: Stage, name: str, damaged: str | None, ended: Ended, whole: Whole) -> tuple[str, str]:
    """How a command ended with a damaged file, and what was wrong about it: ``kind: detail``, or nothing."""
    if ended.traceback:
        return "traceback", "traceback: "
    if ended.code not in (0, 2):
        return "failed", f"wrong exit: it ended with {ended.code}"
    if ended.code == 2:
        if whole.ended.code == 2 and ended.stderr == whole.ended.stderr:
            return "same result", ""
        if not any(thing in ended.stderr for thing in things(name)):
            return "refused", f"wrong exit: nothing names {' or '.join(things(name))}"
        return "refused by name", ""
    if ended.stdout.startswith("root "):
        missing = _unlisted(ended, whole)
        allowed = 1 + ended.stdout.count("unusable")
        return "listed", f"lost: list lacks {missing}" if len(missing) > allowed + 1 else ""
    found = stage.files()
    wrong = differences(found, whole, ignore=frozenset((name, f"{name}/")))
    if ended.said != whole.ended.said:
        wrong.append(f"it says {ended.said[:4]} instead of {whole.ended.said[:4]}")
    now = content_of(stage, name)
    if now not in (damaged, whole.files.get(name)) and name not in whole.unstable:
        wrong.append("the damaged file was replaced by something else")
    if wrong and "/units/" in name and name.endswith(".npz") and not (stage.place / name).is_file():
        # without this file a unit is not done, and results say so
        return "shown as not run", "; ".join(_believed_missing(stage, name, whole))
    if wrong:
        return "another result", f"believed: {'; '.join(wrong[:4])}"
    return ("recomputed" if now != damaged else "same result"), ""


def _believed_missing(stage: Stage, name: str, whole: Whole) -> list[str]:
    """What an export says of a unit without matrices that is not: it was not run."""
    pair = Path(name).name.split(".task.")[0]
    path = stage.place / "o" / "matrices" / f"{pair}.npz"
    if whole.files.get(f"o/matrices/{pair}.npz") != stage.files().get(f"o/matrices/{pair}.npz"):
        with np.load(path) as exported:
            seed = int(name.removesuffix(".npz").rpartition("seed")[2])
            if exported["status_by_seed"][seed].any() or np.isfinite(exported["accuracy_by_seed"][seed]).any():
                return [f"believed: {path.name} has results of a unit that is not there"]
    return []


def content_of(stage: Stage, name: str) -> str | None:
    """What stands for a file, or for a folder of its name, in the files of the stage."""
    files = stage.files()
    return files.get(name, files.get(f"{name}/"))


def things(name: str) -> list[str]:
    """What a message may call a file: its name, or that of the network, store, run or unit that it belongs to."""
    path = Path(name)
    parts = path.parts
    if name.startswith(("root/models", "root/networks")):
        return [path.name, path.name.split(".")[0]]
    if name.startswith("root/activations"):
        return [name, "/".join(parts[:4])]
    if "run.json" in name:
        return [name, "run 'run'"]
    return [path.name, path.stem] if name.startswith("root/") else [path.name]


def _remedied(stage: Stage, remedy: tuple[str, ...], arguments: tuple[str, ...], whole: Whole) -> tuple[str, str]:
    """What the command ends with once what was damaged was made again."""
    made = stage.run(*remedy)
    if made.code:
        return "refused by name", f"lost: {' '.join(remedy)} ended with {made.code}: {made.stderr[-300:]}"
    ended = stage.run(*arguments)
    if ended.code != whole.ended.code:
        return "refused by name", f"lost: after {' '.join(remedy)} it ended with {ended.code}: {ended.stderr[-300:]}"
    wrong = differences(stage.files(), whole)
    return "refused by name", f"lost: after {' '.join(remedy)}: {'; '.join(wrong[:4])}" if wrong else ""


def _unlisted(ended: Ended, whole: Whole) -> list[str]:
    """Lines of a list that are no longer there, whatever the width of its columns."""
    found = {" ".join(line.split()) for line in ended.stdout.splitlines()}
    lines = [" ".join(line.split()) for line in whole.ended.stdout.splitlines()]
    return [line for line in lines if line not in found and not line.startswith("-")]


def _damage(place: Path, name: str, others: list[str], draw: random.Random) -> str:
    """Damage a file in one of many ways; says how."""
    path = place / name
    content = path.read_bytes()
    ways = ["bit", "bit", "bit", "cut", "cut", "zeros", "gone", "empty", "exchanged", "folder", "longer", "noise"]
    way = draw.choice(ways)
    if way == "exchanged":
        fitting = [other for other in others if (place / other).read_bytes() != content]
        if fitting:
            other = draw.choice(fitting)
            shutil.copy(place / other, path)
            return f"exchanged with {other}"
        way = "bit"
    if way == "bit":
        position, bit = draw.randrange(len(content)), draw.randrange(8)
        changed = bytearray(content)
        changed[position] ^= 1 << bit
        path.write_bytes(changed)
        return f"bit {bit} of byte {position} of {len(content)}"
    if way == "cut":
        size = draw.randrange(len(content))
        path.write_bytes(content[:size])
        return f"cut to {size} of {len(content)} bytes"
    if way == "noise":
        start = draw.randrange(len(content))
        noise = draw.randbytes(min(16, len(content) - start))
        path.write_bytes(content[:start] + noise + content[start + len(noise) :])
        return f"noise in bytes {start} to {start + len(noise)}"
    if way == "longer":
        path.write_bytes(content + draw.randbytes(draw.randint(1, 5000)))
        return "bytes appended"
    path.unlink()
    if way == "zeros":
        path.write_bytes(bytes(len(content)))
    elif way == "empty":
        path.touch()
    elif way == "folder":
        path.mkdir()
    return {"zeros": "all zeros", "empty": "empty", "folder": "a folder of its name"}.get(way, "removed")
