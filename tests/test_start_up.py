"""Help appears at once: heavy libraries are imported only when they are needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastsitch
from fastsitch.cli.main import app
from tests.conftest import cli_environment

HEAVY = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "zarr",
    "zarrs",
    "matplotlib",
    "ray",
    "timm",
    "transformers",
    "datasets",
    "safetensors",
)

COMMANDS = [command.name or "" for command in app.registered_commands]


def modules_after(code: str) -> set[str]:
    """What a fresh Python has imported of HEAVY after running ``code``."""
    script = f"import sys\n{code}\nprint('loaded:', *(name for name in {HEAVY} if name in sys.modules))"
    ended = subprocess.run(
        [sys.executable, "-c", script], env=cli_environment(), capture_output=True, text=True, timeout=60, check=True
    )
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("loaded:")]
    return set(line.split()[1:])


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_no_heavy_library(arguments: list[str]) -> None:
    run = f"from fastsitch.cli import main\nsys.argv = ['fastsitch', *{arguments!r}]\nassert main._run() == 0"
    assert modules_after(run) == set()


def test_there_are_as_many_commands_as_the_work_has_steps() -> None:
    assert COMMANDS[:6] == ["demo", "train", "add", "precompute", "probe", "sweep"]
    assert len(COMMANDS) == len(set(COMMANDS)) == 15


def test_the_package_imports_torch_when_something_of_it_is_used() -> None:
    assert modules_after("import fastsitch\nfastsitch.__version__") == set()
    assert "torch" not in modules_after("import fastsitch\nfastsitch.Progress\nfastsitch.FastsitchError")
    assert "torch" in modules_after("import fastsitch\nfastsitch.Chain")


def test_every_public_name_is_there_and_documented() -> None:
    assert set(fastsitch.__all__) <= set(dir(fastsitch))
    for name in fastsitch.__all__:
        thing = getattr(fastsitch, name)
        assert thing.__doc__, name
        assert thing.__module__.startswith("fastsitch"), name
    with pytest.raises(AttributeError, match="no attribute 'sweeps'"):
        _ = fastsitch.sweeps  # type: ignore[attr-defined]


def test_the_shell_completes_commands_and_choices() -> None:
    def completed(line: str) -> str:
        words = line.split(" ")
        asked = {
            "_FASTSITCH_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
            "_TYPER_COMPLETE_ARGS": line,
        }
        ended = subprocess.run(
            [Path(sys.executable).with_name("fastsitch")],
            env={**cli_environment(), **asked},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return ended.stdout

    assert completed("fastsitch sw").split() == ["sweep"]
    assert "--senders" in completed("fastsitch sweep --send").split()
    assert set(completed("fastsitch sweep --recipe ").split()) >= {"paper", "small", "published-schedule"}


def test_completion_can_be_installed() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "fastsitch.cli.main", "--show-completion"],
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "", "SHELL": "/bin/bash"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "complete" in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("variables", "first", "turns"),
    [
        ({}, "", "2000"),
        ({"GOMP_SPINCOUNT": "7"}, "", "7"),
        ({"OMP_WAIT_POLICY": "active"}, "", "None"),
        ({}, "import torch; ", "None"),
    ],
)
def test_threads_sleep_after_a_while_unless_something_else_is_said(
    variables: dict[str, str], first: str, turns: str
) -> None:
    code = f"{first}import fastsitch, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("GOMP_", "OMP_WAIT"))}
    ended = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **variables}, capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == turns
