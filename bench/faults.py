"""Faults at random: commands killed, files damaged, disks full, places that cannot be written, wrong command lines.

    python bench/faults.py [--kills 300] [--damage 300] [--lines 500] [--seed 0] [--out FOLDER]

A case follows from the seed, its kind and its number. Outcomes are appended to FOLDER/SEED.jsonl, so that a bench that
was interrupted goes on where it stopped; it ends with a table, and with 1 where anything was lost, half-written files
were believed, a traceback was shown, or an exit was not the one that it should be. Full disks and places that cannot be
written need the right to mount file systems (root on Linux).
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# cases and processes are modules of this folder and of the tests
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.fault_cases.damage import damage_case
from bench.fault_cases.inputs import input_case
from bench.fault_cases.kills import kill_case
from bench.fault_cases.lines import line_case, require_all_options_known, require_lines_that_work
from bench.fault_cases.places import disk_case, place_case
from bench.fault_cases.stage import Outcome, Stage, to_json

Case = Callable[[Stage, random.Random, int], Outcome]

FAILURES = ("lost", "believed", "traceback", "wrong exit")
TITLES = {
    "kills": "killed",
    "damage": "damaged file",
    "disks": "full disk",
    "places": "read-only place",
    "lines": "wrong command line",
    "inputs": "wrong file",
}


def case_of(kind: str, number: int) -> tuple[str, Case, int]:
    """What the case of a number is: its row in the table, its function and its number there."""
    if kind == "kills":
        return "kills", kill_case, number
    if kind == "damage":
        # of five cases three damage a file, one fills a disk, one forbids to write
        group, place = divmod(number, 5)
        if place < 3:
            return "damage", damage_case, 3 * group + place
        return ("disks", disk_case, group) if place == 3 else ("places", place_case, group)
    group, place = divmod(number, 4)
    return ("lines", line_case, 3 * group + place) if place < 3 else ("inputs", input_case, group)


def done_cases(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Outcomes of earlier attempts; the last line may have been cut off."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            case = json.loads(line)
        except ValueError:
            continue
        found[case["kind"], case["number"]] = case
    return found


def table(cases: Iterable[dict[str, Any]]) -> str:
    """Markdown: a row for each kind of fault and command."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in cases:
        row, _, _ = case_of(case["kind"], case["number"])
        rows.setdefault((row, case["command"]), []).append(case)
    lines = ["| fault | command | cases | how it ended | lost | believed | tracebacks | wrong exits |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    sums: Counter[str] = Counter()
    order = list(TITLES)
    for (row, command), found in sorted(rows.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        ended = Counter(case["ended"] for case in found if not case["failure"])
        text = ", ".join(f"{count} {word}" for word, count in ended.most_common())
        failed = Counter(case["failure"] for case in found)
        sums.update(failed)
        sums["cases"] += len(found)
        counts = " | ".join(str(failed[name]) for name in FAILURES)
        lines.append(f"| {TITLES[row]} | {command} | {len(found)} | {text} | {counts} |")
    counts = " | ".join(str(sums[name]) for name in FAILURES)
    return "\n".join([*lines, f"| all | | {sums['cases']} | | {counts} |"])


def described(case: dict[str, Any]) -> str:
    """A case that failed, with what it takes to see it again."""
    lines = [f"{case['kind']} {case['number']}: {case['failure']}: {case['detail']}", f"  {case['fault']}"]
    lines.append(f"  fastsitch {' '.join(case['arguments'])}: exit {case['code']}")
    return "\n".join([*lines, *(f"  | {line}" for line in case["stderr"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts = {"kills": 300, "damage": 300, "lines": 500}
    for name, count in counts.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("faults"))
    parser.add_argument("--only", help="one case, such as kills:17, whose outcome is shown and not kept")
    options = parser.parse_args()
    require_all_options_known()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / f"{options.seed}.jsonl"
    done = done_cases(results)
    wanted = [(kind, number) for kind in counts for number in range(getattr(options, kind))]
    if options.only:
        kind, _, number = options.only.partition(":")
        wanted, done = [(kind, int(number))], {}
    stage = Stage(options.out)
    if any(case not in done for case in wanted):
        stage.prepare()
        require_lines_that_work(stage)
    for kind, number in wanted:
        if (kind, number) in done:
            continue
        _, function, place = case_of(kind, number)
        start = time.monotonic()
        outcome = function(stage, random.Random(f"{options.seed} {kind} {number}"), place)
        line = to_json(outcome, kind, number, time.monotonic() - start)
        done[kind, number] = json.loads(line)
        if outcome.failure or options.only:
            print(described(done[kind, number]), flush=True)
        if not options.only:
            with results.open("a") as file:
                file.write(line + "\n")
    stage.clear()
    cases = [done[case] for case in wanted]
    failed = [case for case in cases if case["failure"]]
    print("\n".join(["", table(cases), "", *map(described, failed)]))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
