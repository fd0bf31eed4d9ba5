"""Commands killed at random moments, and what the same command then ends with."""

import random
import re
from dataclasses import dataclass
from functools import partial

from bench.fault_cases.hooks import Hook, in_turn, tiny_study
from bench.fault_cases.stage import (
    MOST_MEMORY,
    PRECOMPUTE,
    ROOT,
    SWEEP,
    TRAIN,
    Files,
    Outcome,
    Stage,
    Whole,
    differences,
)


@dataclass(frozen=True)
class Work:
    """A command that is killed, and what had been done before it."""

    command: str
    before: str
    arguments: tuple[str, ...]
    hook: Hook | None = None
    again: bool = False
    """Whether it does finished work again, as it was asked to."""


STUDY = ("paper", "--scale", "small", "--settings", "T2T,R2R", "--epochs", "0.5", *ROOT, "--out", "o")
WORKS = (
    Work("train", "empty", TRAIN),
    Work("train", "networks", (*TRAIN, "--epochs", "2", "--force"), again=True),
    Work("precompute", "networks", (*PRECOMPUTE, "R1111-random@0")),
    Work("precompute", "stores", (*PRECOMPUTE, "--dtype", "fp32", "--force"), again=True),
    Work("sweep", "networks", (*SWEEP, "--run", "run")),
    Work("sweep", "stores", (*SWEEP, "--run", "start", "--init", "matched", "--settings", "T2T,R2T")),
    Work("tables", "run", ("tables", "run", "--out", "o", *ROOT)),
    Work("images", "run", ("images", "run", "--count", "2", "--out", "o", *ROOT)),
    Work("study", "empty", STUDY, tiny_study),
)

_FINISHED = re.compile(r".*/(units|errors)/[^/]*\.npz|.*/models/.*\.json|.*/manifest\.json|.*/run\.json")
"""Files whose presence says that a piece of work is done: it must not be done again."""
_SCRATCH = re.compile(r".*\.(partial|old)(/.*)?")
"""What is being written, and known not to be whole."""


def kill_case(stage: Stage, draw: random.Random, number: int) -> Outcome:
    """Kill a command once, or several times in a row, then let it end."""
    work = WORKS[number % len(WORKS)]
    whole = stage.whole(work.before, work.arguments, work.hook)
    stage.set(work.before)
    faults, wrong = [], []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        fault, ended = _killed_once(stage, draw, work, whole)
        faults.append(fault)
        if not ended:
            break
        wrong += [f"believed: {name} is half-written" for name in half_written(stage.files(), whole)]
        listed = stage.run("list", *ROOT) if (stage.place / "root").is_dir() and draw.random() < 0.5 else None
        if listed is not None and (listed.code or listed.traceback):
            wrong.append(f"wrong exit: list after the kill ended with {listed.code}: {listed.stderr[-300:]}")
    killed, identities = stage.files(), stage.identities()
    finished = [] if work.again else [name for name in killed if _FINISHED.fullmatch(name) and name in whole.files]
    kept = [name for name in finished if killed[name] == whole.files[name] and name not in whole.before]
    ended = stage.run(*work.arguments, hook=work.hook)
    if ended.traceback:
        wrong.insert(0, "traceback")
    elif ended.code != whole.ended.code:
        wrong.insert(0, f"wrong exit: the same command then ended with {ended.code}")
    else:
        wrong += [f"lost: {line}" for line in differences(stage.files(), whole)]
        after = stage.identities()
        wrong += [f"lost: {name} was made again" for name in kept if after[name] != identities[name]]
        if ended.said != whole.ended.said:
            wrong.append(f"lost: it says {ended.said[:3]} instead of {whole.ended.said[:3]}")
    if ended.memory > MOST_MEMORY:
        wrong.append(f"wrong exit: it took {ended.memory >> 20} MiB")
    return Outcome.of(
        work.command,
        "; ".join(faults),
        "same result" if not wrong else "something else",
        "; ".join(wrong[:6]),
        work.arguments,
        ended,
    )


def _killed_once(stage: Stage, draw: random.Random, work: Work, whole: Whole) -> tuple[str, bool]:
    """How the command was killed, and whether it was: it may have been faster."""
    if draw.random() < 0.7:
        torn = draw.random() < 0.5
        flushes = [number for number, line in enumerate(whole.operations, 1) if line.startswith("fsync ")]
        number = draw.choice(flushes) if torn else draw.randint(1, len(whole.operations))
        dying = stage.dying(number, torn)
        ended = stage.run(*work.arguments, hook=partial(in_turn, (dying, *([work.hook] if work.hook else []))))
        fault = f"killed before operation {number} ({stage.last_operation()}{', torn' if torn else ''})"
    else:
        seconds = draw.random() * whole.ended.seconds
        ended = stage.run(*work.arguments, hook=work.hook, kill_after=seconds)
        fault = f"killed after {seconds:.2f} of {whole.ended.seconds:.2f} s"
    return (fault, True) if ended.killed else (f"not {fault}: it was faster", False)


def half_written(found: Files, whole: Whole) -> list[str]:
    """Files under their final names that are neither as they were nor as they will be."""
    return [
        name
        for name, digest in found.items()
        if not _SCRATCH.fullmatch(name)
        and name in whole.files
        and name not in whole.unstable
        and digest not in (whole.files[name], whole.before.get(name))
    ]
