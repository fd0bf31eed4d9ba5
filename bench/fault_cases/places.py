"""Full disks and places that cannot be written; needs the right to mount file systems."""

import random
import re
from dataclasses import replace

from bench.fault_cases.damage import READERS
from bench.fault_cases.kills import WORKS, Work
from bench.fault_cases.stage import PRECOMPUTE, ROOT, SWEEP, TRAIN, Outcome, Stage, differences

FULL = tuple(
    replace(work, arguments=(*work.arguments, "--source", "resident")) if work.command == "sweep" else work
    for work in (*WORKS, Work("sweep", "stores", (*SWEEP, "--run", "run")))
    if work.command != "study"
)
"""Commands that run out of disk. Where a sweep may choose, it needs no disk for stores that have no room."""

WRITERS: dict[str, tuple[str, ...]] = {
    **READERS,
    "train anew": ("train", "R1122", *TRAIN[3:]),
    "precompute anew": ("precompute", "R1111-random@1", *ROOT),
    "precompute fp32": (*PRECOMPUTE, "--dtype", "fp32", "--force"),
    "add anew": ("add", "yours", "--from", "mine.py:small", "--dataset", "npz:few.npz", *ROOT),
    "dry run": (*SWEEP, "--run", "dry", "--dry-run"),
    "doctor": ("doctor", *ROOT),
}
MEASURED = ("dry run", "doctor")
"""Commands that say what they measure, such as how much disk is free."""
PLACES = (
    "root",
    "root/models",
    "root/models/*",
    "root/networks",
    "root/activations",
    "root/activations/*",
    "root/activations/*/R1111",
    "root/runs",
    "root/runs/*",
    "root/runs/*/run",
    "root/runs/*/run/units",
    "root/runs/*/run/images",
    "root/runs/*/run/errors",
    "o",
)


def disk_case(stage: Stage, draw: random.Random, number: int) -> Outcome:
    """A command on a disk that becomes full; then with room."""
    work = FULL[number % len(FULL)]
    whole = stage.whole(work.before, work.arguments, work.hook)
    with stage.disk(work.before, 1 << 30):
        start = stage.used()
        stage.run(*work.arguments, hook=work.hook)
        needed = stage.used() - start
    room = 4096 * draw.randrange(max(1, needed // 4096))
    wrong = ""
    with stage.disk(work.before, room):
        before = stage.files()
        ended = stage.run(*work.arguments, hook=work.hook)
        after = stage.files()
    word = "said so"
    last = ended.stderr.splitlines()[-1] if ended.stderr else ""
    if ended.traceback:
        word, wrong = "traceback", "traceback: "
    elif ended.code == 0:
        word = "had room"
    elif ended.code not in (1, 2):
        word, wrong = "failed", f"wrong exit: it ended with {ended.code}"
    elif not re.search(r"(?i)no space|disk is full|of disk, .* are free", last):
        wrong = "wrong exit: its last line does not say that the disk is full"
    elif "root" not in last and str(stage.place) not in last and not re.search(r"\bo/", last):
        wrong = "wrong exit: its last line names no place"
    # what is lost weighs more than what is not said
    if left := [name for name in after if name not in before and name not in whole.files]:
        wrong = f"lost: it left {left[:3]}"
    again = stage.run(*work.arguments, hook=work.hook)
    if again.code != whole.ended.code:
        wrong = f"lost: with room it ended with {again.code}: {again.stderr[-300:]}"
    elif lines := differences(stage.files(), whole):
        wrong = f"lost: with room: {'; '.join(lines[:4])}"
    return Outcome.of(
        work.command,
        f"full disk: room for {room} of {needed} bytes",
        word,
        wrong,
        work.arguments,
        ended,
    )


def place_case(stage: Stage, draw: random.Random, number: int) -> Outcome:
    """A command while some folder cannot be written."""
    title = list(WRITERS)[number % len(WRITERS)]
    arguments = WRITERS[title]
    whole = stage.whole("finished", arguments)
    stage.set("finished")
    # a folder that is mounted cannot be renamed
    pattern = draw.choice([place for place in PLACES if title != "precompute fp32" or not place.endswith("R1111")])
    folder = draw.choice(sorted(path for path in stage.place.glob(pattern) if path.is_dir()))
    place = folder.relative_to(stage.place).as_posix()
    writes = [name for name, digest in whole.files.items() if whole.before.get(name) != digest]
    writes += [name for name in whole.before if name not in whole.files]
    if "--out" in arguments:
        # results are written each time
        writes.append(arguments[arguments.index("--out") + 1])
    needed = any(f"{name}/".startswith(f"{place}/") for name in writes)
    with stage.read_only(folder):
        ended = stage.run(*arguments)
        found = stage.files()
    word, wrong = ("refused by name" if needed else "nothing to write"), ""
    if ended.traceback:
        word, wrong = "traceback", "traceback: "
    elif not needed:
        if ended.code != whole.ended.code:
            wrong = f"wrong exit: it has nothing to write there, but ended with {ended.code}"
        elif lines := differences(found, whole):
            wrong = f"lost: {'; '.join(lines[:4])}"
        elif ended.said != whole.ended.said and title not in MEASURED:
            wrong = f"lost: it says {ended.said[:3]} instead of {whole.ended.said[:3]}"
    elif ended.code != 2:
        wrong = f"wrong exit: it ended with {ended.code}"
    elif place not in ended.stderr:
        wrong = f"wrong exit: nothing names {place}"
    return Outcome.of(
        title.partition(" ")[0].replace("match", "sweep"),
        f"read-only: {place}",
        word,
        wrong,
        arguments,
        ended,
    )
