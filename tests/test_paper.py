"""The whole study: what it consists of, and that every stage finds what is there already."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastsitch
from fastsitch.errors import ConfigError, FastsitchError
from fastsitch.paper.study import SCALES, STAGES, STUDIES, paper_config
from tests.conftest import cli_environment


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
    """No data set, no network and no folder is there, and none is made."""
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
    return [1 + sum(map(int, name[1:])) for name in paper_config(**options).chosen]


def test_all_ordered_pairs_of_sixteen_networks() -> None:
    config = paper_config()
    (sweep,) = config.sweeps()
    assert len(STUDIES["small-resnets"]) == 16
    assert sweep.senders == sweep.receivers == STUDIES["small-resnets"]
    assert sweep.settings == ("T2T", "T2R", "R2T", "R2R")
    assert (sweep.dataset, sweep.recipe.name, sweep.recipe.batch_size) == ("cifar10", "paper", 256)
    assert [(own.senders, own.receivers) for own in config.baselines()][:2] == [
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
        config = paper_config(**options)
        sweeps = [*config.sweeps(), *config.baselines()]
        names |= {config.run_name(own) for own in (*sweeps, *map(config.matched, config.sweeps()))}
    assert len(names) == (1 + 1 + 16) + 7 * (1 + 1 + 3) - 2 + (1 + 1 + 3) + 2 * 2
    whole = paper_config(scale="small", networks=",".join(SCALES["small"].networks))
    assert whole.run_name(whole.sweeps()[0]) == "paper-small-resnets-small"


def test_options_reach_the_stitches_they_are_about() -> None:
    config = paper_config(scale="medium", receiver_bn="batch", solver="sgd")
    (vanilla,) = config.sweeps()
    matched = config.matched(vanilla)
    assert (vanilla.recipe.epochs, vanilla.receiver_bn, vanilla.solver) == (1, "batch", "exact")
    assert {own.receiver_bn for own in config.baselines()} == {"batch"}
    assert (matched.recipe.epochs, matched.receiver_bn, matched.solver) == (30, "frozen", "sgd")
    assert paper_config(scale="medium", epochs=0.5).sweeps()[0].recipe.epochs == 0.5
    assert paper_config(scale="medium", recipe="paper").sweeps()[0].recipe.epochs == 4


def test_naming_a_default_names_no_other_run() -> None:
    plain, named = (
        paper_config(scale="small", **options)
        for options in ({}, {"recipe": "small", "epochs": 2.0, "solver": "exact", "receiver_bn": "frozen"})
    )
    assert named == plain
    one, same = (paper_config(scale="small", epochs=epochs) for epochs in (1, 1.0))
    assert one.run_name(one.sweeps()[0]) == same.run_name(same.sweeps()[0]) != plain.run_name(plain.sweeps()[0])
    # the recipe of the medium scale has one epoch only where no recipe is named
    assert paper_config(scale="medium", recipe="small").sweeps()[0].recipe.epochs == 2
    assert paper_config(scale="medium", epochs=1) == paper_config(scale="medium")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"study": "resnets"}, "--study resnets: expected one of small-resnets, r18-r34"),
        ({"scale": "tiny"}, "--scale tiny: expected one of full, medium, small"),
        ({"stages": "train,tabels"}, "--stages tabels: expected some of train, precompute"),
        ({"networks": "ResNet34"}, "--networks ResNet34: expected some of R1111, "),
        ({"networks": "R1113"}, "unknown network 'R1113'"),
        ({"study": "r18-r34", "networks": "ResNet18"}, "r18-r34 needs both of ResNet18, ResNet34"),
        ({"settings": "T2X"}, "--settings T2X: expected some of T2T"),
        ({"seeds": "a"}, "--seeds a: expected whole numbers"),
        ({"recipe": "fast"}, "--recipe fast: expected one of paper, small"),
        ({"epochs": 0}, "--epochs 0: expected a number above 0"),
        ({"solver": "lstsq"}, "--solver lstsq: expected one of exact, sgd"),
        ({"receiver_bn": "none"}, "--receiver-bn none: expected one of frozen, batch"),
    ],
)
def test_bad_options_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(FastsitchError, match=message):
        paper_config(**options)


def test_an_empty_list_of_stages_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--stages \(none\): expected some of train, precompute"):
        paper_config(stages="")


TINY = """
import sys
from fastsitch.paper import study
study.SCALES["small"] = study.Scale(
    dataset="fashion-mini:150", width=4, training="fast", recipe="small", networks=("R1111",)
)
from fastsitch.cli.main import main
fixed = ["--scale", "small", "--root", "r", "--out", "o", "--settings", "T2T,R2R"]
sys.argv = ["fastsitch", "paper", *fixed, *sys.argv[1:]]
main()
"""
"""The command line, with a scale that is a matter of seconds."""


def tiny_paper(place: Path, *arguments: str) -> "subprocess.Popen[str]":
    line = [sys.executable, "-c", TINY, *arguments]
    return subprocess.Popen(line, cwd=place, env=cli_environment(), stderr=subprocess.PIPE, text=True)


def contents(place: Path) -> dict[str, bytes]:
    """Everything but what carries times."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.suffix in (".npz", ".safetensors", ".csv")
    }


def test_a_study_killed_anywhere_goes_on_to_the_same_results(tmp_path: Path) -> None:
    """Killed as soon as each of these lines has appeared."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, killed):
        place.mkdir()
    process = tiny_paper(whole)
    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    for stage in STAGES:
        assert f"stage {stage}" in log
    for line in ("stage train", "stage precompute", "stage sweep", "stage matched"):
        process = tiny_paper(killed)
        assert process.stderr is not None
        for text in process.stderr:
            if line in text:
                time.sleep(0.3)
                process.kill()
                break
        process.stderr.close()
        assert process.wait(timeout=60) == -signal.SIGKILL
    process = tiny_paper(killed)
    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
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
