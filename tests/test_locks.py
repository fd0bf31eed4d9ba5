"""Locks keep two processes apart, and end with the process that holds them."""

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastsitch.errors import BusyError
from fastsitch.files import exclusive

HOLD = """
import sys
from pathlib import Path
from fastsitch.files import exclusive
with exclusive(Path(sys.argv[1]), "the store of R1111"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds ``R1111.lock`` until its input ends."""
    line = [sys.executable, "-c", HOLD, str(tmp_path / "R1111.lock")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


@pytest.mark.kill
def test_a_killed_process_holds_nothing(holder: "subprocess.Popen[str]", tmp_path: Path) -> None:
    path = tmp_path / "R1111.lock"
    with pytest.raises(BusyError) as caught, exclusive(path, "the store of R1111"):
        pass
    assert str(caught.value) == f"another process is at work on the store of R1111 (lock {path}): wait until it ends"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with exclusive(path, "the store of R1111"):
        pass
    # nobody who waits for a lock may find another file in its place
    assert path.is_file()


def test_whoever_waits_says_so_and_goes_on(
    holder: "subprocess.Popen[str]", tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entered = threading.Event()

    def wait() -> None:
        with exclusive(tmp_path / "R1111.lock", "the store of R1111", wait=True):
            entered.set()

    with caplog.at_level(logging.INFO, logger="fastsitch"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not entered.wait(0.5)
        holder.communicate("")
        waiting.join(timeout=30)
    assert entered.is_set()
    assert caplog.messages == ["another process is at work on the store of R1111: waiting until it ends"]


def test_a_lock_file_that_is_renamed_stays_locked(tmp_path: Path) -> None:
    new, named = tmp_path / "new", tmp_path / "named"
    with exclusive(new, "a cluster"):
        new.rename(named)
        with pytest.raises(BusyError), exclusive(named, "a cluster"):
            pass
    with exclusive(named, "a cluster"):
        named.unlink()
    assert list(tmp_path.iterdir()) == []
