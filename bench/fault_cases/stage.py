"""Where the cases of the fault bench happen: states of a root that are copied there, commands, what they end with."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.fault_cases.hooks import Hook, die_at, in_turn
from fastsitch.data import load_dataset
from tests.conftest import save_npz
from tests.processes import RunningCommand

PATIENCE = 120.0
"""Seconds after which a command is taken to hang."""
MOST_MEMORY = 2 << 30
"""Bytes of memory that no command on this data should need."""

LEARN = ("--recipe", "small", "--batch-size", "32", "--epochs", "0.2", "--precision", "fp32")
"""Options of stitches that take a moment."""
DATA = ("--dataset", "npz:few.npz")
ROOT = ("--root", "root")
TRAIN = ("train", "R1111", "R1112", *DATA, "--width", "4", "--epochs", "1", *ROOT)
ADD = ("add", "mine", "--from", "mine.py:small", *DATA, *ROOT)
PRECOMPUTE = ("precompute", "R1111", "R1112", *ROOT)
SWEEP = ("sweep", "--senders", "R1111", "--receivers", "R1111,R1112", "--seeds", "0,1", *LEARN, *ROOT)
FINISHED = (
    TRAIN,
    ADD,
    ("train", "mine", *DATA, "--epochs", "1", *ROOT),
    (*SWEEP, "--run", "run"),
    (*SWEEP, "--run", "other", "--lr", "0.5"),
    (*SWEEP, "--run", "matched", "--loss", "match"),
    ("precompute", "mine", *ROOT),
    ("tables", "run", *ROOT),
    ("images", "run", "--count", "2", "--out", "o/images", *ROOT),
    ("export", "run", "--out", "o/matrices", *ROOT),
    ("plot", "run", "--out", "o/plots", *ROOT),
)
"""The commands whose results are damaged."""
STATES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "empty": (),
    "networks": (TRAIN,),
    "stores": (TRAIN, PRECOMPUTE),
    "run": (TRAIN, (*SWEEP, "--run", "run")),
    "finished": FINISHED,
}
"""What has been done before a case begins."""

Files = dict[str, str]
"""sha256 of every file, by its path below the stage; folders have none and end in a slash."""


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it took."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    memory: int
    """Bytes, at its peak."""

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.stderr

    @property
    def last_lines(self) -> list[str]:
        return [line[:300] for line in self.stderr.splitlines()[-3:]]

    @property
    def said(self) -> list[str]:
        """What it says of its results, without times."""
        lines = [
            line for line in self.stdout.splitlines() if "; results in " not in line and "; matrices and" not in line
        ]
        return [re.sub(r"^[0-9:.]+ (s|min|h); ", "", line) for line in lines]


@dataclass(frozen=True)
class Whole:
    """What a command ends with where nothing goes wrong."""

    ended: Ended
    before: Files
    files: Files
    operations: tuple[str, ...]
    """File operations that can be counted, in their order."""
    unstable: frozenset[str]
    """Files that differ from run to run, such as those with the time in them."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case: ``ended`` in a word or two, and what was wrong, if anything."""

    command: str
    fault: str
    ended: str
    failure: str = ""
    """lost, believed, traceback, or wrong exit; empty where all was as it should be."""
    detail: str = ""
    arguments: tuple[str, ...] = ()
    code: int | None = None
    stderr: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, command: str, fault: str, word: str, wrong: str, arguments: tuple[str, ...], ended: "Ended"
    ) -> "Outcome":
        """That of a case in which ``wrong`` is ``FAILURE: detail``, or empty; the command ended as ``ended``."""
        failure, _, detail = wrong.partition(": ")
        stderr = ended.last_lines if wrong else []
        return cls(command, fault, word, failure, detail, arguments, ended.code, stderr)


class Stage:
    """A folder whose path is always the same, because data sets are recorded with theirs."""

    def __init__(self, out: Path) -> None:
        self.place = (out / "stage").resolve()
        self._kept = (out / "states").resolve()
        self._log = (out / "operations.log").resolve()
        self._known: dict[tuple[str, tuple[str, ...]], Whole] = {}
        self._mounted: list[Path] = []
        self._digests: dict[str, Files] = {}

    def prepare(self) -> None:
        """Make all states, each after the same commands from nothing."""
        shutil.rmtree(self._kept, ignore_errors=True)
        fashion = load_dataset("fashion-mini", Path("unused"))
        for name, commands in STATES.items():
            self.clear()
            save_npz(self.place / "few.npz", fashion.train, fashion.test, 160, 64)
            shutil.copy(Path(__file__).parents[2] / "tests" / "network_factories.py", self.place / "mine.py")
            for arguments in commands:
                ended = self.run(*arguments)
                assert ended.code == 0, (arguments, ended.stderr)
            shutil.copytree(self.place, self._kept / name, symlinks=True)

    def clear(self) -> None:
        for folder in reversed(self._mounted):
            subprocess.run(["umount", "--lazy", folder], check=True)
        self._mounted.clear()
        if self.place.exists():
            for path in self.place.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.place.mkdir(parents=True, exist_ok=True)

    def set(self, state: str) -> None:
        """Make the stage what it is in a state."""
        self.clear()
        self._fill(state)

    def restore(self, state: str) -> None:
        """As :meth:`set`, where the stage is not so already."""
        if state not in self._digests:
            self.set(state)
            self._digests[state] = self.files()
        if self._mounted or self.files() != self._digests[state]:
            self.set(state)

    def _fill(self, state: str) -> None:
        shutil.copytree(self._kept / state, self.place, symlinks=True, dirs_exist_ok=True)

    def run(
        self,
        *arguments: str,
        hook: Hook | None = None,
        kill_after: float | None = None,
        patience: float = PATIENCE,
        **variables: str,
    ) -> Ended:
        """Run a command there to its end, or kill it after some seconds. One that hangs ends with code 124."""
        command = RunningCommand(*arguments, cwd=self.place, prepare=hook, **variables)
        start, memory = time.monotonic(), 0
        while command.returncode is None:
            seconds = time.monotonic() - start
            memory = max(memory, _peak_memory(command.pid))
            if kill_after is not None and seconds >= kill_after:
                command.kill()
            elif seconds >= patience:
                command.kill()
                return Ended(124, "", f"still running after {patience:.0f} s\n{command.stderr}", seconds, memory)
            time.sleep(0.003)
        try:
            ended = command.ended()
        except FileNotFoundError:
            # killed before it had an output
            return Ended(command.returncode, "", "", time.monotonic() - start, memory)
        return Ended(ended.returncode, ended.stdout, ended.stderr, time.monotonic() - start, memory)

    def files(self) -> Files:
        """All files and folders, by what they contain."""
        found = {}
        for path in sorted(self.place.rglob("*")):
            name = path.relative_to(self.place).as_posix()
            if path.is_symlink():
                found[name] = f"link to {path.readlink()}"
            elif path.is_dir():
                found[name + "/"] = ""
            else:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def identities(self) -> dict[str, tuple[int, int]]:
        """Inode and time of every file: those of a file that was written again differ."""
        paths = {path.relative_to(self.place).as_posix(): path.lstat() for path in self.place.rglob("*")}
        return {name: (status.st_ino, status.st_mtime_ns) for name, status in paths.items()}

    def whole(self, state: str, arguments: tuple[str, ...], hook: Hook | None = None) -> Whole:
        """What a command ends with from a state where nothing goes wrong; measured twice, once."""
        key = (state, arguments)
        if key not in self._known:
            self.set(state)
            before = self.files()
            counting = partial(die_at, 0, False, self.place, self._log)
            ended = self.run(*arguments, hook=partial(in_turn, (counting, *([hook] if hook else []))))
            assert ended.code in (0, 1, 2), (arguments, ended)
            files, operations = self.files(), tuple(self._log.read_text(errors="replace").splitlines())
            self.set(state)
            again = self.run(*arguments, hook=hook)
            assert again.code == ended.code, (arguments, again)
            second = self.files()
            assert second.keys() == files.keys(), sorted(second.keys() ^ files.keys())
            unstable = frozenset(name for name in files if files[name] != second[name])
            self._known[key] = Whole(again, before, files, operations, unstable)
        return self._known[key]

    def last_operation(self) -> str:
        """The file operation before which the last command was killed."""
        lines = self._log.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "none"

    def dying(self, number: int, torn: bool) -> Hook:
        """Kills a command at its ``number``-th file operation."""
        return partial(die_at, number, torn, self.place, self._log)

    @contextmanager
    def disk(self, state: str, room: int) -> Iterator[None]:
        """The stage in a state on a disk of its own with so many bytes left; with room for all after the block."""
        self.clear()
        self._mount("-t", "tmpfs", "-o", "size=1g", "faults", self.place)
        self._fill(state)
        usage = shutil.disk_usage(self.place).used
        subprocess.run(["mount", "-o", f"remount,size={usage + room}", self.place], check=True)
        yield
        subprocess.run(["mount", "-o", "remount,size=1g", self.place], check=True)

    def used(self) -> int:
        """Bytes that the content of the stage takes on a disk of its own."""
        return shutil.disk_usage(self.place).used

    @contextmanager
    def read_only(self, folder: Path) -> Iterator[None]:
        """Nothing in a folder of the stage can be written until the block ends."""
        self._mount("--bind", folder, folder)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
        self._mounted.remove(folder)
        subprocess.run(["umount", "--lazy", folder], check=True)

    def _mount(self, *arguments: str | Path) -> None:
        place = arguments[-1]
        assert isinstance(place, Path)
        subprocess.run(["mount", *arguments], check=True)
        self._mounted.append(place)


def differences(found: Files, whole: Whole, *, ignore: frozenset[str] = frozenset()) -> list[str]:
    """What is missing, left over or has another content; files that are never the same are only there or not."""
    same = whole.unstable | ignore
    lines = [f"missing: {name}" for name in whole.files if name not in found and name not in ignore]
    lines += [f"left over: {name}" for name in found if name not in whole.files and name not in ignore]
    return lines + [
        f"differs: {name}"
        for name, digest in whole.files.items()
        if name in found and found[name] != digest and name not in same
    ]


def _peak_memory(process: int) -> int:
    with suppress(OSError, StopIteration, ValueError):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return 0


def to_json(outcome: Outcome, kind: str, number: int, seconds: float) -> str:
    """One line of the file of results."""
    return json.dumps({"kind": kind, "number": number, "seconds": round(seconds, 2), **outcome.__dict__})
