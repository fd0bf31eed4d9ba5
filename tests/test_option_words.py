"""Names and choices of options, in Python and on the command line."""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

import fastsitch
from fastsitch import kernels, vocabulary
from fastsitch.cli.main import app
from fastsitch.cli.options import DATA, FILES, MACHINE, MATCHING, TRAINING
from fastsitch.cli.sweep_command import sweep
from fastsitch.errors import ConfigError, argument
from fastsitch.runs.sweep_config import SweepConfig, SweepOptions, sweep_config
from fastsitch.stitching.recipe import STITCH_RECIPES, stitch_recipe
from tests.conftest import Command


@pytest.mark.parametrize(
    ("name", "value", "in_python", "typed"),
    [
        ("batch_size", 0, "batch_size=0", "--batch-size 0"),
        ("recipe", "large", "recipe='large'", "--recipe large"),
        ("seeds", (1, 2), "seeds='1,2'", "--seeds 1,2"),
        ("settings", [], "settings=''", "--settings (none)"),
        ("force", True, "force=True", "--force"),
        ("run", "", "run=''", "--run ''"),
    ],
)
def test_errors_name_an_argument_in_python_and_an_option_on_the_command_line(
    name: str, value: object, in_python: str, typed: str
) -> None:
    error = ConfigError(f"{argument(name, value)}: expected something else, see {argument('receiver_bn')}")
    assert str(error) == f"{in_python}: expected something else, see receiver_bn"
    assert error.as_typed() == f"{typed}: expected something else, see --receiver-bn"
    # one error inside another keeps its arguments
    assert ConfigError(f"R1111: {error.message}").as_typed() == f"R1111: {error.as_typed()}"


def test_the_library_names_arguments_and_the_command_line_options(run_cli: Command) -> None:
    with pytest.raises(ConfigError, match="^batch_size=0: expected a whole number from 1$"):
        sweep_config(dataset="fashion-mini", senders="R1111", receivers="R1111", batch_size=0)
    with pytest.raises(ConfigError, match="^window=0: expected a whole number from 1$"):
        sweep_config(dataset="fashion-mini", senders="R1111", receivers="R1111", window=0)
    with pytest.raises(ConfigError, match="^recipe='large': expected one of paper, small, published-schedule$"):
        stitch_recipe("large")
    line = ("sweep", "--senders", "R1111", "--receivers", "R1111", "--batch-size", "0")
    assert run_cli(*line).stderr == "fastsitch: --batch-size 0: expected a whole number from 1\n"
    assert run_cli(*line, "--recipe", "large").stderr == (
        "fastsitch: --recipe large: expected one of paper, small, published-schedule\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "64"}, "batch_size='64': expected a whole number from 1"),
        ({"batch_size": 64.0}, "batch_size=64.0: expected a whole number from 1"),
        ({"batch_size": True}, "batch_size=True: expected a whole number from 1"),
        ({"epochs": "2"}, "epochs='2': expected a number above 0"),
        ({"epochs": float("nan")}, "epochs=nan: expected a number above 0"),
        ({"lr": "0.1"}, "lr='0.1': expected a number above 0"),
        ({"lr": float("inf")}, "lr=inf: expected a number above 0"),
        ({"seeds": 1.5}, "seeds='1.5': expected whole numbers"),
        ({"seeds": -1}, "seeds=-1: expected a whole number from 0"),
        ({"seeds": []}, "seeds='': expected at least one"),
        ({"window": "all"}, "window='all': expected a whole number from 1"),
    ],
)
def test_a_number_of_another_type_is_refused_by_its_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        sweep_config(dataset="fashion-mini", senders="R1111", receivers="R1111", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": "4"}, "width='4': expected a whole number from 1 to 4096"),
        ({"epochs": 0.5}, "epochs=0.5: expected a whole number from 1"),
        ({"seed": "1"}, "seed='1': expected a whole number from 0"),
        ({"resolution": 32.0}, "resolution=32.0: expected a multiple of 8"),
    ],
)
def test_training_refuses_numbers_of_another_type(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        fastsitch.train("R1111", root=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_are_numbers() -> None:
    options: dict[str, Any] = {"seeds": np.arange(2), "batch_size": np.int64(32), "lr": np.float32(0.5)}
    config = sweep_config(dataset="fashion-mini", senders="R1111", receivers="R1111", **options)
    assert config.seeds == (0, 1)
    assert SweepConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_command_line_has_every_sweep_option_with_its_choices() -> None:
    hints = {name: hint for name, hint in get_type_hints(SweepOptions).items() if name not in ("block", "window")}
    parameters = get_type_hints(sweep)
    renamed = {"compile": "compile_blocks"}
    for name, hint in hints.items():
        offered = parameters[renamed.get(name, name)]
        choices = {choice for part in (hint, *get_args(hint)) for choice in get_args(part) if isinstance(choice, str)}
        shown = {choice for part in (offered, *get_args(offered)) for choice in get_args(part) if type(choice) is str}
        # fp64 is for tests, and lists of settings are typed with commas
        assert shown == (set() if name == "settings" else choices - {"fp64"}), name
    assert set(inspect.signature(sweep).parameters) > {renamed.get(name, name) for name in hints}


def test_kernels_recipes_and_statuses_agree_with_the_vocabulary() -> None:
    # kernels import nothing else of fastsitch
    assert get_args(vocabulary.Kernel) == kernels.KERNELS
    assert set(STITCH_RECIPES) == set(get_args(vocabulary.StitchRecipe))
    assert [int(status) for status in vocabulary.Status] == [0, 1, 2]


@pytest.mark.parametrize("command", [command.name for command in app.registered_commands])
def test_help_shows_its_groups_in_one_order(command: str, run_cli: Command) -> None:
    shown = run_cli(command, "--help").stdout
    groups = [title for title in (DATA, TRAINING, MATCHING, MACHINE, FILES) if f"─ {title} ─" in shown]
    places = [shown.index(f"─ {title} ─") for title in groups]
    assert places == sorted(places)
    assert groups or command in ("doctor",)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["sweep", "--senders", "R1111", "--receivers", "R1111", "--batch-size", "ten"],
            "--batch-size ten: expected a whole number",
        ),
        (["train", "R1111", "--width=4.5"], "--width 4.5: expected a whole number"),
        (["sweep", "--senders", "R1111", "--receivers", "R1111", "--lr", "fast"], "--lr fast: expected a number"),
    ],
)
def test_what_is_no_number_is_named(arguments: list[str], line: str, run_cli: Command) -> None:
    ended = run_cli(*arguments)
    assert ended.returncode == 2
    assert ended.stderr == f"fastsitch: {line}\n"


@pytest.mark.parametrize(
    "call",
    [
        lambda root: fastsitch.sweep("R1111", "R1111", run=7, root=root),
        lambda root: fastsitch.sweep("R1111", "R1111", positions=5, root=root),
        lambda root: fastsitch.add("net", "torchvision:resnet18", mean="a", std=[0.1], root=root),
        lambda root: fastsitch.precompute("R1111", positions=5, root=root),
    ],
)
def test_arguments_of_another_type_are_refused(call: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected"):
        call(tmp_path)
