"""The profile that ``bench --tune`` writes: sweeps on the same machine use it, others ignore it."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastsitch
from fastsitch.data import Dataset
from fastsitch.planning.machine_profile import Profile, Tuning, find_tuning, profile_path, save_tuning, tuned_compile
from tests.conftest import save_npz

CPU = torch.device("cpu")
TUNING = Tuning(width=4, batch_size=16, precision="fp32", group_size=7, compile="off", rates={"7": 1.0})


@pytest.fixture(scope="module")
def root_and_dataset(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A root with R1111 trained on 160 images at width 4, and the name of its data set."""
    folder = tmp_path_factory.mktemp("profile")
    save_npz(folder / "small.npz", fashion.train, fashion.test, 160, 80)
    dataset = f"npz:{folder / 'small.npz'}"
    fastsitch.train("R1111", dataset=dataset, width=4, epochs=1, root=folder)
    return folder, dataset


def group_size(root_and_dataset: tuple[Path, str], run: str, **options: object) -> int:
    """What a new sweep settles on."""
    root, _ = root_and_dataset
    given = {"recipe": "small", "epochs": 1, "batch_size": 16, "precision": "fp32", **options}
    return fastsitch.sweep(["R1111"], ["R1111"], root=root, run=run, **given).resolved.group_size


def find(root: Path) -> Tuning | None:
    return find_tuning(root, CPU, width=4, batch_size=16, precision="fp32")


@pytest.mark.slow
def test_a_sweep_uses_what_was_measured_here(
    root_and_dataset: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastsitch")
    assert group_size(root_and_dataset, "without") == 25
    save_tuning(root_and_dataset[0], CPU, TUNING)
    assert group_size(root_and_dataset, "tuned") == 7
    assert "groups of up to 7 cells: memory allows 25, the profile's best is 7" in caplog.text
    estimate = fastsitch.estimate(
        ["R1111"], ["R1111"], root=root_and_dataset[0], recipe="small", batch_size=16, precision="fp32"
    )
    assert estimate.group_size == 7
    # what was asked for by name stays, and memory has the last word
    assert group_size(root_and_dataset, "named", group_size=3) == 3
    save_tuning(root_and_dataset[0], CPU, replace(TUNING, group_size=1000))
    assert group_size(root_and_dataset, "large") == 25
    # other shapes were not measured
    assert group_size(root_and_dataset, "other-batch", batch_size=32) == 25
    assert "has nothing for width 4, batch 32, fp32; measure with fastsitch bench --tune" in caplog.text


@pytest.mark.parametrize("what", ["machine", "device", "threads", "torch", "fastsitch"])
def test_a_foreign_profile_is_ignored_and_said_so(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastsitch")
    path = save_tuning(tmp_path, CPU, TUNING)
    assert find(tmp_path) == TUNING
    content = json.loads(path.read_text())
    section = content if what in content else content["versions"]
    section[what] = 99 if what == "threads" else "another"
    path.write_text(json.dumps(content))
    assert find(tmp_path) is None
    assert f"was measured elsewhere ({what} {section[what]}, here " in caplog.text
    # measuring here replaces it
    save_tuning(tmp_path, CPU, TUNING)
    assert find(tmp_path) == TUNING


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": 1, "tunings": [{"width": 4}]}'])
def test_a_file_that_is_no_profile_is_ignored_and_said_so(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastsitch")
    profile_path(tmp_path).write_text(text)
    assert find(tmp_path) is None
    assert "profile.json is no profile" in caplog.text
    save_tuning(tmp_path, CPU, TUNING)
    assert find(tmp_path) == TUNING


@pytest.mark.parametrize(
    ("what", "value"),
    [("group_size", value) for value in (0, -3, "6", 2.5, None)]
    + [("compile", "maybe"), ("compile", None), ("versions", []), ("versions", None)],
)
def test_impossible_values_are_ignored_and_said_so(
    what: str, value: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastsitch")
    path = save_tuning(tmp_path, CPU, TUNING)
    content = json.loads(path.read_text())
    (content if what == "versions" else content["tunings"][0])[what] = value
    path.write_text(json.dumps(content))
    assert find(tmp_path) is None
    assert f"profile.json is no profile ({what} {value!r}: expected" in caplog.text


def test_tunings_of_several_shapes_live_side_by_side(tmp_path: Path) -> None:
    other = replace(TUNING, width=64, group_size=9)
    save_tuning(tmp_path, CPU, TUNING)
    save_tuning(tmp_path, CPU, other)
    save_tuning(tmp_path, CPU, replace(TUNING, group_size=8))
    profile = Profile.read(tmp_path)
    assert profile is not None
    assert [(tuning.width, tuning.group_size) for tuning in profile.tunings] == [(64, 9), (4, 8)]


def test_compile_follows_the_profile_only_where_auto_was_asked_for() -> None:
    tuned = replace(TUNING, compile="on")
    assert [tuned_compile(tuned, asked) for asked in ("auto", "on", "off")] == ["on", "on", "off"]
    assert tuned_compile(None, "auto") == "auto"
