"""Networks, stores, runs and results written by version 0.1.0 can still be opened and continued."""

import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest

import fastsitch
from fastsitch.activations.store import ActivationStore
from fastsitch.identity import tensors_hash
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network
from fastsitch.networks.network_definition import read_definition
from fastsitch.runs.run import Run

DATASET = "fashion-mini:128"
RUNS = {
    "vanilla": {"settings": "T2T,R2T", "seeds": "0,1"},
    "part": {"positions": "stem,layer1.0"},
    "matched": {"loss": "match"},
    "batch": {"receiver_bn": "batch"},
}
TRAINED = {"batch_size": 32, "epochs": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).parent / "data" / "version_0_1_0.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_matrices_that_version_0_1_exported(files: Path, name: str, tmp_path: Path) -> None:
    run = fastsitch.open_run(name, root=files / "root")
    for path in fastsitch.export_run(run, tmp_path):
        with np.load(path) as now, np.load(files / "exports" / name / path.name) as then:
            assert set(now) == set(then)
            for key in then:
                np.testing.assert_array_equal(now[key], then[key])


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_sweep_has_nothing_to_do(files: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    trained = {} if name == "matched" else TRAINED
    how = {"precision": "fp32", "source": "live", "device": "cpu", **trained, **RUNS[name]}
    with caplog.at_level(logging.INFO):
        fastsitch.sweep("R1111", "R1112", dataset=DATASET, run=name, root=files / "root", **how)
    assert f"run {name} is done already" in caplog.text


def test_an_unfinished_run_is_continued(files: Path) -> None:
    run = fastsitch.open_run("part", root=files / "root")
    before = run.matrix("R1111", "R1112", "loss")
    (run.path / "units" / f"{run.units[0].name}.npz").unlink()
    how = {"precision": "fp32", "source": "live", "device": "cpu", **TRAINED, **RUNS["part"]}
    again = fastsitch.sweep("R1111", "R1112", dataset=DATASET, run="part", root=files / "root", **how)
    # processors round differently
    np.testing.assert_allclose(again.matrix("R1111", "R1112", "loss"), before, rtol=1e-3)


def test_stitches_statistics_errors_and_images_are_read(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = files / "root"
    run = fastsitch.open_run("vanilla", root=root)
    weight, bias = run.stitch("R1111", "R1112", "stem", "layer1.0", setting="R2T", seed=1)
    assert (weight.shape, bias.shape) == ((4, 4), (4,))
    assert np.isfinite(fastsitch.read_errors(run, "R1111", "R1112", "R2T").EV).all()
    statistics = fastsitch.open_run("batch", root=root).running_statistics("R1111", "R1112", 0, 1)
    assert statistics["block2.bn1.running_mean"].shape == (8,)
    with caplog.at_level(logging.WARNING):
        pictures = fastsitch.images(run, settings="T2T", images=[3], out=files / "pictures")
    assert [path.name for path in pictures] == ["R1111--R1112.T2T.vanilla.png", "R1111--R1112.T2T.matched.png"]
    # kept stitches are used again: training them anew would be said
    assert "training" not in caplog.text


def test_networks_definitions_and_stores_are_read(files: Path) -> None:
    models = files / "root" / "models" / "fashion-mini-first128"
    for name in ("R1111", "R1112", "R1111-random@0"):
        assert load_network(models, NetworkName.parse(name)).chain.positions[0].shape == (4, 32, 32)
    definition = read_definition(files / "root" / "networks" / models.name, "tiny")
    assert definition is not None
    assert definition.source.text == "torchvision:squeezenet1_1"
    # added again it is the same network, FLOPs included
    again, _ = fastsitch.add("tiny", "torchvision:squeezenet1_1", dataset=DATASET, root=files / "root")
    assert again == definition
    store = ActivationStore.open(files / "store")
    content = {
        f"{split}{index}": store.read(split, index, 0, images).float()
        for split, images in store.sizes.items()
        for index in range(len(store.positions))
    }
    assert tensors_hash(content) == "5bb0378eafbf6422b2c2ff485971134915c2d07255b7489bb016c47c9690b5b2"


def test_reading_an_old_run_does_not_change_it(files: Path) -> None:
    path = files / "root" / "runs" / "fashion-mini-first128" / "vanilla" / "run.json"
    before = path.read_bytes()
    run = Run.open(path.parent)
    assert run.config.hash == fastsitch.open_run("vanilla", root=files / "root").config.hash
    assert path.read_bytes() == before


def test_that_nothing_vouches_for_an_older_run_is_said(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = fastsitch.open_run("matched", root=files / "root")
    (line,) = [record.getMessage() for record in caplog.records if "version 0.1" in record.getMessage()]
    assert line.startswith("run matched was made by version 0.1: run.json has no hash")
    assert not run.record.hashed
