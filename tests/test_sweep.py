"""A sweep on disk: complete, resumable, exportable, with stitches that reproduce its matrices."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastsitch
from fastsitch.analysis.triangle import lower_left_mask, triangle
from fastsitch.data import Dataset, load_dataset
from fastsitch.errors import ConfigError, NetworkError, RunError, StoreError
from fastsitch.kernels.reference import conv_weight
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network
from fastsitch.root import Root
from fastsitch.runs.run import Run
from fastsitch.runs.sweep_config import SweepConfig, sweep_config
from fastsitch.stitching.cells import Cell, Unit, split_groups
from fastsitch.stitching.geometry import Geometry
from tests.conftest import save_npz

OPTIONS = {"recipe": "small", "epochs": 1, "batch_size": 16}


@pytest.fixture(scope="module")
def root_and_dataset(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A root with R1111 and R1112 trained on 160 images, and the name of their data set."""
    folder = tmp_path_factory.mktemp("sweep")
    save_npz(folder / "small.npz", fashion.train, fashion.test, 160, 80)
    dataset = f"npz:{folder / 'small.npz'}"
    fastsitch.train("R1111", "R1112", dataset=dataset, width=4, epochs=2, root=folder)
    return folder, dataset


@pytest.fixture(scope="module")
def run(root_and_dataset: tuple[Path, str]) -> Run:
    root, _ = root_and_dataset
    return fastsitch.sweep(
        ["R1111"],
        ["R1112", "R1111"],
        settings=["T2T", "R2T", "T2R", "R2R"],
        seeds=[0, 1],
        root=root,
        run="full",
        **OPTIONS,
    )


def test_every_cell_of_every_unit_is_done(run: Run) -> None:
    assert len(run.units) == 16
    for sender, receiver, setting in run.pairs():
        shape = (5, 6 if receiver == "R1112" else 5)
        for metric in ("accuracy", "loss", "train_loss", "accuracy_ratio", "accuracy_drop"):
            matrix = run.matrix(sender, receiver, metric, setting=setting)
            assert matrix.shape == shape
            assert np.isfinite(matrix).all()
        assert (run.matrix(sender, receiver, "status", setting=setting) == 1).all()
        accuracy = run.matrix(sender, receiver, setting=setting)
        assert ((accuracy >= 0) & (accuracy <= 1)).all()
        network_accuracy = run.pair_networks(sender, receiver, setting)[1].accuracy
        drop = run.matrix(sender, receiver, "accuracy_drop", setting=setting)
        np.testing.assert_allclose(drop, network_accuracy - accuracy, atol=1e-12)


def test_a_stitch_can_be_taken_out_and_used_with_plain_modules(run: Run, root_and_dataset: tuple[Path, str]) -> None:
    """The accuracy in the matrix is that of the stitched network, rebuilt without any of the engine's code."""
    root, dataset = root_and_dataset
    data = load_dataset(dataset, root)
    folder = Root.at(root).models(dataset)
    unit = Unit(sender="R1111", receiver="R1112", setting="R2T", loss="task", seed=1)
    sender = load_network(folder, NetworkName.parse("R1111-random@0")).chain
    receiver = load_network(folder, NetworkName.parse("R1112")).chain
    x = data.normalisation.apply(data.test.images)
    accuracy = run.matrix("R1111", "R1112", setting="R2T", seed=1)
    loss = run.matrix("R1111", "R1112", "loss", setting="R2T", seed=1)
    for i, j in ((0, 0), (1, 4), (4, 1), (3, 5)):
        geometry = Geometry.between(sender.positions[i].shape, receiver.positions[j].shape)
        weight, bias = run.read_stitch(Cell(unit, i, j))
        with torch.no_grad():
            provided = sender.representations(x)[i]
            if geometry.up > 1:
                provided = nn.Upsample(scale_factor=geometry.up)(provided)
            stitched = nn.functional.conv2d(provided, conv_weight(weight, geometry.down), bias, stride=geometry.down)
            logits = receiver.tail(stitched, j)
        # the run computed in bf16 where the processor has it: two images may fall on the other side
        assert abs((logits.argmax(-1) == data.test.labels).double().mean().item() - accuracy[i, j]) <= 2.5 / 80
        assert nn.functional.cross_entropy(logits, data.test.labels).item() == pytest.approx(
            loss[i, j], rel=0.05, abs=0.05
        )


def test_the_same_sweep_again_gives_the_same_bits(run: Run, root_and_dataset: tuple[Path, str], tmp_path: Path) -> None:
    root, _ = root_and_dataset
    again = fastsitch.sweep(["R1111"], ["R1112"], settings=["R2T"], seeds=[1], root=root, run="again", **OPTIONS)
    for metric in ("accuracy", "loss", "train_loss"):
        first = run.matrix("R1111", "R1112", metric, setting="R2T", seed=1)
        assert np.array_equal(again.matrix("R1111", "R1112", metric, setting="R2T"), first)


@pytest.mark.slow
def test_groups_of_any_size_give_the_same_matrix_in_fp64(root_and_dataset: tuple[Path, str]) -> None:
    root, _ = root_and_dataset
    runs = [
        fastsitch.sweep(
            ["R1111"], ["R1112"], root=root, run=f"groups-{size}", group_size=size, precision="fp64", **OPTIONS
        )
        for size in (1, 7, 30)
    ]
    for other in runs[1:]:
        for metric in ("accuracy", "loss", "train_loss"):
            np.testing.assert_allclose(
                other.matrix("R1111", "R1112", metric), runs[0].matrix("R1111", "R1112", metric), rtol=1e-10
            )


def test_a_run_is_continued_unit_by_unit(run: Run, root_and_dataset: tuple[Path, str]) -> None:
    root, _ = root_and_dataset
    options = {"settings": ["T2T", "R2T"], "root": root, "run": "interrupted", **OPTIONS}
    first = fastsitch.sweep(["R1111"], ["R1112"], **options)
    files = sorted((first.path / "units").glob("*.npz"))
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    assert len(files) == 2
    files[0].unlink()
    assert (fastsitch.open_run("interrupted", root=root).matrix("R1111", "R1112", "status", setting="R2T") == 0).all()
    assert np.isnan(fastsitch.open_run("interrupted", root=root).matrix("R1111", "R1112", setting="R2T")).all()
    fastsitch.sweep(["R1111"], ["R1112"], **options)
    assert files[0].read_bytes() == before[files[0]][0]
    assert files[1].stat().st_mtime_ns == before[files[1]][1]


def test_another_configuration_under_the_same_name_is_refused_by_key(
    run: Run, root_and_dataset: tuple[Path, str]
) -> None:
    root, _ = root_and_dataset
    with pytest.raises(RunError) as caught:
        fastsitch.sweep(["R1111"], ["R1112"], root=root, run="full", recipe="small", epochs=3, batch_size=16)
    for part in ("recipe.epochs is 1 there, 3 was asked for", "seeds is 0,1 there, 0 was asked for", "receivers"):
        assert part in str(caught.value)
    assert "batch_size" not in str(caught.value)


def test_a_network_that_was_trained_again_stops_the_run(root_and_dataset: tuple[Path, str]) -> None:
    root, dataset = root_and_dataset
    fastsitch.train("R1211", dataset=dataset, width=4, epochs=1, root=root)
    options = {"root": root, "run": "retrained", **OPTIONS}
    fastsitch.sweep(["R1211"], ["R1111"], **options)
    fastsitch.train("R1211", dataset=dataset, width=4, epochs=2, root=root, force=True)
    with pytest.raises(RunError, match="R1211 was trained again since run 'retrained' began"):
        fastsitch.sweep(["R1211"], ["R1111"], **options)


def test_networks_that_were_never_trained_come_with_the_command_that_trains_them(
    root_and_dataset: tuple[Path, str],
) -> None:
    root, dataset = root_and_dataset
    with pytest.raises(NetworkError) as caught:
        fastsitch.sweep(["R1111", "R2222@4"], ["R1221"], dataset=dataset, root=root, **OPTIONS)
    assert f"fastsitch train R1221 R2222@4 --dataset {dataset} --root {root}" in str(caught.value)


def test_stale_stores_are_refused_before_anything_is_written(root_and_dataset: tuple[Path, str]) -> None:
    root, dataset = root_and_dataset
    fastsitch.train("R2111", dataset=dataset, width=4, epochs=1, root=root)
    fastsitch.precompute("R2111", dataset=dataset, root=root)
    fastsitch.train("R2111", dataset=dataset, width=4, epochs=2, root=root, force=True)
    with pytest.raises(StoreError, match="R2111 is stale: the network was trained again since"):
        fastsitch.sweep(["R1111", "R2111"], ["R1111"], root=root, run="stale", **OPTIONS)
    assert not Root.at(root).run(dataset, "stale").exists()


def test_controls_of_seeds_with_different_widths_are_ambiguous(root_and_dataset: tuple[Path, str]) -> None:
    root, dataset = root_and_dataset
    fastsitch.train("R2211", dataset=dataset, width=4, epochs=1, root=root)
    fastsitch.train("R2211@1", dataset=dataset, width=2, epochs=1, root=root)
    with pytest.raises(NetworkError, match="R2211-random@0 is ambiguous: R2211 has width 4, R2211@1 has width 2"):
        fastsitch.sweep(["R2211"], ["R1111"], settings="R2T", root=root, run="ambiguous", **OPTIONS)


def test_data_that_changed_after_training_stops_everything(
    fashion: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_npz(tmp_path / "moving.npz", fashion.train, fashion.test, 160, 80)
    fastsitch.train("R1111", dataset="npz:moving.npz", width=2, epochs=1)
    # the same file by another name is the same data set
    fastsitch.precompute("R1111", dataset=f"npz:{tmp_path}/./moving.npz")
    save_npz(tmp_path / "moving.npz", fashion.train, fashion.test, 161, 80)
    for call in (
        lambda: fastsitch.precompute("R1111"),
        lambda: fastsitch.sweep("R1111", "R1111", batch_size=16),
    ):
        with pytest.raises(NetworkError, match="has changed since R1111 was trained on it"):
            call()


def test_an_option_that_there_is_not_is_named_with_a_similar_one(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a sweep has no option 'batchsize'; did you mean 'batch_size'?"):
        fastsitch.sweep("R1111", "R1112", dataset="fashion-mini", root=tmp_path, batchsize=3)  # type: ignore[call-arg]
    assert not list(tmp_path.iterdir())


def test_exported_files_need_no_fastsitch(run: Run, tmp_path: Path) -> None:
    paths = fastsitch.export_run(run, tmp_path)
    assert [path.name for path in paths] == [
        f"R1111--{receiver}.{setting}.npz"
        for setting in ("T2T", "T2R", "R2T", "R2R")
        for receiver in ("R1112", "R1111")
    ]
    with np.load(tmp_path / "R1111--R1112.T2T.npz", allow_pickle=False) as file:
        arrays = dict(file)
    assert arrays["accuracy"].dtype == np.float64
    assert arrays["accuracy"].shape == (5, 6)
    assert arrays["accuracy_by_seed"].shape == (2, 5, 6)
    np.testing.assert_allclose(arrays["accuracy_by_seed"].mean(0), arrays["accuracy"])
    assert not np.array_equal(arrays["accuracy_by_seed"][0], arrays["accuracy_by_seed"][1])
    assert arrays["status"].tolist() == [[1] * 6] * 5
    assert arrays["sender_positions"].tolist() == ["stem", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert arrays["receiver_positions"].tolist()[-1] == "layer4.1"
    sidecar = json.loads((tmp_path / "R1111--R1112.R2T.json").read_text())
    assert sidecar["sender"]["trained"] is False
    assert sidecar["receiver"]["accuracy"] == run.pair_networks("R1111", "R1112", "R2T")[1].accuracy
    np.testing.assert_allclose(arrays["accuracy_ratio"] * sidecar["receiver"]["accuracy"], arrays["accuracy"])
    assert sidecar["recipe"]["epochs"] == 1
    assert sidecar["seeds"] == [0, 1]
    assert sidecar["data_hash"] == run.data_hash
    assert sidecar["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_heat_maps_show_every_accuracy(run: Run, tmp_path: Path) -> None:
    paths = fastsitch.plot_run(run, tmp_path)
    assert len(paths) == 8
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.with_suffix(".pdf").read_bytes()[:5] == b"%PDF-"
    figure = fastsitch.report.heatmap.pair_figure(run, "R1111", "R1112", "T2T")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == [f"{value:.2f}" for value in run.matrix("R1111", "R1112").flatten()]
    assert figure.axes[0].images[0].get_clim() == (0, 1)
    sender, receiver = run.pair_networks("R1111", "R1112")
    assert f"{sender.accuracy:.3f}" in figure.axes[0].get_title()
    assert f"{receiver.accuracy:.3f}" in figure.axes[0].get_title()


def test_damaged_results_are_named(root_and_dataset: tuple[Path, str]) -> None:
    root, _ = root_and_dataset
    run = fastsitch.sweep(["R1111"], ["R1111"], root=root, run="damaged", **OPTIONS)
    (file,) = (run.path / "units").glob("*.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[:300])
    with pytest.raises(RunError, match=r"seed0\.npz is damaged .*: run the same sweep again to replace it"):
        run.matrix("R1111", "R1111")
    # the same sweep again replaces it, and a unit whose stitches are gone
    fastsitch.sweep(["R1111"], ["R1111"], root=root, run="damaged", **OPTIONS)
    assert file.read_bytes() == whole
    file.with_suffix(".safetensors").unlink()
    fastsitch.sweep(["R1111"], ["R1111"], root=root, run="damaged", **OPTIONS)
    assert file.with_suffix(".safetensors").is_file()
    # another unit's results under this unit's name are no results
    other = fastsitch.sweep(["R1112"], ["R1112"], root=root, run="other", **OPTIONS)
    (foreign,) = (other.path / "units").glob("*.npz")
    file.write_bytes(foreign.read_bytes())
    with pytest.raises(RunError, match=r"holds unit R1112--R1112\.T2T"):
        run.matrix("R1111", "R1111")
    (run.path / "run.json").write_text("{}")
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        fastsitch.open_run("damaged", root=root)


def test_unknown_pairs_metrics_and_seeds_are_refused(run: Run) -> None:
    with pytest.raises(RunError, match="has no pair R1112--R1111.T2T: it joins R1111 to R1112, R1111"):
        run.matrix("R1112", "R1111")
    with pytest.raises(RunError, match="unknown metric 'acc': expected one of accuracy"):
        run.matrix("R1111", "R1112", "acc")
    with pytest.raises(RunError, match=r"has no seed 7: expected one of \(0, 1\)"):
        run.matrix("R1111", "R1112", seed=7)
    with pytest.raises(ConfigError, match="no run 'nothing' in .*: found "):
        fastsitch.open_run("nothing", root=run.path.parents[2])


def config(**changes: object) -> SweepConfig:
    options = {"dataset": "cifar10", "senders": ["R1111"], "receivers": ["R1112"], **changes}
    return sweep_config(**options)  # type: ignore[arg-type]


def test_configurations_are_written_and_read_back() -> None:
    original = config(settings=["T2T", "R2R"], seeds=[0, 3], epochs=7, group_size=12)
    assert SweepConfig.from_dict(json.loads(json.dumps(original.to_dict()))) == original
    assert original.hash == config(settings=["T2T", "R2R"], seeds=[0, 3], epochs=7, group_size="12").hash
    assert original.hash != config(settings=["T2T", "R2R"], seeds=[0, 3], epochs=8, group_size=12).hash


def test_default_recipes_and_names() -> None:
    assert config().recipe.name == "paper"
    assert config(dataset="fashion-mini").recipe.name == "small"
    assert config(senders=["R1111@0", "R1111", "R1112@2"]).senders == ("R1111", "R1112@2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": ["T2X"]}, "settings='T2X': expected some of T2T, T2R, R2T, R2R"),
        ({"senders": []}, "no senders"),
        ({"senders": ["R1111-random@0"]}, "controls come from settings"),
        ({"seeds": [-1]}, "seeds=-1: expected a whole number from 0"),
        ({"seeds": []}, r"seeds=''"),
        ({"epochs": 0}, "epochs=0: expected a number above 0"),
        ({"epochs": float("nan")}, "epochs=nan: expected a number above 0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"group_size": "many"}, "group_size='many': expected auto or a number from 1"),
        ({"recipe": "large"}, "recipe='large': expected one of paper, small, published-schedule"),
        ({"precision": "int8"}, "precision='int8'"),
        ({"kernel": "magic"}, "kernel='magic'"),
        ({"loss": "mse"}, "loss='mse': expected one of task, match"),
        ({"solver": "sgd"}, "solver='sgd' trains matched stitches: add loss='match'"),
        ({"solver": "sgd", "init": "matched"}, "solver='sgd' trains matched stitches: add loss='match'"),
        ({"solver": "sgd", "loss": "match", "init": "matched"}, "init='matched' is where vanilla stitches start"),
        (
            {"solver": "sgd", "loss": "match", "optimizer": "preconditioned"},
            "optimizer='preconditioned' needs the statistics of a matched start",
        ),
        ({"solver": "lbfgs"}, "solver='lbfgs': expected one of exact, sgd"),
        ({"init": "zero"}, "init='zero': expected one of default, matched"),
        ({"loss": "match", "init": "matched"}, "init='matched' is where vanilla stitches start"),
    ],
)
def test_configurations_that_cannot_work(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_controls_are_two_different_networks() -> None:
    units = config(receivers=["R1111"], settings=["T2T", "R2R"]).units
    assert [(str(unit.sender_network), str(unit.receiver_network)) for unit in units] == [
        ("R1111", "R1111"),
        ("R1111-random@0", "R1111-random@1"),
    ]


def test_units_of_one_sender_are_consecutive() -> None:
    units = config(senders=["R1111", "R1112"], settings=["T2T", "R2T", "T2R"], seeds=[0, 1]).units
    senders = [unit.sender_network for unit in units]
    assert len(units) == 12
    assert [name for k, name in enumerate(senders) if k == 0 or senders[k - 1] != name] == list(dict.fromkeys(senders))


@pytest.mark.parametrize(("cells", "size", "groups"), [(30, 30, [30]), (30, 29, [15, 15]), (25, 7, [6, 6, 7, 6])])
def test_groups_are_of_nearly_equal_size(cells: int, size: int, groups: list[int]) -> None:
    split = split_groups([Cell(config().units[0], 0, k) for k in range(cells)], size)
    assert sorted(map(len, split)) == sorted(groups)
    assert sorted(cell.j for group in split for cell in group) == list(range(cells))
    # every group spans all positions, so that all take the same memory and time
    assert all(group[0].j < len(split) and group[-1].j >= cells - len(split) for group in split)


def test_the_triangle_equals_one_worked_out_by_hand() -> None:
    assert lower_left_mask(3, 3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    # I = 1, J = 2: j/2 <= i/1
    assert lower_left_mask(2, 3).tolist() == [[True, False, False], [True, True, True]]
    matrix = np.array([[0.9, 0.5, 0.3], [0.8, np.nan, 0.7]])
    regions = triangle(matrix)
    assert regions.lower_left == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert regions.rest == pytest.approx(0.4)
    assert regions.gap == pytest.approx(0.4)
