"""Stitches into the image itself: exact where possible, and drawn with the right pixels."""

import re
from collections import Counter
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastsitch
from fastsitch.activations.ordered_split import ResidentSplitInOrder
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.activations.store import ActivationStore
from fastsitch.data import Dataset, Split, Transform, load_dataset
from fastsitch.errors import ConfigError, RunError
from fastsitch.generation import train_input_stitches
from fastsitch.generation.generate_images import PairImages, chosen_images, generate, run_images
from fastsitch.generation.input_stitches import InputImages, input_unit
from fastsitch.identity import torch_generator
from fastsitch.kernels.reference import conv_weight
from fastsitch.network_names import NetworkName
from fastsitch.networks.checkpoint import load_network
from fastsitch.report.image_grids import DPI, GAP, image_grid, images_figure, tile_corners
from fastsitch.root import Root
from fastsitch.runs.inventory import find_run
from fastsitch.runs.run import Run
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.matching import match
from fastsitch.stitching.moments import SenderMoments, pair_moments
from fastsitch.vocabulary import Status
from tests.conftest import Command, save_npz
from tests.test_engine import assert_same
from tests.test_kill import contents, kill_while

CPU = torch.device("cpu")
UNIT = Unit(sender="R1111", receiver="R1112-input", setting="T2T", loss="task", seed=0)


def result_of(weight_FD: Tensor, bias_D: Tensor, accuracy: float = 0.5) -> CellResult:
    return CellResult(accuracy, 1.0, 1.0, Status.DONE, weight_FD, bias_D)


def test_pixels_survive_a_sender_that_keeps_them(fashion: Dataset, tmp_path: Path) -> None:
    """A sender that mixes the channels of coloured images, half of them clipped: matched, drawn and read from the PNG.

    The first position keeps everything, the second averages 2x2 pixels.
    """
    grey = fashion.train.images[:40, :, :, 0]
    coloured = torch.stack([grey, grey.roll(3, 1), grey.roll(5, 2)], -1)
    split = Split(coloured, fashion.train.labels[:40])
    x = fashion.normalisation.apply(coloured, torch.float64)
    torch.testing.assert_close(fashion.normalisation.invert(x), coloured.double() / 255, rtol=1e-6, atol=1e-6)
    mixing = torch.randn(4, 3, dtype=torch.float64, generator=torch_generator("mixing"))
    mixed = torch.einsum("dc,nchw->ndhw", mixing, x) + 0.3
    kept = [mixed, nn.functional.avg_pool2d(mixed, 2)]
    source = ResidentSource.from_tensors(kept, kept, split.labels, split.labels)
    expected = InputImages(split, Transform(fashion.normalisation), CPU)
    matched = match(pair_moments(SenderMoments(ResidentSplitInOrder(source)), expected))
    pixels = [
        fashion.normalisation.invert(
            generate(y[:2], result_of(matched[i, 0].weight_FD, matched[i, 0].bias_D), (3, 32, 32))
        )
        for i, y in enumerate(kept)
    ]
    coarse = nn.functional.avg_pool2d(coloured[:2].double().permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    coarse = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    shown = [coloured[:2].double(), coarse]
    for image, wanted in zip(pixels, shown, strict=True):
        torch.testing.assert_close(image, wanted / 255, rtol=0, atol=1e-5)
    generated = torch.stack(pixels).float().numpy()
    actual = (coloured[:2].float() / 255).numpy()
    pair = PairImages(
        sender="R1111",
        receiver="R1112",
        setting="T2R",
        sender_positions=("stem", "layer2.0"),
        indices=(0, 2),
        network_accuracies=(0.9, 0.1),
        images=(0, 1),
        labels=(7, 3),
        actual=actual,
        generated={"matched": generated},
        clamped={},
        results={"matched": [result_of(x, x, 0.875), result_of(x, x, float("nan"))]},
    )
    figure = images_figure(pair, "matched")
    figure.savefig(tmp_path / "grid.png", dpi=DPI)
    dots = np.rint(255 * matplotlib.image.imread(tmp_path / "grid.png")[:, :, :3]).astype(np.uint8)
    grid = image_grid(generated, actual)
    # the grid lies in the figure dot by dot: four to a pixel in both directions
    box = figure.axes[0].get_position()
    left, top = round(box.x0 * dots.shape[1]), dots.shape[0] - round(box.y1 * dots.shape[0])
    assert np.array_equal(dots[top:, left:][: 4 * len(grid), : 4 * grid.shape[1]], grid.repeat(4, 0).repeat(4, 1))
    rows, columns = tile_corners(2, 2, (32, 32))
    for s, row in enumerate(rows):
        for k, (first, second) in enumerate(columns):
            tiles = [grid[row : row + 32, start : start + 32].astype(float) for start in (first, second)]
            np.testing.assert_allclose(tiles[0], shown[s][k].numpy(), atol=0.51)
            assert np.array_equal(tiles[1], coloured[k].numpy())
    texts = [text.get_text() for text in (*figure.axes[0].texts, *figure.axes[0].get_yticklabels(), *figure.texts)]
    assert {"0.875", "diverged", "0 stem", "2 layer2.0", "test image 1, class 3"} <= set(texts)
    assert Counter(texts)["generated"] == 2
    assert "T2R: trained R1111 (0.900)  →  input of random R1112 (0.100)" in texts[-1]
    # what is not finite is grey, and tiles do not overlap
    assert (image_grid(np.full_like(generated, np.nan), actual)[:32, :32] == 128).all()
    assert (grid[32] == GAP).all()


def test_test_images_are_named_or_drawn() -> None:
    assert chosen_images(80, [3, 17, 3, 0]) == [3, 17, 0]
    drawn = chosen_images(80)
    assert len(set(drawn)) == 4
    assert chosen_images(80, count=9)[:4] == drawn
    assert chosen_images(80, seed=1) != drawn
    assert sorted(chosen_images(80, count=80)) == list(range(80))
    for options, message in (
        ({"images": [80, 3, -1]}, r"images='80,-1': expected indices of test images, from 0 to 79"),
        ({"images": []}, r"images='': expected"),
        ({"images": [1], "count": 2}, "images names the test images: leave out count"),
        ({"count": 0}, "count=0: expected a whole number from 1 to 80"),
        ({"count": 81}, "count=81: expected a whole number from 1 to 80"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            chosen_images(80, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def root(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with R1111 trained on 160 images, and runs of it into itself: ``bf`` as it comes, ``exact`` in fp64."""
    root = tmp_path_factory.mktemp("images")
    save_npz(root / "small.npz", fashion.train, fashion.test, 160, 80)
    fastsitch.train("R1111", dataset=f"npz:{root / 'small.npz'}", width=4, epochs=2, root=root)
    options = {"root": root, "recipe": "small", "epochs": 1, "batch_size": 16}
    fastsitch.sweep("R1111", "R1111", settings=["T2T", "R2T"], run="bf", **options)  # type: ignore[arg-type]
    fastsitch.sweep("R1111", "R1111", settings=["T2T", "R2T"], run="full", precision="fp32", **options)  # type: ignore[arg-type]
    fastsitch.sweep("R1111", "R1111", run="exact", precision="fp64", init="matched", **options)  # type: ignore[arg-type]
    return root


def run_of(root: Path, name: str) -> Run:
    return find_run(Root.at(root), name)


@pytest.mark.slow
def test_images_and_accuracies_are_those_of_the_saved_stitches(root: Path, tmp_path: Path) -> None:
    """Rebuilt from the files alone with plain modules."""
    run = run_of(root, "full")
    paths = fastsitch.images("full", images=[3, 17], out=tmp_path, root=root)
    variants = ("vanilla", "matched")
    assert [path.name for path in paths] == [
        f"R1111--R1111.{setting}.{variant}.png" for setting in ("T2T", "R2T") for variant in variants
    ]
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.with_suffix(".pdf").read_bytes()[:5] == b"%PDF-"
    data = load_dataset(run.config.dataset, root)
    folder = Root.at(root).models(run.config.dataset)
    receiver = load_network(folder, NetworkName.parse("R1111"))
    normalisation = receiver.record.normalisation
    x = normalisation.apply(data.test.images)
    mean, std = (np.array(values) for values in (normalisation.mean, normalisation.std))
    for setting, name in (("T2T", "R1111"), ("R2T", "R1111-random@0")):
        sender = load_network(folder, NetworkName.parse(name)).chain
        store = ActivationStore.open(Root.at(root).store(run.config.dataset, NetworkName.parse(name)))
        with np.load(tmp_path / f"R1111--R1111.{setting}.npz", allow_pickle=False) as file:
            arrays = dict(file)
        assert arrays["images"].tolist() == [3, 17]
        assert arrays["labels"].tolist() == data.test.labels[[3, 17]].tolist()
        np.testing.assert_array_equal(np.rint(255 * arrays["actual"]), data.test.images[[3, 17]].numpy())
        weights = load_file(run.path / "images" / "units" / f"R1111--R1111-input.{setting}.task.seed0.safetensors")
        for variant in variants:
            assert arrays[variant].shape == (5, 2, 32, 32, 3)
            assert arrays[f"{variant}_status"].tolist() == [1] * 5
            for i in range(5):
                with torch.no_grad():
                    provided = sender.representations(x)[i]
                    provided = nn.functional.interpolate(provided, scale_factor=32 // provided.shape[2])
                    weight, bias = (weights[f"{variant}.{i}.{part}"].float() for part in ("weight", "bias"))
                    stitched = nn.functional.conv2d(provided, conv_weight(weight, 1), bias)
                    logits = receiver.chain(stitched)
                accuracy = (logits.argmax(-1) == data.test.labels).double().mean().item()
                assert abs(accuracy - arrays[f"{variant}_accuracy"][i]) <= 2.5 / 80
                pixels = stitched[[3, 17]].permute(0, 2, 3, 1).numpy() * std + mean
                np.testing.assert_allclose(arrays[variant][i], pixels.clip(0, 1), atol=0.03)
                # of what the store holds: its rounding decides which pixels at the edge are clamped
                stored = store.read("test", i, 0, len(data.test)).float().permute(0, 3, 1, 2)[[3, 17]]
                stored = nn.functional.interpolate(stored, scale_factor=32 // stored.shape[2])
                pixels = (
                    nn.functional.conv2d(stored, conv_weight(weight, 1), bias).permute(0, 2, 3, 1).numpy() * std + mean
                )
                outside = float(((pixels < 0) | (pixels > 1)).mean())
                assert arrays[f"{variant}_clamped"][i] == pytest.approx(outside, abs=0.05)
            # whatever was clamped is now black or white to the bit
            extreme = ((arrays[variant] == 0) | (arrays[variant] == 1)).mean((1, 2, 3, 4))
            np.testing.assert_allclose(arrays[f"{variant}_clamped"], extreme, atol=1e-3)
        # least squares overshoots the black around the object
        assert arrays["matched_clamped"].max() > 0.05
        assert arrays["matched"].min() == 0
    # nothing is as close to the image as what was fitted to it
    errors = {v: np.square(arrays[v] - arrays["actual"]).mean((1, 2, 3, 4)) for v in variants}
    assert (errors["matched"] < errors["vanilla"]).all()


@pytest.mark.slow
def test_no_group_is_larger_than_memory_allows(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouping changes nothing either; with the matched start of the run."""
    run, sizes = run_of(root, "exact"), []
    train = train_input_stitches.train_in_groups

    def spy(cells: list[Cell], size: int, *others: object) -> object:
        sizes.append(size)
        return train(cells, size, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(train_input_stitches, "train_in_groups", spy)
    pairs = []
    for memory in ("auto", "106MB", "30MB"):
        pairs += run_images(Root.at(root), run, memory=memory)
        for path in (run.path / "images" / "units").iterdir():
            path.unlink()
    assert sizes[0] == 5
    assert 1 < sizes[2] < 5
    assert sizes[4:] == [1, 1]
    for other in pairs[1:]:
        for variant in ("vanilla", "matched"):
            for one, two in zip(pairs[0].results[variant], other.results[variant], strict=True):
                assert_same(one, two)
            np.testing.assert_allclose(pairs[0].generated[variant], other.generated[variant], atol=1e-6)


@pytest.mark.slow
def test_finished_units_are_kept_and_damaged_ones_made_again(root: Path, tmp_path: Path, run_cli: Command) -> None:
    run = run_of(root, "bf")
    units = run.path / "images" / "units"
    for path in units.glob("*"):
        path.unlink()
    line = ["images", "bf", "--root", root, "--images", "3,17"]
    first = run_cli(*line, "--settings", "T2T")
    assert first.returncode == 0, first.stderr
    assert re.search(r"images/R1111--R1111\.T2T\.vanilla\.png and R1111--R1111\.T2T\.vanilla\.pdf\n", first.stdout)
    assert (run.path / "images" / "R1111--R1111.T2T.npz").is_file()
    assert len(list(units.iterdir())) == 2
    second = run_cli(*line, "--out", tmp_path / "out")
    assert second.returncode == 0, second.stderr
    assert len(list((tmp_path / "out").iterdir())) == 10
    whole = contents(units)
    assert len(whole) == 4
    times = {path: path.stat().st_mtime_ns for path in units.iterdir()}
    # other images need no training
    third = run_cli("images", "bf", "--root", root, "--count", "2", "--seed", "5", "--out", tmp_path / "others")
    assert third.returncode == 0, third.stderr
    assert times == {path: path.stat().st_mtime_ns for path in units.iterdir()}
    with np.load(tmp_path / "others" / "R1111--R1111.T2T.npz") as file:
        assert file["images"].tolist() == chosen_images(80, count=2, seed=5)
    npz, foreign = (units / f"R1111--R1111-input.{setting}.task.seed0.npz" for setting in ("T2T", "R2T"))
    stitches = npz.with_suffix(".safetensors")
    for damage, said in (
        (lambda: npz.write_bytes(whole[npz.name][:200]), r"seed0\.npz is damaged"),
        (lambda: stitches.write_bytes(whole[stitches.name][:-4] + b"oops"), "does not hold the stitches that were"),
        (lambda: stitches.unlink(), r"seed0\.npz is damaged"),
        (
            lambda: (
                npz.write_bytes(whole[foreign.name]),
                stitches.write_bytes(whole[foreign.with_suffix(".safetensors").name]),
            ),
            "belongs to another run or other networks",
        ),
    ):
        damage()
        again = run_cli(*line, "--out", tmp_path / "again")
        assert again.returncode == 0, again.stderr
        assert re.search(said, again.stderr)
        assert contents(units) == whole
    assert contents(tmp_path / "again")["R1111--R1111.T2T.npz"] == contents(tmp_path / "out")["R1111--R1111.T2T.npz"]


@pytest.mark.kill
def test_images_survive_a_kill(root: Path, tmp_path: Path, run_cli: Command) -> None:
    run = run_of(root, "bf")
    units = run.path / "images" / "units"
    line: list[str | Path] = ["images", "bf", "--root", root, "--out", tmp_path / "out"]
    assert run_cli(*line).returncode == 0
    whole = contents(units)
    for path in units.iterdir():
        path.unlink()
    first = units / f"{input_unit(run.units[0]).name}.npz"
    assert kill_while(line, tmp_path, first, 0.0)
    assert contents(units)[first.name] == whole[first.name]
    ended = run_cli(*line)
    assert ended.returncode == 0, ended.stderr
    assert contents(units).items() >= whole.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "80"], r"--images 80: expected indices of test images, from 0 to 79"),
        (["--images", "3,x"], r"--images 3,x: expected whole numbers separated by commas"),
        (["--images", "3", "--seed", "1"], "--images names the test images: leave out --count and --seed"),
        (["--count", "0"], "--count 0: expected a whole number from 1 to 80"),
        (["--senders", "R2222"], "run 'bf' has no sender R2222: expected some of R1111"),
        (["--settings", "T2R"], "run 'bf' has no setting T2R: expected some of T2T, R2T"),
        (["--receivers", "nonsense"], "run 'bf' has no receiver nonsense: expected some of R1111"),
        (["--memory", "much"], "--memory much: expected auto or a size"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    options: list[str], message: str, root: Path, run_cli: Command
) -> None:
    ended = run_cli("images", "bf", "--root", root, *options)
    assert ended.returncode == 2
    assert re.fullmatch(rf"fastsitch: {re.escape(message)}[^\n]*\n", ended.stderr)
    assert not ended.stdout


def test_networks_and_data_that_changed_since_the_run_are_refused(fashion: Dataset, tmp_path: Path) -> None:
    save_npz(tmp_path / "small.npz", fashion.train, fashion.test, 160, 80)
    train = {"dataset": f"npz:{tmp_path / 'small.npz'}", "width": 2, "root": tmp_path}
    fastsitch.train("R1111", epochs=1, **train)  # type: ignore[arg-type]
    run = fastsitch.sweep("R1111", "R1111", run="old", root=tmp_path, batch_size=16, loss="match")
    fastsitch.train("R1111", epochs=2, force=True, **train)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="R1111 is not what run 'old' began with: it was trained again"):
        fastsitch.images("old", root=tmp_path)
    save_npz(tmp_path / "small.npz", fashion.train, fashion.test, 161, 80)
    with pytest.raises(RunError, match="the data set has changed since run 'old' began"):
        fastsitch.images("old", root=tmp_path)
    assert not (run.path / "images").exists()
