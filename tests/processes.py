"""Commands in processes of their own, which can be killed; forked from one that has imported what they need.

Importing torch takes longer than most of what the commands do.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_PRELOAD = ["fastsitch.cli.main", "fastsitch.api_runs", "fastsitch.study.run_study", "tests.processes"]
PATIENCE = 600
"""Seconds after which something is taken to hang: a busy machine takes its time."""


@dataclass
class Ended:
    """The result of a command: exit code, output and error output."""

    returncode: int
    stdout: str
    stderr: str


class RunningCommand:
    """``fastsitch`` with arguments, under way; ``prepare`` runs before it, in its process."""

    def __init__(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        prepare: Callable[[], None] | None = None,
        **variables: str,
    ) -> None:
        folder = tempfile.mkdtemp(prefix="fastsitch-test-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._files = [Path(folder, name) for name in ("stdout", "stderr")]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FASTSITCH_")}
        self._process = _context().Process(
            target=_run,
            args=([*map(str, arguments)], cwd or Path.cwd(), {**environment, **variables}, self._files, prepare),
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Negative for a signal; None while it runs."""
        return self._process.exitcode

    @property
    def stderr(self) -> str:
        """The error output up to now."""
        return self._files[1].read_text() if self._files[1].exists() else ""

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> int | None:
        """Kill it, if it has not ended; returns the exit code."""
        self._process.kill()
        return self.wait()

    def wait_for(self, condition: Callable[[], bool], pause: float = 0.002) -> bool:
        """Wait until something is so; False if the command ends first."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.stderr
            if self.returncode is not None:
                return condition()
            time.sleep(pause)
        return True

    def wait(self) -> int | None:
        self._process.join(PATIENCE)
        return self.returncode

    def ended(self) -> Ended:
        """Wait for the end."""
        code = self.wait()
        assert code is not None, self.stderr
        return Ended(code, *(path.read_text() for path in self._files))


def _context() -> "multiprocessing.context.ForkServerContext":
    """The process that has imported everything starts with the first command."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    # read when torch is loaded
    os.environ["OMP_NUM_THREADS"] = "1"
    return context


def _run(
    arguments: list[str], cwd: Path, environment: dict[str, str], files: list[Path], prepare: Callable[[], None] | None
) -> None:
    for number, path in enumerate(files, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    # tests that a shell runs in the background are told to ignore it, and so are their children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # what was imported before may have asked for it
    tempfile.tempdir = None
    os.chdir(cwd)
    sys.argv = ["fastsitch", *arguments]
    if prepare is not None:
        prepare()
    from fastsitch.cli.main import main

    main()
