"""The whole study: its cells, its runs, and that a killed study continues where it stopped."""

import signal
import time
from pathlib import Path

import pytest

import fastsitch
from fastsitch.errors import ConfigError, FastsitchError
from fastsitch.study import study_config
from fastsitch.study.study_config import SCALES, STAGES, STUDIES, make_study_config
from tests.processes import RunningCommand


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "per_setting"),
    [
        ({}, 12_544),
        ({"networks": "R1111,R2222"}, 196),
        ({"networks": "R2222,R1111,R2222"}, 196),
        ({"networks": "R1112"}, 36),
        ({"scale": "small"}, (5 + 6 + 7) ** 2),
        ({"scale": "medium"}, (5 + 7 + 9) ** 2),
        ({"scale": "medium", "networks": "R1121,R2221"}, (6 + 8) ** 2),
        ({"study": "r18-r34"}, 2 * 9 * 17),
        ({"seeds": "0,1,2", "networks": "R1111,R2222"}, 3 * 196),
    ],
)
def test_the_dry_run_counts_cells(options: dict[str, str], per_setting: int, tmp_path: Path) -> None:
    """Without a data set, networks or a folder, and without making any."""
    estimate = fastsitch.estimate_paper(root=tmp_path / "none", **options)
    assert estimate.cells_by_setting == dict.fromkeys(("T2T", "T2R", "R2T", "R2R"), per_setting)
    assert estimate.cells == 4 * per_setting
    stages = {stage.stage: stage for stage in estimate.stages}
    assert tuple(stages) == STAGES
    assert stages["matched"].cells == 4 * per_setting
    twins = 0 if options.get("study") else sum(n * n for n in _positions(options))
    assert stages["sweep"].cells == 4 * per_setting + twins * len(estimate.config.seeds)
    assert stages["train"].networks == len(estimate.config.chosen) + len(estimate.config.twins)
    assert min(stages[name].seconds for name in ("train", "sweep", "matched")) > 0
    assert not (tmp_path / "none").exists()


def _positions(options: dict[str, str]) -> list[int]:
    """Positions of the chosen networks: the digits of a name count its blocks."""
    return [1 + sum(map(int, name[1:])) for name in make_study_config(**options).chosen]


def test_all_ordered_pairs_of_sixteen_networks() -> None:
    config = make_study_config()
    (sweep,) = config.sweeps()
    assert len(STUDIES["small-resnets"]) == 16
    assert sweep.senders == sweep.receivers == STUDIES["small-resnets"]
    assert sweep.settings == ("T2T", "T2R", "R2T", "R2R")
    assert (sweep.dataset, sweep.recipe.name, sweep.recipe.batch_size) == ("cifar10", "paper", 256)
    assert [(sweep.senders, sweep.receivers) for sweep in config.baselines()][:2] == [
        (("R1111",), ("R1111@1",)),
        (("R1112",), ("R1112@1",)),
    ]
    assert len(config.controls()) == 32


def test_runs_are_named_after_what_differs() -> None:
    names = set()
    for options in (
        {},
        {"scale": "small"},
        {"scale": "small", "networks": "R1111"},
        {"scale": "small", "seeds": "0,1"},
        {"scale": "small", "recipe": "paper"},
        {"scale": "small", "epochs": 1},
        {"scale": "small", "solver": "sgd"},
        {"scale": "small", "receiver_bn": "batch"},
        {"scale": "small", "settings": "T2T"},
        {"study": "r18-r34", "scale": "small"},
    ):
        config = make_study_config(**options)
        sweeps = [*config.sweeps(), *config.baselines()]
        names |= {config.run_name(sweep) for sweep in (*sweeps, *map(config.matched, config.sweeps()))}
    assert len(names) == (1 + 1 + 16) + 7 * (1 + 1 + 3) - 2 + (1 + 1 + 3) + 2 * 2
    whole = make_study_config(scale="small", networks=",".join(SCALES["small"].networks))
    assert whole.run_name(whole.sweeps()[0]) == "paper-small-resnets-small"


def test_options_reach_the_sweeps_they_concern() -> None:
    config = make_study_config(scale="medium", receiver_bn="batch", solver="sgd")
    (vanilla,) = config.sweeps()
    matched = config.matched(vanilla)
    assert (vanilla.recipe.epochs, vanilla.receiver_bn, vanilla.solver) == (1, "batch", "exact")
    assert {sweep.receiver_bn for sweep in config.baselines()} == {"batch"}
    assert (matched.recipe.epochs, matched.receiver_bn, matched.solver) == (30, "frozen", "sgd")
    assert make_study_config(scale="medium", epochs=0.5).sweeps()[0].recipe.epochs == 0.5
    assert make_study_config(scale="medium", recipe="paper").sweeps()[0].recipe.epochs == 4


def test_a_default_given_explicitly_is_the_same_run() -> None:
    plain, named = (
        make_study_config(scale="small", **options)
        for options in ({}, {"recipe": "small", "epochs": 2.0, "solver": "exact", "receiver_bn": "frozen"})
    )
    assert named == plain
    one, same = (make_study_config(scale="small", epochs=epochs) for epochs in (1, 1.0))
    assert one.run_name(one.sweeps()[0]) == same.run_name(same.sweeps()[0]) != plain.run_name(plain.sweeps()[0])
    # the recipe of the medium scale has one epoch only where no recipe is named
    assert make_study_config(scale="medium", recipe="small").sweeps()[0].recipe.epochs == 2
    assert make_study_config(scale="medium", epochs=1) == make_study_config(scale="medium")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"study": "resnets"}, "study='resnets': expected one of small-resnets, r18-r34"),
        ({"scale": "tiny"}, "scale='tiny': expected one of full, medium, small"),
        ({"stages": "train,tabels"}, "stages='tabels': expected some of train, precompute"),
        ({"networks": "ResNet34"}, "networks='ResNet34': expected some of R1111, "),
        ({"networks": "R1113"}, "unknown network 'R1113'"),
        ({"study": "r18-r34", "networks": "ResNet18"}, "r18-r34 needs both of ResNet18, ResNet34"),
        ({"settings": "T2X"}, "settings='T2X': expected some of T2T"),
        ({"seeds": "a"}, "seeds='a': expected whole numbers"),
        ({"recipe": "fast"}, "recipe='fast': expected one of paper, small"),
        ({"epochs": 0}, "epochs=0: expected a number above 0"),
        ({"solver": "lstsq"}, "solver='lstsq': expected one of exact, sgd"),
        ({"receiver_bn": "none"}, "receiver_bn='none': expected one of frozen, batch"),
    ],
)
def test_bad_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(FastsitchError, match=message):
        make_study_config(**options)


def test_an_empty_list_of_stages_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stages='': expected some of train, precompute"):
        make_study_config(stages="")


def _make_scale_tiny() -> None:
    study_config.SCALES["small"] = study_config.Scale(
        dataset="npz:../small.npz", width=4, training="fast", recipe="small", networks=("R1111",)
    )


def start_tiny_study(folder: Path, *arguments: str) -> RunningCommand:
    """The command line in a folder beside the data set small.npz, with a scale that takes seconds."""
    fixed = ["--scale", "small", "--root", "r", "--out", "o", "--settings", "T2T,R2R", "--epochs", "0.5"]
    return RunningCommand("paper", *fixed, *arguments, cwd=folder, prepare=_make_scale_tiny)


def contents(folder: Path) -> dict[str, bytes]:
    """All files whose content does not depend on the time."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".npz", ".safetensors", ".csv")
    }


@pytest.mark.kill
def test_a_study_killed_in_any_stage_continues_to_the_same_results(small_npz: Path, tmp_path: Path) -> None:
    """Killed as soon as each of these lines has appeared."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    ended = start_tiny_study(whole).ended()
    assert ended.returncode == 0, ended.stderr
    for stage in STAGES:
        assert f"stage {stage}" in ended.stderr
    for line in ("stage train", "stage precompute", "stage sweep", "stage matched"):
        command = start_tiny_study(killed)
        assert command.wait_for(lambda command=command, line=line: line in command.stderr)
        time.sleep(0.3)
        assert command.kill() == -signal.SIGKILL
    ended = start_tiny_study(killed).ended()
    assert ended.returncode == 0, ended.stderr
    assert contents(killed) == contents(whole)
    names = {path.name for path in (whole / "o").rglob("*")}
    assert {"networks.csv", "R1111--R1111.T2T.npz", "R1111--R1111@1.T2T.npz", "matrices-matched"} <= names
    table = (whole / "o" / "networks.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in table] == [
        ["network", "trained"],
        ["R1111", "yes"],
        ["R1111-random@0", "no"],
        ["R1111-random@1", "no"],
        ["R1111@1", "yes"],
    ]
