"""Matched stitches are the least-squares optimum, in every geometry, and need no training."""

import copy
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastsitch
from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.ordered_split import ResidentSplitInOrder
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.chains.chain import Chain
from fastsitch.data import Dataset
from fastsitch.errors import ConfigError, RunError
from fastsitch.execution import matched_stitches as matched_module
from fastsitch.identity import torch_generator
from fastsitch.kernels import space_to_depth
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.stitching import moments as moments_module
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.engine import evaluate_matched, train_group
from fastsitch.stitching.matching import RIDGE, match
from fastsitch.stitching.moments import CellMoments, SenderMoments, pair_moments
from fastsitch.stitching.recipe import TrainingRecipe
from fastsitch.vocabulary import Status
from tests.conftest import network, save_npz

CPU = torch.device("cpu")
UNIT = Unit(sender="R1111", receiver="R1112", setting="T2T", loss="match", seed=0)
IMAGES = 150
"""Training images: two chunks and a part of one; at 1x1 after k = 8 still more rows than inputs."""

KINDS = {"equal": (0, 0), "down 2": (0, 2), "down 4": (1, 3), "down 8": (0, 4), "up 2": (2, 1), "up 4": (3, 0)} | {
    "up 8": (4, 1)
}


def source_of(chain: Chain, data: Dataset, train: int = IMAGES, test: int = 40) -> ResidentSource:
    frozen = FrozenNetwork(chain, dtype=torch.float64, device=CPU)
    splits = [
        frozen.representations(data.normalisation.apply(split.images[:count], torch.float64))
        for split, count in ((data.train, train), (data.test, test))
    ]
    return ResidentSource.from_tensors(*splits, data.train.labels[:train], data.test.labels[:test])


def moments_of(sender: ResidentSource, receiver: ResidentSource) -> dict[tuple[int, int], CellMoments]:
    return pair_moments(SenderMoments(ResidentSplitInOrder(sender)), ResidentSplitInOrder(receiver))


def rows_of(moments: CellMoments, x_NHWC: Tensor, y_NPQD: Tensor) -> tuple[Tensor, Tensor]:
    """One row of inputs and of expected values per receiver cell: no sums, no symmetry, nothing shared."""
    up = moments.geometry.up
    provided = space_to_depth(x_NHWC, moments.geometry.down)
    return provided.repeat_interleave(up, 1).repeat_interleave(up, 2).flatten(0, 2), y_NPQD.flatten(0, 2)


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


class Pair:
    """R1111 into R1112, untrained, on real images."""

    def __init__(self, data: Dataset) -> None:
        self.chains = (network("R1111"), network("R1112", seed=1))
        self.sender, self.receiver = (source_of(chain, data) for chain in self.chains)
        self.moments = moments_of(self.sender, self.receiver)
        self.matched = match(self.moments)

    def rows(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        x, y = (
            ResidentSplitInOrder(source).images(position, 0, IMAGES)
            for source, position in ((self.sender, i), (self.receiver, j))
        )
        return rows_of(self.moments[i, j], x, y)


@pytest.fixture(scope="module")
def pair(fashion: Dataset) -> Pair:
    return Pair(fashion)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matched_stitch_is_the_least_squares_solution(kind: str, pair: Pair) -> None:
    cell = KINDS[kind]
    assert pair.moments[cell].geometry.kind == kind
    x, y = pair.rows(*cell)
    solution = torch.linalg.lstsq(with_one(x), y, driver="gelsd").solution
    stitch = pair.matched[cell]
    # the ridge moves the weights along directions that hardly occur in the data, never the outputs
    torch.testing.assert_close(x @ stitch.weight_FD + stitch.bias_D, with_one(x) @ solution, rtol=1e-6, atol=1e-6)
    assert stitch.error == pytest.approx((with_one(x) @ solution - y).square().mean().item(), rel=1e-9)
    # with the ridge written out as rows, the weights themselves agree
    centred = x - x.mean(0)
    scale = centred.square().mean(0).sqrt()
    # channels that are dead in these networks get weight 0 from their ridge row
    scale[scale == 0] = 1
    scaled = centred / scale
    ridge = torch.eye(x.shape[1], dtype=x.dtype) * (RIDGE * len(x)) ** 0.5
    padded = torch.cat([y - y.mean(0), torch.zeros(x.shape[1], y.shape[1], dtype=y.dtype)])
    exact = torch.linalg.lstsq(torch.cat([scaled, ridge]), padded).solution / scale[:, None]
    torch.testing.assert_close(stitch.weight_FD, exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_any_stitch_follows_from_the_moments(kind: str, pair: Pair) -> None:
    cell = KINDS[kind]
    x, y = pair.rows(*cell)
    moments, matched = pair.moments[cell], pair.matched[cell]
    generator = torch_generator("stitches", kind)
    random = [
        (torch.randn(x.shape[1], y.shape[1], generator=generator), torch.randn(y.shape[1], generator=generator))
        for _ in range(2)
    ]
    outputs = []
    for weight, bias in ((matched.weight_FD, matched.bias_D), *random):
        outputs.append(x @ weight.double() + bias.double())
        direct = (outputs[-1] - y).square().mean().item()
        assert abs(moments.error(weight, bias) - direct) <= 1e-6 * max(direct, y.square().mean().item())
    assert matched.error == moments.error(matched.weight_FD, matched.bias_D)
    between = moments.distance((matched.weight_FD, matched.bias_D), random[0])
    assert between == pytest.approx((outputs[0] - outputs[1]).square().mean().item(), rel=1e-9)


def test_no_stitch_is_better_on_the_training_images(pair: Pair) -> None:
    model = FrozenNetwork(pair.chains[1], dtype=torch.float64, device=CPU)
    recipe = TrainingRecipe(name="small", epochs=1, batch_size=50, lr=0.01, momentum=0.9, weight_decay=0.01)
    start = {Cell(UNIT, *cell): matched for cell, matched in pair.matched.items()}
    trained = train_group(model, pair.sender, list(start), recipe, ImageOrder(seed=0), init=start)
    generator = torch_generator("perturbations")
    for (i, j), matched in pair.matched.items():
        moments = pair.moments[i, j]
        slack = 1e-8 * (moments.scatter_D.sum().item() / moments.elements)
        step = torch.randn(matched.weight_FD.shape, generator=generator, dtype=torch.float64)
        for size in (1e-4, 1e-2):
            changed = matched.weight_FD + size * step
            assert moments.error(changed, matched.bias_D) > matched.error - slack
            assert moments.error(matched.weight_FD, matched.bias_D + size) > matched.error
        result = trained[Cell(UNIT, i, j)]
        assert moments.error(result.weight_FD, result.bias_D) > matched.error
        assert result.matched_error == matched.error


def test_a_network_matched_to_itself_reproduces_its_logits(fashion: Dataset) -> None:
    chain = network("R1112")
    source = source_of(chain, fashion)
    matched = match(moments_of(source, source))
    x = fashion.normalisation.apply(fashion.test.images[:20], torch.float64)
    representations = chain.representations(x)
    for position in chain.positions:
        j = position.index
        stitch = matched[j, j]
        assert stitch.error <= 1e-12 * representations[j].square().mean().item()
        weight = stitch.weight_FD.T[:, :, None, None]
        stitched = nn.functional.conv2d(representations[j].detach(), weight, stitch.bias_D)
        torch.testing.assert_close(chain.tail(stitched, j), chain(x), rtol=1e-5, atol=1e-5)
    cells = {Cell(UNIT, j, j): matched[j, j] for j in range(len(chain.positions))}
    results = evaluate_matched(FrozenNetwork(chain, dtype=torch.float64, device=CPU), source, cells, images=64)
    predicted = chain(fashion.normalisation.apply(fashion.test.images[:40], torch.float64)).argmax(-1)
    accuracy = (predicted == fashion.test.labels[:40]).double().mean().item()
    assert {result.accuracy for result in results.values()} == {accuracy}


def test_dead_constant_and_repeated_channels_are_handled(pair: Pair) -> None:
    """Inputs that do not vary get weight 0; a channel that occurs twice, exactly, makes the system singular."""
    sender = ResidentSplitInOrder(pair.sender)
    spoilt, clean = [], []
    for i in range(len(sender.shapes)):
        x = sender.images(i, 0, IMAGES).permute(0, 3, 1, 2).clone()
        x[:, 0] = 0.0
        x[:, 1] = 3.7
        clean.append(x[:, 2:])
        spoilt.append(torch.cat([x, x[:, 2:3]], 1))
    labels = pair.sender.train.labels
    with_spoilt, without = (ResidentSource.from_tensors(x, x, labels, labels) for x in (spoilt, clean))
    found = moments_of(with_spoilt, pair.receiver)
    expected = match(moments_of(without, pair.receiver))
    # with the ridge Cholesky gets through; without it, rounding decides and the eigenvectors take over
    for ridge in (RIDGE, 0.0):
        matched = match(found, ridge)
        for cell, stitch in matched.items():
            geometry = found[cell].geometry
            weight = stitch.weight_FD.view(geometry.down**2, geometry.sender[0], -1)
            assert stitch.weight_FD.isfinite().all()
            assert (weight[:, :2] == 0).all()
            assert stitch.error == pytest.approx(expected[cell].error, rel=1e-6)
            if ridge:
                torch.testing.assert_close(weight[:, 2], weight[:, -1], rtol=1e-3, atol=1e-5)


def test_fewer_rows_than_inputs_are_fitted_as_well_as_can_be(fashion: Dataset) -> None:
    """48 rows for 256 inputs: the system is singular, the error is that of any least-squares solution."""
    sender, receiver = (source_of(network(name), fashion, train=3) for name in ("R1111", "R1112"))
    cell = (0, 4)
    moments = moments_of(sender, receiver)[cell]
    x, y = (ResidentSplitInOrder(source).images(p, 0, 3) for source, p in ((sender, 0), (receiver, 4)))
    x, y = rows_of(moments, x, y)
    assert x.shape == (48, 256)
    solution = torch.linalg.lstsq(with_one(x), y, driver="gelsd").solution
    least = (with_one(x) @ solution - y).square().mean().item()
    for ridge in (RIDGE, 0.0):
        stitch = match({cell: moments}, ridge)[cell]
        assert stitch.method == ("cholesky" if ridge else "eigen")
        assert stitch.error == pytest.approx(least, rel=1e-6, abs=1e-9 * y.square().mean().item())


def test_values_that_are_not_finite_affect_only_their_cells(fashion: Dataset, pair: Pair) -> None:
    source = copy.copy(pair.sender)
    spoilt = [ResidentSplitInOrder(source).images(i, 0, IMAGES).permute(0, 3, 1, 2).clone() for i in range(5)]
    spoilt[2][7, 1, 3, 3] = float("nan")
    labels = source.train.labels
    source.train = ResidentSource.from_tensors(spoilt, spoilt, labels, labels).train
    matched = match(moments_of(source, pair.receiver))
    cells = {Cell(UNIT, i, j): stitch for (i, j), stitch in matched.items()}
    results = evaluate_matched(
        FrozenNetwork(pair.chains[1], dtype=torch.float64, device=CPU), pair.sender, cells, images=64
    )
    for cell, result in results.items():
        assert result.status == (Status.DIVERGED if cell.i == 2 else Status.DONE)
        if cell.i != 2:
            assert torch.equal(result.weight_FD, pair.matched[cell.i, cell.j].weight_FD)


def test_moments_of_the_inputs_are_computed_once_for_all_receivers(pair: Pair) -> None:
    sender = SenderMoments(ResidentSplitInOrder(pair.sender))
    first = pair_moments(sender, ResidentSplitInOrder(pair.receiver))
    # sender sizes 32, 32, 16, 8, 4 into receiver sizes 32, 32, 16, 8, 4, 4: ratios 1, 2, 4 and 8 where they fit
    assert sender.passes == 4 + 4 + 3 + 2 + 1
    again = pair_moments(sender, ResidentSplitInOrder(pair.receiver))
    pair_moments(sender, ResidentSplitInOrder(pair.sender))
    assert sender.passes == 14
    for cell, moments in first.items():
        assert moments.inputs is again[cell].inputs
        # the second receiver's numbers do not depend on whether it was the first
        assert torch.equal(moments.cross_FD, again[cell].cross_FD)


def test_moments_at_small_ratios_follow_from_those_at_the_largest(pair: Pair) -> None:
    """They agree with those that are accumulated where no larger ratio is asked for, and are symmetric to the bit."""
    receiver, labels = ResidentSplitInOrder(pair.receiver), pair.receiver.train.labels
    largest = {0: 8, 1: 8, 2: 4, 3: 2, 4: 1}
    derived = 0
    for j in range(len(receiver.shapes)):
        alone = [receiver.images(j, 0, IMAGES).permute(0, 3, 1, 2)]
        direct = moments_of(pair.sender, ResidentSource.from_tensors(alone, alone, labels, labels))
        for i, most in largest.items():
            found, wanted = pair.moments[i, j].inputs, direct[i, 0].inputs
            assert found.rows == wanted.rows
            torch.testing.assert_close(found.mean_F, wanted.mean_F, rtol=1e-13, atol=1e-14)
            size = wanted.scatter_FF.diagonal().max().item()
            torch.testing.assert_close(found.scatter_FF, wanted.scatter_FF, rtol=1e-13, atol=1e-13 * size)
            assert torch.equal(found.scatter_FF, found.scatter_FF.T)
            derived += pair.moments[i, j].geometry.down < most
    assert derived == 16


def test_little_memory_takes_more_passes_to_the_same_bits(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "_STATISTICS_BYTES", 40_000)
    done: list[int] = []
    sender = SenderMoments(ResidentSplitInOrder(pair.sender))
    few = pair_moments(sender, ResidentSplitInOrder(pair.receiver), lambda progress: done.append(progress.total))
    assert done[0] > 2 * IMAGES
    for cell, moments in pair.moments.items():
        assert torch.equal(moments.cross_FD, few[cell].cross_FD)
        assert torch.equal(moments.inputs.scatter_FF, few[cell].inputs.scatter_FF)
        assert torch.equal(moments.scatter_D, few[cell].scatter_D)


def test_networks_on_other_images_are_refused(fashion: Dataset, pair: Pair) -> None:
    chain = network("R1111")
    sender = SenderMoments(ResidentSplitInOrder(pair.sender))
    with pytest.raises(ConfigError, match="the sender has 150 images, the receiver 149"):
        pair_moments(sender, ResidentSplitInOrder(source_of(chain, fashion, train=149)))
    other = source_of(chain, fashion)
    other.train.labels = other.train.labels.flip(0)
    with pytest.raises(ConfigError, match="the labels of sender and receiver differ"):
        pair_moments(sender, ResidentSplitInOrder(other))
    other.train.labels = pair.sender.train.labels
    other.train.ids = other.train.ids + 1
    with pytest.raises(ConfigError, match="the ids of sender and receiver differ"):
        pair_moments(sender, ResidentSplitInOrder(other))


def test_training_starts_at_the_matched_stitch(pair: Pair) -> None:
    model = FrozenNetwork(pair.chains[1], dtype=torch.float64, device=CPU)
    # so small a rate changes no bit
    still = TrainingRecipe(name="small", epochs=1, batch_size=50, lr=1e-30, momentum=0.9, weight_decay=0.01)
    start = {Cell(UNIT, *cell): stitch for cell, stitch in pair.matched.items()}
    trained = train_group(model, pair.sender, list(start), still, ImageOrder(seed=0), init=start)
    for cell, result in evaluate_matched(model, pair.sender, start, images=64).items():
        assert torch.equal(result.weight_FD, start[cell].weight_FD)
        assert torch.equal(trained[cell].weight_FD, result.weight_FD)
        assert (trained[cell].accuracy, trained[cell].loss) == (result.accuracy, result.loss)
        assert result.train_loss == start[cell].error


@pytest.fixture(scope="module")
def root(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with R1111 and R1112 of width 8 trained on 2,000 images."""
    folder = tmp_path_factory.mktemp("matching")
    save_npz(folder / "small.npz", fashion.train, fashion.test, 2000, 400)
    fastsitch.train("R1111", "R1112", dataset=f"npz:{folder / 'small.npz'}", width=8, epochs=3, root=folder)
    return folder


@pytest.mark.slow
def test_a_matching_sweep_is_saved_resumed_and_exported(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pairs: list[int] = []

    def counted(sender: SenderMoments, *rest: object) -> dict[tuple[int, int], CellMoments]:
        found = pair_moments(sender, *rest)  # type: ignore[arg-type]
        pairs.append(sender.passes)
        return found

    monkeypatch.setattr(matched_module, "pair_moments", counted)
    options = {"loss": "match", "seeds": [0, 1], "root": root, "run": "matched"}
    with caplog.at_level(logging.INFO):
        run = fastsitch.sweep(["R1111"], ["R1112", "R1111"], **options)
    assert "R1112 has no activation store yet: making" in caplog.text
    assert "R1111 matched to R1112: ridge 1e-10, 30 by cholesky" in caplog.text
    # two receivers, two seeds: two pairs, and the sender's own moments once
    assert pairs == [14, 14]
    assert sorted(path.name for path in (run.path / "units").glob("*.npz")) == [
        f"R1111--{receiver}.T2T.match.seed{seed}.npz" for receiver in ("R1111", "R1112") for seed in (0, 1)
    ]
    error = run.matrix("R1111", "R1112", "matched_error")
    assert np.array_equal(error, run.matrix("R1111", "R1112", "train_loss"))
    assert (error > 0).all()
    assert (run.matrix("R1111", "R1112", "status") == 1).all()
    itself = run.matrix("R1111", "R1111", "accuracy_drop")
    assert np.abs(itself.diagonal()).max() <= 0.01
    for name in ("npz", "safetensors"):
        (run.path / "units" / f"R1111--R1112.T2T.match.seed1.{name}").unlink()
    resumed = fastsitch.sweep(["R1111"], ["R1112", "R1111"], **options)
    assert pairs == [14, 14, 14]
    for metric in resumed.metrics:
        by_seed = resumed.matrix_by_seed("R1111", "R1112", metric)
        assert np.array_equal(by_seed[0], by_seed[1])
    fastsitch.export_run(resumed, tmp_path)
    with np.load(tmp_path / "R1111--R1112.T2T.npz", allow_pickle=False) as file:
        assert np.array_equal(file["matched_error"], error)
    sidecar = json.loads((tmp_path / "R1111--R1112.T2T.json").read_text())
    assert (sidecar["loss"], sidecar["matching"]) == ("match", {"solver": "exact", "ridge": RIDGE})
    # a receiver's store in another precision is another input
    fastsitch.precompute("R1112", dtype="fp16", force=True, root=root)
    (run.path / "units" / "R1111--R1112.T2T.match.seed1.npz").unlink()
    with pytest.raises(RunError, match=r"R1111--R1112\.T2T\.match\.seed0 .* another store than .*R1112 \(fp16"):
        fastsitch.sweep(["R1111"], ["R1112", "R1111"], **options)
    fastsitch.precompute("R1112", force=True, root=root)


@pytest.mark.slow
def test_one_epoch_from_the_matched_start_beats_one_from_the_default(root: Path) -> None:
    means = {}
    for init in ("matched", "default"):
        run = fastsitch.sweep(["R1111"], ["R1112"], recipe="small", epochs=1, init=init, root=root, run=f"from-{init}")
        means[init] = run.matrix("R1111", "R1112").mean()
        assert ("matched_error" in run.metrics) == (init == "matched")
    assert (run.path.parent / "from-matched" / "units" / "R1111--R1112.T2T.task.seed0.npz").is_file()
    assert means["matched"] > means["default"] + 0.02
