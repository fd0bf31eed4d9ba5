"""EV, ES and SV of every cell: by definition and by moments; saved, resumed, repaired."""

import logging
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastsitch
from fastsitch.activations.ordered_split import OrderedSplit, ResidentSplitInOrder
from fastsitch.activations.representations import Representations
from fastsitch.analysis import measure_errors as measure
from fastsitch.checked_files import read_npz
from fastsitch.data import Dataset, load_dataset
from fastsitch.errors import ConfigError, RunError
from fastsitch.identity import torch_generator
from fastsitch.kernels.reference import conv_weight
from fastsitch.machine import DTYPES
from fastsitch.networks.checkpoint import load_network
from fastsitch.root import Root
from fastsitch.runs.run import Run
from fastsitch.runs.stitch_files import save_stitches
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.geometry import Geometry
from fastsitch.stitching.matching import match
from fastsitch.stitching.moments import SenderMoments, pair_moments
from fastsitch.stitching.output_errors import Stitch, direct_errors
from tests.conftest import network, save_npz
from tests.processes import RunningCommand
from tests.test_matching import source_of

KINDS = {"equal", "down 2", "down 4", "down 8", "up 2", "up 4", "up 8"}
TRAIN, TEST = 150, 70
OPTIONS = {"recipe": "small", "epochs": 1, "batch_size": 16}


def outputs(x_NHWC: Tensor, stitch: Stitch, geometry: Geometry) -> Tensor:
    """Of a stitch, by plain modules in fp64: (N, D, P, Q)."""
    x = x_NHWC.double().permute(0, 3, 1, 2)
    if geometry.up > 1:
        x = nn.Upsample(scale_factor=geometry.up)(x)
    weight, bias = (part.double() for part in stitch)
    return nn.functional.conv2d(x, conv_weight(weight, geometry.down), bias, stride=geometry.down)


def mean_square(x: Tensor) -> float:
    return x.square().mean().item()


def assert_near(value: float, wanted: float, scale: float) -> None:
    assert abs(value - wanted) <= 1e-6 * max(wanted, scale)


@pytest.mark.parametrize("factor", [1.0, 1e7])
def test_a_direct_pass_a_plain_loop_and_the_moments_agree(factor: float, fashion: Dataset) -> None:
    """For cells of every geometry, on the test images, with representations of any size."""
    chains = network("R1111"), network("R1112", seed=1)
    for chain in chains:
        # position 1 of either is the output of a ReLU, so this only scales it
        for tensor in (chain.segments[1].bn2.weight, chain.segments[1].bn2.bias, chain.segments[1].conv2.weight):
            tensor.data *= factor**0.5
    sender, receiver = (source_of(chain, fashion, train=TRAIN, test=TEST) for chain in chains)
    train, expected, test, expected_test = (
        ResidentSplitInOrder(source, split) for split in ("train", "test") for source in (sender, receiver)
    )
    matched = match(pair_moments(SenderMoments(train), expected))
    moments = pair_moments(SenderMoments(test), expected_test)
    generator = torch_generator("vanilla stitches")
    stitches: dict[tuple[int, int], list[Stitch]] = {}
    for cell, stitch in matched.items():
        noise = [torch.randn(stitch.weight_FD.shape, generator=generator) for _ in range(2)]
        stitches[cell] = [
            (stitch.weight_FD, stitch.bias_D),
            *((stitch.weight_FD.float() + 0.1 * x, stitch.bias_D.float() + factor) for x in noise),
        ]
    shown: list[tuple[int, int]] = []
    direct = direct_errors(
        test, expected_test, stitches, lambda progress: shown.append((progress.done, progress.total))
    )
    assert shown == [(64, TEST), (TEST, TEST)]
    assert {cell_moments.geometry.kind for cell_moments in moments.values()} == KINDS
    assert direct.error.isfinite().all()
    for (i, j), cell_moments in moments.items():
        y = expected_test.images(j, 0, TEST).permute(0, 3, 1, 2)
        scale = mean_square(y)
        assert_near(direct.variance[j].item(), mean_square(y - y.mean((0, 2, 3), keepdim=True)), scale)
        assert_near(direct.variance[j].item(), cell_moments.scatter_D.sum().item() / cell_moments.elements, scale)
        first = outputs(test.images(i, 0, TEST), stitches[i, j][0], cell_moments.geometry)
        assert direct.distance[0, i, j] == 0
        for s, stitch in enumerate(stitches[i, j]):
            out = outputs(test.images(i, 0, TEST), stitch, cell_moments.geometry)
            assert_near(direct.error[s, i, j].item(), mean_square(out - y), scale)
            assert_near(cell_moments.error(*stitch), mean_square(out - y), scale)
            assert_near(direct.distance[s, i, j].item(), mean_square(out - first), scale)
            assert_near(cell_moments.distance(stitch, stitches[i, j][0]), mean_square(out - first), scale)


def test_a_stitch_that_is_not_finite_affects_only_its_errors(fashion: Dataset) -> None:
    source = ResidentSplitInOrder(source_of(network("R1111"), fashion, train=20, test=20))
    moments = pair_moments(SenderMoments(source), source)
    matched = match(moments)
    stitches = {
        cell: [(stitch.weight_FD, stitch.bias_D), (stitch.weight_FD, stitch.bias_D)] for cell, stitch in matched.items()
    }
    calm = direct_errors(source, source, stitches)
    broken = stitches[1, 0][1][0].clone()
    broken[0, 0] = float("nan")
    stitches[1, 0][1] = (broken, stitches[1, 0][1][1])
    spoilt = direct_errors(source, source, stitches)
    others = torch.ones_like(calm.error, dtype=torch.bool)
    others[1, 1, 0] = False
    assert torch.equal(spoilt.error[others], calm.error[others])
    assert torch.equal(spoilt.distance[others], calm.distance[others])
    assert spoilt.error[1, 1, 0].isnan()
    assert np.isnan(moments[1, 0].error(*stitches[1, 0][1]))
    assert np.isnan(moments[1, 0].distance(stitches[1, 0][1], stitches[1, 0][0]))


def test_other_images_are_refused(fashion: Dataset) -> None:
    one, other = (ResidentSplitInOrder(source_of(network("R1111"), fashion, train=n)) for n in (9, 8))
    with pytest.raises(ConfigError, match="the sender has 9 images, the receiver 8"):
        direct_errors(one, other, {})


@pytest.fixture(scope="module")
def root_and_dataset(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("errors")
    save_npz(folder / "small.npz", fashion.train, fashion.test, TRAIN, TEST)
    dataset = f"npz:{folder / 'small.npz'}"
    fastsitch.train("R1111", "R1112", dataset=dataset, width=4, epochs=2, root=folder)
    return folder, dataset


@pytest.fixture(scope="module", params=[("resident", "auto"), ("live", "fp32")])
def run(root_and_dataset: tuple[Path, str], request: pytest.FixtureRequest) -> Run:
    root, _ = root_and_dataset
    source, precision = request.param
    run = fastsitch.sweep(
        ["R1111"],
        ["R1112", "R1111"],
        settings=["T2T", "R2R"],
        seeds=[0, 1],
        source=source,
        precision=precision,
        root=root,
        run=f"measured-{source}",
        **OPTIONS,
    )
    fastsitch.measure_errors(run)
    return run


def splits_of(run: Run, root_and_dataset: tuple[Path, str], unit: Unit) -> dict[str, tuple[OrderedSplit, OrderedSplit]]:
    """Representations of the training and test images, computed by running the networks of a unit."""
    root, dataset = root_and_dataset
    folder = Root.at(root).models(dataset)
    live = Representations(
        Root.at(root),
        load_dataset(dataset, root),
        lambda name: load_network(folder, name),
        source=lambda _: "live",
        dtype=DTYPES[run.resolved.precision],
        device=torch.device("cpu"),
    )
    sender, receiver = unit.sender_network, unit.receiver_network
    return {split: (live.expected(sender, split)[0], live.expected(receiver, split)[0]) for split in ("train", "test")}


@pytest.mark.parametrize("setting", ["T2T", "R2R"])
def test_measured_errors_are_those_of_the_definition(
    setting: str, run: Run, root_and_dataset: tuple[Path, str]
) -> None:
    unit = Unit(sender="R1111", receiver="R1112", setting=setting, loss="task", seed=1)
    splits = splits_of(run, root_and_dataset, unit)
    matched = match(pair_moments(SenderMoments(splits["train"][0]), splits["train"][1]))
    for split, (sender, receiver) in splits.items():
        errors = fastsitch.read_errors(run, "R1111", "R1112", setting, seed=1, split=split)
        assert errors.EV.shape == errors.ES.shape == errors.SV.shape == (5, 6)
        count = len(sender.labels)
        for (i, j), stitch in matched.items():
            geometry = Geometry.between(sender.shapes[i], receiver.shapes[j])
            x, y = sender.images(i, 0, count), receiver.images(j, 0, count).double().permute(0, 3, 1, 2)
            vanilla = outputs(x, run.read_stitch(Cell(unit, i, j)), geometry)
            similar = outputs(x, (stitch.weight_FD, stitch.bias_D), geometry)
            for value, wanted in (
                (errors.EV[i, j], vanilla - y),
                (errors.ES[i, j], similar - y),
                (errors.SV[i, j], vanilla - similar),
                (errors.variance[j], y - y.mean((0, 2, 3), keepdim=True)),
            ):
                assert_near(value, mean_square(wanted), mean_square(y))


def test_no_vanilla_stitch_is_closer_on_the_training_images(run: Run) -> None:
    for sender, receiver, setting in run.pairs():
        by_split = {
            split: fastsitch.read_errors(run, sender, receiver, setting, split=split) for split in ("train", "test")
        }
        train = by_split["train"]
        assert (train.ES <= train.EV * (1 + 1e-9)).all()
        # the matched stitch is a projection: what it leaves over is orthogonal to every difference of stitches
        np.testing.assert_allclose(train.EV, train.ES + train.SV, rtol=1e-4)
        assert (train.variance * (1 + 1e-9) >= train.ES).all()
        for errors in by_split.values():
            for values in (errors.EV, errors.ES, errors.SV, errors.variance):
                assert values.dtype == np.float64
                assert np.isfinite(values).all()
        seeds = [fastsitch.read_errors(run, sender, receiver, setting, seed, "test").EV for seed in (0, 1)]
        assert not np.array_equal(*seeds)
        np.testing.assert_allclose(by_split["test"].EV, np.mean(seeds, axis=0), rtol=1e-15)


def test_a_live_run_needs_no_store_and_others_only_those_of_their_senders(
    root_and_dataset: tuple[Path, str], run: Run
) -> None:
    root, dataset = root_and_dataset
    stores = {path.name for path in Path(Root.at(root).activations(dataset)).glob("*[0-9]")}
    assert stores <= {"R1111", "R1111-random@0"}


def test_measured_units_are_kept_and_damaged_or_stale_ones_measured_again(
    root_and_dataset: tuple[Path, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = root_and_dataset
    options = {"seeds": [0, 1], "root": root, "run": "kept", **OPTIONS}
    run = fastsitch.sweep(["R1111"], ["R1112", "R1111"], **options)
    reports: list[fastsitch.Progress] = []
    fastsitch.measure_errors(run, report=reports.append)
    assert [step.done for step in reports] == sorted(step.done for step in reports)
    assert reports[-1].done == reports[-1].total == 4
    files = {path.stem: path for path in sorted((run.path / "errors").glob("*.npz"))}
    assert list(files) == sorted(unit.name for unit in run.units)
    whole = {name: path.read_bytes() for name, path in files.items()}
    times = {name: path.stat().st_mtime_ns for name, path in files.items()}
    pairs: list[int] = []
    monkeypatch.setattr(measure, "match", lambda moments: pairs.append(len(moments)) or match(moments))
    fastsitch.measure_errors(run)
    assert not pairs
    damaged, missing, foreign = (
        "R1111--R1112.T2T.task.seed1",
        "R1111--R1111.T2T.task.seed0",
        "R1111--R1111.T2T.task.seed1",
    )
    # cut off, changed within, gone, and another unit's
    files[missing].unlink()
    files[foreign].write_bytes(whole[damaged])
    changed = bytearray(whole[damaged])
    # a value of the first matrix, behind the name of its file and the header of the array
    changed[changed.index(b"EV_train.npy") + len("EV_train.npy") + 128 + 40] ^= 0xFF
    for content in (whole[damaged][:500], bytes(changed), b""):
        files[damaged].write_bytes(content)
        with pytest.raises(RunError, match=r"seed1\.npz is damaged .*: measure them with fastsitch\.measure_errors"):
            fastsitch.read_errors(run, "R1111", "R1112")
        pairs.clear()
        fastsitch.measure_errors(run)
        assert {name: path.read_bytes() for name, path in files.items()} == whole
        assert pairs[0] == 30
    assert "holds unit R1111--R1112.T2T.task.seed1" in caplog.text
    untouched = "R1111--R1112.T2T.task.seed0"
    assert files[untouched].stat().st_mtime_ns == times[untouched]
    # other stitches of the same unit make the errors stale
    pair = [run.path / "units" / f"{untouched}.{suffix}" for suffix in ("npz", "safetensors")]
    kept = [path.read_bytes() for path in pair]
    arrays = {name: array for name, array in read_npz(pair[0]).items() if not name.startswith("stitches_")}
    save_stitches(pair[0], load_file(run.path / "units" / f"{damaged}.safetensors"), arrays)
    with pytest.raises(RunError, match=r"seed0\.npz was measured of other stitches than those of the run"):
        fastsitch.read_errors(run, "R1111", "R1112", seed=0)
    fastsitch.measure_errors(run)
    assert np.array_equal(*(fastsitch.read_errors(run, "R1111", "R1112", seed=seed).EV for seed in (0, 1)))
    for path, content in zip(pair, kept, strict=True):
        path.write_bytes(content)


@pytest.mark.kill
def test_a_measurement_survives_a_kill(root_and_dataset: tuple[Path, str]) -> None:
    root, _ = root_and_dataset
    options = {"seeds": [0, 1], "root": root, **OPTIONS}
    whole, killed = (
        fastsitch.sweep(["R1111"], ["R1112", "R1111"], run=name, **options) for name in ("whole", "killed")
    )
    fastsitch.measure_errors(whole)
    first = killed.path / "errors" / "R1111--R1112.T2T.task.seed0.npz"
    command = RunningCommand("tables", "killed", "--root", root)
    command.wait_for(first.exists)
    assert command.kill() == -signal.SIGKILL
    time_of_first = first.stat().st_mtime_ns
    assert len(list(first.parent.glob("*.npz"))) < 4
    fastsitch.measure_errors(killed)
    assert first.stat().st_mtime_ns == time_of_first
    for path in (whole.path / "errors").glob("*.npz"):
        assert (first.parent / path.name).read_bytes() == path.read_bytes()


def test_a_cell_that_diverged_is_the_only_one_without_errors(root_and_dataset: tuple[Path, str]) -> None:
    root, _ = root_and_dataset
    run = fastsitch.sweep(
        ["R1111"], ["R1112"], settings="R2T", root=root, run="wild", **{**OPTIONS, "epochs": 2, "lr": 1e12}
    )
    status = run.matrix("R1111", "R1112", "status", setting="R2T")
    assert (status == 2).any()
    fastsitch.measure_errors(run)
    for split in ("train", "test"):
        errors = fastsitch.read_errors(run, "R1111", "R1112", "R2T", split=split)
        assert np.array_equal(np.isnan(errors.EV), status == 2)
        assert np.array_equal(np.isnan(errors.SV), status == 2)
        assert np.isfinite(errors.ES).all()
        assert np.isfinite(errors.variance).all()


def test_runs_that_have_no_errors_are_refused(
    root_and_dataset: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    root, _ = root_and_dataset
    matching = fastsitch.sweep(["R1111"], ["R1111"], loss="match", root=root, run="matching", **OPTIONS)
    with pytest.raises(RunError, match="has loss='match': stitch errors are measured of runs with loss='task'"):
        fastsitch.measure_errors(matching)
    run = fastsitch.sweep(["R1111"], ["R1111", "R1112"], root=root, run="unfinished", **OPTIONS)
    (run.path / "units" / "R1111--R1112.T2T.task.seed0.npz").unlink()
    with caplog.at_level(logging.INFO):
        fastsitch.measure_errors(run)
    assert "1 of 2 units are not finished: left out" in caplog.text
    assert np.isfinite(fastsitch.read_errors(run, "R1111", "R1111@0").EV).all()
    with pytest.raises(RunError, match=r"unit R1111--R1112\.T2T\.task\.seed0 are not measured yet: measure them with"):
        fastsitch.read_errors(run, "R1111", "R1112")
    for arguments, message in (
        (("R1112", "R1111"), "has no pair R1112--R1111.T2T"),
        (("R1111", "R1111", "T2T", 3), "has no seed 3"),
    ):
        with pytest.raises(RunError, match=message):
            fastsitch.read_errors(run, *arguments)
    with pytest.raises(ConfigError, match="split='all': expected one of train, test"):
        fastsitch.read_errors(run, "R1111", "R1111", "T2T", 0, "all")
    (run.path / "units" / "R1111--R1111.T2T.task.seed0.npz").unlink()
    with pytest.raises(RunError, match="has no finished unit: run its sweep first"):
        fastsitch.measure_errors(run)


def test_a_store_made_again_with_other_options_is_refused(root_and_dataset: tuple[Path, str]) -> None:
    root, _ = root_and_dataset
    run = fastsitch.sweep(["R1112"], ["R1111"], root=root, run="otherwise", **OPTIONS)
    fastsitch.precompute("R1112", dtype="fp32", force=True, root=root)
    with pytest.raises(RunError, match=r"was trained on another store than .*R1112 \(fp32"):
        fastsitch.measure_errors(run)
