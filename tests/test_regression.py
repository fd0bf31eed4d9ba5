"""Matched stitches by training: the result of a plain loop for any grouping, never better than the exact solution."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsitch
from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.ordered_split import ResidentSplitInOrder
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.data import Dataset
from fastsitch.errors import ConfigError, RunError
from fastsitch.kernels.reference import conv_weight
from fastsitch.planning import sweep_estimate as estimates
from fastsitch.planning.group_memory import StepKind, group_memory
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.root import Root
from fastsitch.runs.sweep_config import sweep_config
from fastsitch.stitching.cell_result import CellResult
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.stitching.geometry import Geometry
from fastsitch.stitching.matching import match
from fastsitch.stitching.moments import SenderMoments, pair_moments
from fastsitch.stitching.recipe import TrainingRecipe
from fastsitch.stitching.regression import Regression, regress_group
from fastsitch.stitching.stitch_bank import StitchBank, initial_stitch
from fastsitch.stitching.stitch_schedule import stitch_schedule
from fastsitch.vocabulary import Status
from tests.conftest import Command, network, save_npz
from tests.test_engine import all_cells, assert_same, frozen, source_of
from tests.test_memory import KIND, cells, shapes

CPU = torch.device("cpu")
UNIT = Unit(sender="R1111", receiver="R1112", setting="T2T", loss="match", seed=0)
RECIPE = TrainingRecipe(name="small", epochs=2, batch_size=8, lr=0.01, momentum=0.9, weight_decay=0.01)
ORDER = ImageOrder(seed=0, block=8, window=16)


class Pair:
    """R1111 into R1112, untrained, on real images, in fp64."""

    def __init__(self, data: Dataset) -> None:
        self.sender, self.receiver = network("R1111"), network("R1112", seed=1)
        self.model = frozen(self.receiver)
        self.source, self.expected = (source_of(chain, data) for chain in (self.sender, self.receiver))
        self.cells = all_cells(self.sender, self.receiver, UNIT)
        self.trained = self.train(self.cells)

    def train(self, cells: list[Cell], recipe: TrainingRecipe = RECIPE) -> dict[Cell, CellResult]:
        return regress_group(self.model, self.source, self.expected, cells, recipe, ORDER)

    def geometry(self, cell: Cell) -> Geometry:
        return Geometry.between(self.sender.positions[cell.i].shape, self.receiver.positions[cell.j].shape)


@pytest.fixture(scope="module")
def pair(fashion: Dataset) -> Pair:
    return Pair(fashion)


@pytest.mark.parametrize(
    ("i", "j", "kind"),
    [
        (0, 0, "equal"),
        (0, 2, "down 2"),
        (1, 3, "down 4"),
        (0, 4, "down 8"),
        (2, 1, "up 2"),
        (3, 0, "up 4"),
        (4, 1, "up 8"),
    ],
)
def test_a_group_trains_a_stitch_as_a_plain_loop_does(i: int, j: int, kind: str, pair: Pair, fashion: Dataset) -> None:
    cell = Cell(UNIT, i, j)
    geometry = pair.geometry(cell)
    assert geometry.kind == kind
    weight, bias = initial_stitch(cell, geometry)
    conv = nn.Conv2d(geometry.sender[0], geometry.receiver[0], geometry.down, stride=geometry.down).double()
    conv.weight.data.copy_(weight)
    conv.bias.data.copy_(bias)
    stitch = nn.Sequential(nn.Upsample(scale_factor=geometry.up), conv) if geometry.up > 1 else conv
    train, test = (
        fashion.normalisation.apply(split.images[:count], torch.float64)
        for split, count in ((fashion.train, 24), (fashion.test, 10))
    )
    with torch.no_grad():
        provided, wanted = pair.sender.representations(train)[i], pair.receiver.representations(train)[j]
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    schedule = stitch_schedule("small", peak=0.01, epochs=2, steps_per_epoch=3)
    losses: list[float] = []
    for epoch in range(2):
        for index in ORDER.epoch(epoch, 24).split(8):
            loss = F.mse_loss(stitch(provided[index]), wanted[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = schedule.rate(len(losses))
            optimizer.step()
            losses.append(loss.item())
    result = pair.trained[cell]
    torch.testing.assert_close(conv_weight(result.weight_FD, geometry.down), conv.weight.data, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(result.bias_D, conv.bias.data, rtol=1e-9, atol=1e-11)
    assert (conv.weight.data - weight).abs().max() > 1e-4
    assert result.train_loss == pytest.approx(sum(losses[3:]) / 3, rel=1e-9)
    with torch.no_grad():
        logits = pair.receiver.tail(stitch(pair.sender.representations(test)[i]), j)
    assert result.accuracy == (logits.argmax(-1) == fashion.test.labels[:10]).double().mean().item()
    assert result.loss == pytest.approx(F.cross_entropy(logits, fashion.test.labels[:10]).item(), rel=1e-9)


def test_any_grouping_trains_every_stitch_to_the_same_weights(pair: Pair) -> None:
    alone = {}
    for cell in pair.cells:
        alone |= pair.train([cell])
    halves = pair.train(pair.cells[1::2]) | pair.train(pair.cells[::2])
    for cell in pair.cells:
        assert_same(pair.trained[cell], alone[cell])
        assert_same(pair.trained[cell], halves[cell])


def test_training_approaches_the_exact_solution_and_never_passes_it(pair: Pair) -> None:
    """In every cell, on the training images; enough epochs come close to it."""
    moments = pair_moments(SenderMoments(ResidentSplitInOrder(pair.source)), ResidentSplitInOrder(pair.expected))
    exact = match(moments)
    calm = TrainingRecipe(name="small", epochs=60, batch_size=24, lr=0.003, momentum=0.9, weight_decay=0.0)
    longer = pair.train(pair.cells, calm)
    gained = []
    for cell in pair.cells:
        cell_moments, least = moments[cell.i, cell.j], exact[cell.i, cell.j].error
        weight, bias = initial_stitch(cell, pair.geometry(cell))
        begun = cell_moments.error(weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]), bias)
        short, long = (
            cell_moments.error(result[cell].weight_FD, result[cell].bias_D) for result in (pair.trained, longer)
        )
        slack = 1e-8 * cell_moments.scatter_D.sum().item() / cell_moments.elements
        assert least - slack <= long < begun
        assert least - slack <= short
        gained.append((begun - long) / (begun - least))
    assert min(gained) > 0.7


def test_a_diverging_stitch_leaves_the_others_unchanged(pair: Pair, fashion: Dataset) -> None:
    spoilt = source_of(pair.sender, fashion)
    spoilt.train._stacks[(8, 16, 16)].mul_(1e300)
    wild = regress_group(pair.model, spoilt, pair.expected, pair.cells, RECIPE, ORDER)
    for cell in pair.cells:
        assert wild[cell].status == (Status.DIVERGED if cell.i == 2 else Status.DONE)
        if cell.i != 2:
            assert torch.equal(wild[cell].weight_FD, pair.trained[cell].weight_FD)


def test_networks_on_other_images_are_refused(pair: Pair, fashion: Dataset) -> None:
    fewer = source_of(pair.receiver, fashion, train=23)
    with pytest.raises(ConfigError, match="the sender has 24 images, the receiver 23"):
        regress_group(pair.model, pair.source, fewer, pair.cells, RECIPE, ORDER)
    other = source_of(pair.receiver, fashion)
    other.train.labels = other.train.labels.flip(0)
    with pytest.raises(ConfigError, match="the labels of sender and receiver differ"):
        regress_group(pair.model, pair.source, other, pair.cells, RECIPE, ORDER)


@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_a_step_runs_without_hardware_and_without_synchronising(kernel: str) -> None:
    """On the meta device every .item(), data-dependent branch or tensor left elsewhere is an error."""
    meta = torch.device("meta")
    chains = network("R1111"), network("R1112", seed=1)
    images, labels = torch.empty(12, 3, 32, 32, device=meta), torch.empty(12, dtype=torch.int64, device=meta)
    sources = []
    for chain in chains:
        values = FrozenNetwork(chain, dtype=torch.bfloat16, device=meta).representations(images)
        sources.append(ResidentSource.from_tensors(values, values, labels, labels))
    bank = StitchBank(
        all_cells(*chains, UNIT),
        sources[0].shapes,
        sources[1].shapes,
        dtype=torch.bfloat16,
        device=meta,
        kernel=kernel,
    )
    optimizer = torch.optim.SGD([bank.parameters], lr=0.01, momentum=0.9, weight_decay=0.01)
    index = torch.empty(8, dtype=torch.int64, device=meta)
    batches = [source.train.batch(index) for source in sources]
    loss = Regression(bank, sources[1].shapes, 8).step(*batches, optimizer)
    assert (loss.shape, loss.device, loss.dtype) == ((30,), meta, torch.float32)


def test_the_published_solver_trains_thirty_epochs_by_default() -> None:
    options: dict[str, Any] = {"dataset": "cifar10", "senders": "R1111", "receivers": "R1112", "loss": "match"}
    config = sweep_config(**options, solver="sgd")
    recipe = config.recipe
    assert (recipe.epochs, recipe.lr, recipe.momentum, recipe.weight_decay) == (30, 0.01, 0.9, 0.01)
    assert sweep_config(**options, solver="sgd", epochs=3).recipe.epochs == 3
    exact = sweep_config(**options)
    assert exact.recipe.epochs == 4
    assert [(each.matches, each.solves, each.regresses, each.trains) for each in (config, exact)] == [
        (True, False, True, True),
        (True, True, False, False),
    ]
    # its images get new views where the recipe says so, those of an exact solution do not
    views = {**options, "recipe": "published-schedule"}
    assert [sweep_config(**views, solver=solver).augments for solver in ("sgd", "exact")] == [True, False]


def test_training_on_the_squared_error_needs_no_memory_for_receiver_blocks() -> None:
    sender, receiver = shapes("R1111"), shapes("R1112")
    all_cells = cells(sender, receiver)
    kinds = {
        regresses: StepKind.of(CPU, "bf16", "torch", "off", 64, regresses=regresses) for regresses in (False, True)
    }
    assert kinds[False] == KIND
    overhead = group_memory([], sender, receiver, KIND)
    task, regression = (
        group_memory(all_cells, sender, receiver, kinds[regresses]) - overhead for regresses in (False, True)
    )
    assert 0.2 < regression / task < 0.6


@pytest.fixture(scope="module")
def root_and_dataset(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A root with R1111 and R1112 of width 4, and the name of their data set."""
    folder = tmp_path_factory.mktemp("regression")
    save_npz(folder / "few.npz", fashion.train, fashion.test, 160, 80)
    dataset = f"npz:{folder / 'few.npz'}"
    fastsitch.train("R1111", "R1112", dataset=dataset, width=4, epochs=2, root=folder)
    return folder, dataset


SWEEP: dict[str, Any] = {"loss": "match", "solver": "sgd", "recipe": "small", "epochs": 2, "batch_size": 16}


def test_every_source_gives_the_same_matrix(root_and_dataset: tuple[Path, str]) -> None:
    root, _ = root_and_dataset
    options = {**SWEEP, "precision": "fp32", "window": 64, "block": 32, "root": root}
    runs = [
        fastsitch.sweep(["R1111"], ["R1112", "R1111"], source=source, run=f"from-{source}", **options)
        for source in ("resident", "streamed", "live")
    ]
    assert [run.resolved.source for run in runs] == ["resident", "streamed", "live"]
    resident, streamed, live = runs
    for receiver in ("R1112", "R1111"):
        for metric in resident.metrics:
            one, other = (run.matrix("R1111", receiver, metric) for run in (resident, streamed))
            assert np.array_equal(one, other), metric
        # the networks ran in other batches, in bf16 where the processor has it
        for metric in ("matched_error", "train_loss", "loss"):
            one, other = (run.matrix("R1111", receiver, metric) for run in (resident, live))
            np.testing.assert_allclose(one, other, rtol=0.02)


@pytest.mark.slow
def test_new_views_of_the_images_are_the_same_for_both_networks(root_and_dataset: tuple[Path, str]) -> None:
    """A network matched to itself nears the identity, which it could not if its two sides saw different views."""
    root, _ = root_and_dataset
    options = {**SWEEP, "recipe": "published-schedule", "epochs": 30, "lr": 0.3, "root": root}
    run = fastsitch.sweep(["R1111"], ["R1111"], run="views", **options)
    assert run.resolved.source == "live"
    short = fastsitch.sweep(["R1111"], ["R1111"], run="few-views", **{**options, "epochs": 1})
    first, last = (trained.matrix("R1111", "R1111", "train_loss").diagonal()[:2] for trained in (short, run))
    assert (last < 0.1 * first).all()


def test_the_error_that_is_saved_is_that_of_the_final_stitch(root_and_dataset: tuple[Path, str]) -> None:
    """The exact solution of the same pair has a smaller one."""
    root, _ = root_and_dataset
    options = {"settings": ["T2T", "R2R"], "seeds": [0, 1], "root": root}
    run = fastsitch.sweep(["R1111"], ["R1112"], run="saved", **options, **SWEEP)
    exact = fastsitch.sweep(["R1111"], ["R1112"], run="exact", **options, **{**SWEEP, "solver": "exact"})
    for setting in ("T2T", "R2R"):
        error = run.matrix_by_seed("R1111", "R1112", "matched_error", setting=setting)
        least = exact.matrix_by_seed("R1111", "R1112", "matched_error", setting=setting)
        assert (least <= error * (1 + 1e-9)).all()
        assert not np.array_equal(error[0], error[1])
        assert np.array_equal(least[0], least[1])
        assert (run.matrix("R1111", "R1112", "status", setting=setting) == 1).all()
        # of the last epoch, while the stitch still moved
        np.testing.assert_allclose(run.matrix_by_seed("R1111", "R1112", "train_loss", setting=setting), error, rtol=0.2)


@pytest.mark.parametrize("source", ["resident", "streamed", "live"])
def test_groups_of_any_size_give_the_same_matrix_in_fp64(source: str, root_and_dataset: tuple[Path, str]) -> None:
    root, _ = root_and_dataset
    options = {**SWEEP, "epochs": 1, "precision": "fp64", "source": source, "root": root}
    one, other = (
        fastsitch.sweep(["R1111"], ["R1112"], group_size=size, run=f"groups-{source}-{size}", **options)
        for size in (7, 30)
    )
    for metric in one.metrics:
        first, second = (run.matrix("R1111", "R1112", metric) for run in (one, other))
        np.testing.assert_allclose(first, second, rtol=1e-10)


def test_the_memory_of_a_source_includes_both_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": "cifar10", "root": tmp_path, "group_size": 1, "precision": "bf16"}
    monkeypatch.setattr(estimates, "free_space", lambda path: 10**13)
    # of one image in bf16: 608 KiB at the 9 positions of R2222, 368 KiB at the 5 of R1111
    regression = {**SWEEP, "batch_size": 256}
    for free, source in ((130, "resident"), (100, "streamed")):
        monkeypatch.setattr(estimates, "available_memory", lambda device, free=free: int(free * 1e9 / 0.75))
        task = fastsitch.estimate(["R2222"], ["R1111"], **options)
        matching = fastsitch.estimate(["R2222"], ["R1111"], **options, **regression)
        assert task.source.startswith("resident: 37.4 GB fit into ")
        assert matching.source.startswith(f"{source}: 60.0 GB {'fit' if source == 'resident' else 'do not fit'} into ")
    assert 8192 * (608 + 368) * 1024 < matching.memory < 11_000 * (608 + 368) * 1024
    assert matching.units[0].flops < task.units[0].flops


SWEEP_LINE = ["sweep", "--senders", "R1111", "--receivers", "R1112,R1111", "--loss", "match", "--solver", "sgd"]


def test_from_the_command_line_with_a_dry_run_and_a_resume(
    root_and_dataset: tuple[Path, str], tmp_path: Path, run_cli: Command
) -> None:
    root, dataset = root_and_dataset
    line = [*SWEEP_LINE, "--batch-size", "16", "--root", root, "--run", "published"]
    dry_run = run_cli(*line, "--dry-run")
    assert dry_run.returncode == 0, dry_run.stderr
    assert re.search(
        r"30 epochs, batch 16, .*, on the squared error to the expected representation; gr", dry_run.stdout
    )
    few = [*line, "--epochs", "2", "--seeds", "0,1"]
    swept = run_cli(*few)
    assert swept.returncode == 0, swept.stderr
    assert re.search(r"R1111 -> R1112 +T2T +30/30", swept.stdout)
    units = Root.at(root).run(dataset, "published") / "units"
    before = {path.name: path.read_bytes() for path in units.iterdir()}
    assert len(before) == 8
    for name in ("R1111--R1112.T2T.match.seed1.npz", "R1111--R1111.T2T.match.seed0.safetensors"):
        (units / name).unlink()
    again = run_cli(*few)
    assert again.returncode == 0, again.stderr
    assert "2 of 4 units are done already" in again.stderr
    assert {path.name: path.read_bytes() for path in units.iterdir()} == before
    assert run_cli("export", "published", "--out", tmp_path / "out", "--root", root).returncode == 0
    with np.load(tmp_path / "out" / "R1111--R1112.T2T.npz", allow_pickle=False) as file:
        assert (file["matched_error"] > 0).all()
    sidecar = json.loads((tmp_path / "out" / "R1111--R1112.T2T.json").read_text())
    assert sidecar["matching"] == {"solver": "sgd"}
    assert sidecar["recipe"]["epochs"] == 2
    refused = run_cli(*line, "--solver", "exact")
    assert refused.returncode == 2
    assert "solver is sgd there, exact was asked for" in refused.stderr


def test_a_receivers_store_in_another_precision_is_another_input(root_and_dataset: tuple[Path, str]) -> None:
    root, _ = root_and_dataset
    options = {**SWEEP, "seeds": [0, 1], "source": "resident", "root": root, "run": "inputs"}
    run = fastsitch.sweep(["R1111"], ["R1112"], **options)
    (run.path / "units" / "R1111--R1112.T2T.match.seed1.npz").unlink()
    fastsitch.precompute("R1112", dtype="fp16", force=True, root=root)
    with pytest.raises(RunError, match=r"R1111--R1112\.T2T\.match\.seed0 .* another store than .*R1112 \(fp16"):
        fastsitch.sweep(["R1111"], ["R1112"], **options)
