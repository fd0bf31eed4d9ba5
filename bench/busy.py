"""How much longer fastsitch's work takes beside other busy programs: one line per kind of work.

    python bench/busy.py [--loops 0,1,2] [--repeats 3] [--work train,sweep,match,bench,demo] [--variable NAME=VALUE ...]

Every measurement is a process of its own, which times the work alone, not the imports; the loops run in sessions of
their own, which is how programs in other windows weigh. Quiet and busy runs alternate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREPARE = """
import fastsitch
fastsitch.train("R1111", "R1112", dataset="fashion-mini:2048", width=16, epochs=1, root={root!r})
"""

WORK = {
    "train": """
fastsitch.train("R1111", dataset="fashion-mini:2048", width=16, epochs={number}, root={root!r} + "/other", force=True)
""",
    "sweep": """
fastsitch.sweep("R1111", "R1112", root={root!r}, run="sweep{number}", epochs=0.5)
""",
    "match": """
fastsitch.sweep("R1111", "R1112", root={root!r}, run="match{number}", loss="match")
""",
    "bench": """
fastsitch.bench(root={root!r}, width=16, group_sizes=(15,), repeats=1)
""",
    # on a tenth of its images
    "demo": """
import fastsitch.demo
fastsitch.demo.DEFAULT_DATASET = "fashion-mini:1024"
fastsitch.demo.run_demo({root!r} + "/pictures{number}", root={root!r} + "/demo{number}")
""",
}

TIMED = """
import sys, time
import fastsitch
fastsitch.load_dataset("fashion-mini:2048")
start = time.monotonic()
{work}
print(time.monotonic() - start)
"""


@contextmanager
def loops(count: int) -> Iterator[None]:
    """So many busy loops beside what is measured."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def run(code: str, environment: dict[str, str]) -> str:
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", default="0,1,2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", default=",".join(WORK))
    parser.add_argument("--variable", action="append", default=[])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts = [int(count) for count in options.loops.split(",")]
    environment = {**os.environ, **dict(text.split("=", 1) for text in options.variable)}
    seconds: dict[str, dict[int, list[float]]] = {}
    with tempfile.TemporaryDirectory() as root:
        run(PREPARE.format(root=root), environment)
        number = 0
        for name in options.work.split(","):
            found = seconds[name] = {count: [] for count in counts}
            for _ in range(options.repeats):
                for count in counts:
                    number += 1
                    work = WORK[name].format(root=root, number=1 if name == "train" else number)
                    with loops(count):
                        found[count].append(float(run(TIMED.format(work=work), environment)))
            medians = {count: statistics.median(times) for count, times in found.items()}
            line = ", ".join(
                f"beside {count}: {medians[count]:.2f} s ({min(times):.2f} to {max(times):.2f})"
                + (f", {medians[count] / medians[0]:.2f}x" if 0 in medians else "")
                for count, times in found.items()
            )
            print(f"{name}: {line}; n = {options.repeats}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"variables": options.variable, "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
