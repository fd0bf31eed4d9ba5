"""The benchmark: peers that compute the same, correct figures, and no speed without correct results."""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastsitch.activations.representation_batch import Batch
from fastsitch.benchmark import agreement as check
from fastsitch.benchmark import flops
from fastsitch.benchmark.bandwidth import scratch_folder
from fastsitch.benchmark.bare_products import BareProducts
from fastsitch.benchmark.bench_pair import BenchNetworks, BenchPair, make_bench_pair
from fastsitch.benchmark.clock import Clock
from fastsitch.benchmark.group_sizes import measure_groups
from fastsitch.benchmark.time_peers import SWEEP, time_peers
from fastsitch.benchmark.timed_engine import PARTS, Engine
from fastsitch.benchmark.timing_rounds import Spread
from fastsitch.chains.chain_flops import chain_flops
from fastsitch.cli import progress_display
from fastsitch.cli.main import _run
from fastsitch.errors import FailedError
from fastsitch.network_names import BLOCKS
from fastsitch.networks.resnet import position_shapes, resnet_flops
from fastsitch.stitching.geometry import DEFAULT_RULES
from fastsitch.stitching.stitch_bank import StitchBank
from tests.conftest import Command

CPU = torch.device("cpu")


def small_pair(dtype: torch.dtype, *, receiver: str = "R1111", images: int = 64, training_steps: int = 0) -> BenchPair:
    return make_bench_pair(
        BenchNetworks("R1111", receiver),
        width=4,
        batch_size=8,
        images=images,
        tests=64,
        dtype=dtype,
        device=CPU,
        kernel="torch",
        training_steps=training_steps,
    )


def shapes_of(name: str, width: int) -> list[tuple[int, int, int]]:
    return [shape for _, shape in position_shapes(BLOCKS[name], width, (32, 32))]


def break_gradient(
    monkeypatch: pytest.MonkeyPatch,
    j: int,
    change: Callable[[Tensor], object],
    *,
    exact: bool,
    stitches: slice = slice(1),
) -> None:
    """Change the engine's gradient of the first stitches into position j, in fp64 or in all other precisions."""
    backward = StitchBank.backward

    def broken(bank: StitchBank, position: int, batch: Batch, g_KBPQD: Tensor) -> None:
        backward(bank, position, batch, g_KBPQD)
        if position == j and (g_KBPQD.dtype == torch.float64) is exact:
            for stack in bank.stacks[j][stitches]:
                for grad_FD in stack.weight_grad_KFD[stitches]:
                    change(grad_FD)

    monkeypatch.setattr(StitchBank, "backward", broken)


def test_every_peer_computes_the_updates_of_the_engine() -> None:
    errors = check.exact_errors(BenchNetworks("R1111", "R1112"), list(check.PEERS), CPU, DEFAULT_RULES)
    assert list(errors) == list(check.PEERS)
    assert max(errors.values()) < 1e-10


def test_smaller_groups_compute_the_same() -> None:
    pair = small_pair(torch.float64)
    whole, parted = Engine(pair, pair.cells), Engine(pair, pair.cells, 7)
    for engine in (whole, parted):
        engine.run(pair.batches(2))
    for cell, stitch in whole.stitches().items():
        for found, expected in zip(parted.stitches()[cell], stitch, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("change", [lambda g: g.mul_(1 + 1e-6), lambda g: g[0, 0].fill_(math.nan)])
def test_no_speed_is_reported_when_a_gradient_is_wrong(
    change: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_gradient(monkeypatch, 2, change, exact=True)
    with pytest.raises(
        FailedError, match=r"no speed is reported: .* stitch of cell \(\d, 2\) of R1111 -> R1111 .* tuned loop by"
    ):
        check.exact_errors(BenchNetworks("R1111", "R1111"), [check.TUNED], CPU, DEFAULT_RULES)


def test_the_command_ends_with_1_and_says_which_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    break_gradient(monkeypatch, 4, lambda g: g.mul_(1.001), exact=True)
    monkeypatch.setattr(progress_display, "_debug", False)
    monkeypatch.setattr(
        sys, "argv", ["fastsitch", "bench", "--root", str(tmp_path), "--json", str(tmp_path / "b.json")]
    )
    assert _run() == 1
    shown = capsys.readouterr()
    assert "no speed is reported: after 3 steps in fp64 the stitch of cell (0, 4)" in shown.err
    assert "GFLOP" not in shown.out + shown.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_no_speed_is_reported_when_accuracies_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = small_pair(torch.float32, images=256, training_steps=48)
    agreed = check.accuracy_agreement(pair, {check.TUNED: 0.0})[check.TUNED]
    assert agreed.cells == 25
    assert agreed.accuracy > 0.2
    assert agreed.largest_difference <= 0.02
    # all of them: how far a single cell has come in so few steps depends on the processor's rounding
    break_gradient(monkeypatch, 3, lambda g: g.mul_(-1), exact=False, stitches=slice(None))
    with pytest.raises(
        FailedError, match=r"no speed is reported: after 24 steps .* cell \(\d, 3\) has accuracy 0\.\d+"
    ):
        check.accuracy_agreement(pair, {check.TUNED: 0.0})


def test_a_processor_on_which_torch_convolves_wrongly_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen on a processor with AMX; here the fault is simulated."""
    convolve = torch.nn.functional.conv2d

    def convolve_with(x: Tensor, weight: Tensor, stride: int, fault: float) -> Tensor:
        return convolve(x.float(), weight.float(), stride=stride).to(x.dtype) * (
            fault if x.dtype != torch.float32 else 1
        )

    for fault in (1.0, 0.3):
        monkeypatch.setattr(torch.nn.functional, "conv2d", partial(convolve_with, fault=fault))
        if fault == 1.0:
            check.require_right_convolutions(CPU)
            continue
        with pytest.raises(
            FailedError, match=r"in bf16 wrongly on this processor .*ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"
        ):
            check.require_right_convolutions(CPU)


def test_cells_across_the_matrix_meet_every_position_and_kind() -> None:
    pair = small_pair(torch.float32, receiver="R1112")
    cells = check.across(pair)
    assert {cell.i for cell in cells} == set(range(5))
    assert {cell.j for cell in cells} == set(range(6))


def test_counted_flops_equal_those_worked_out_by_hand() -> None:
    shapes = shapes_of("R2222", 64)
    stem, *blocks, head = resnet_flops(BLOCKS["R2222"], 64, 10, (3, 32, 32))
    # two 3x3 convolutions of 64 channels on 32x32; 64 -> 128 with stride 2 and its projection
    assert blocks[0] == 2 * (2 * 32 * 32 * 64 * 64 * 9)
    assert blocks[2] == 2 * 16 * 16 * (128 * 64 * 9 + 128 * 128 * 9 + 128 * 64)
    assert stem == 2 * 32 * 32 * 64 * 3 * 9
    assert head == 2 * 512 * 10
    assert round((sum(blocks) + stem) / 2e6) == 555
    # the last stitch into the last position: 512 x 512 products at 4x4 forward, as many for the weights
    last = flops.training_flops(blocks, shapes, shapes, [(8, 8)])
    assert (last.convolutions, last.stitches) == (0, 2 * 2 * 16 * 512 * 512)
    study = flops.study_flops()
    assert study.total == pytest.approx(2.17e18, rel=0.03)
    assert study.stitches / study.total == pytest.approx(0.035, abs=0.01)


def test_flops_are_those_that_are_really_done() -> None:
    pair = small_pair(torch.float32)
    shapes = [position.shape for position in pair.frozen.positions]
    _, *blocks, _ = chain_flops(pair.receiver)
    expected = flops.training_flops(blocks, shapes, shapes, [(cell.i, cell.j) for cell in pair.cells])
    engine = Engine(pair, pair.cells)
    with FlopCounterMode(display=False) as counter:
        engine.run(pair.batches(1))
    counts = counter.get_flop_counts()["Global"]
    convolutions = sum(count for operator, count in counts.items() if "convolution" in str(operator))
    # projections and their gradients are GEMMs: 5 j stitches pass the block that ends at position j
    projections = sum(
        2 * 2 * 5 * j * before[0] * after[0] * after[1] * after[2]
        for j, (before, after) in enumerate(itertools.pairwise(shapes), 1)
        if before != after
    )
    assert convolutions == 8 * (expected.convolutions - projections)
    bare = BareProducts(pair.receiver, [5] * 5, 8, torch.float32, CPU)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bare.run()
    head = 2 * 2 * 25 * 8 * shapes[-1][0] * 10
    assert counter.get_total_flops() == bare.total_flops == 8 * expected.convolutions + head
    assert bare.flops == bare.gradient_flops


def test_nested_parts_are_not_counted_twice() -> None:
    clock = Clock(CPU)

    def work() -> float:
        return sum(torch.rand(200_000).sum().item() for _ in range(5))

    with clock.part("outer"):
        work()
        with clock.part("inner"):
            for _ in range(4):
                work()
        work()
    assert set(clock.seconds) == {"outer", "inner"}
    assert clock.seconds["inner"] > clock.seconds["outer"] > 0


def test_group_sizes_are_measured_in_all_parts() -> None:
    pair = small_pair(torch.float32)
    single, unit, twice = measure_groups(pair, [1, 25, 50], 2)
    assert (single.cells, unit.cells, twice.cells) == (25, 25, 50)
    assert twice.flops == 2 * unit.flops == 2 * single.flops > 0
    for group in (single, unit, twice):
        assert tuple(group.parts) == PARTS
        assert all(part.min > 0 and part.n == 2 for part in group.parts.values())
        assert group.over_bare.min * group.fraction.max == pytest.approx(1)
        assert group.over_bare.max * group.fraction.min == pytest.approx(1)
        assert group.memory is not None
        assert group.memory < 2 * group.predicted_memory
        assert group.rate.median == pytest.approx(group.cells * 8 / group.seconds.median, rel=0.5)
    # a group of one pays per step what a unit pays once
    assert single.seconds.min > unit.seconds.min


@pytest.mark.slow
def test_all_peers_are_timed_on_the_same_cells() -> None:
    pair = small_pair(torch.float32)
    agreement = check.Agreement(exact_error=0.0, cells=25)
    names = check.peer_names(torch.float32, everything=True)
    assert "published way" not in names
    measures = time_peers(pair, dict.fromkeys(names, agreement), 2)
    assert [measure.name for measure in measures] == [check.ENGINE, SWEEP, *names]
    assert measures[0].times_ours == Spread(1.0, 1.0, 1.0, 2)
    published = next(measure for measure in measures if measure.name == "published way, fp32")
    assert published.times_ours.median > 1


@pytest.mark.slow
def test_the_command_measures_writes_and_tunes(run_cli: Command, tmp_path: Path) -> None:
    shape = ["--width", "4", "--batch-size", "8", "--precision", "fp32"]
    done = run_cli("bench", *shape, "--group-sizes", "5,25", "--repeats", "1", "--peers", "--tune", "--json", "b.json")
    assert done.returncode == 0, done.stderr
    work = tmp_path / "work"
    content = json.loads((work / "b.json").read_text())
    for key in ("machine", "threads", "versions", "device", "precision", "command", "unit"):
        assert content[key]
    assert content["command"].startswith("fastsitch bench --width 4 --batch-size 8 --precision fp32 --group-sizes 5,25")
    assert [group["group_size"] for group in content["groups"]] == [5, 25]
    for group in content["groups"]:
        assert set(group["seconds"]) == {"median", "min", "max", "n"}
        assert 0 < group["fraction"]["median"] < 1
    assert set(content["bandwidths"]) >= {"copy", "store write", "store read"}
    assert [block["samples"] for block in content["ceiling"]["blocks"]] == [40, 80, 120, 160, 200]
    assert len(content["peers"]) == 7
    assert content["projection"]["flops"] == pytest.approx(2.17e18, rel=0.03)
    for words in ("of the ceiling", "torch.func vmap", "predicted, not measured", "stitches backward", "store write"):
        assert words in done.stdout
    profile = json.loads((work / "fastsitch-data" / "profile.json").read_text())
    assert profile["tunings"][0]["group_size"] == content["tuning"]["group_size"]
    assert sorted(path.name for path in work.iterdir()) == ["b.json", "fastsitch-data"]


def test_what_a_killed_benchmark_left_behind_is_removed(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    stale = tmp_path / f".fastsitch-bench-{int(ended.stdout)}-x"
    living = tmp_path / f".fastsitch-bench-{os.getpid()}-x"
    for folder in (stale, living):
        (folder / "0").mkdir(parents=True)
    assert scratch_folder(tmp_path / "root") == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == [living.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group-sizes", "x"], "--group-sizes x: expected whole numbers"),
        (["--group-sizes", "0"], "--group-sizes 0: expected a whole number from 1"),
        (["--group-sizes", ","], "--group-sizes ,: expected whole numbers"),
        (["--group-sizes", "26"], "--group-sizes 26: R1111 -> R1111 has 25 cells; expected up to 25, or a multiple"),
        (["--root", "/proc/none"], "--root /proc/none: cannot write to /proc"),
        (["--repeats", "0"], "--repeats 0: expected a whole number from 1 to"),
        (["--width", "0"], "--width 0: expected a whole number from 4 to"),
        (["--sender", "R1113"], "unknown network 'R1113'"),
        (["--receiver", "R1111-random@0"], "--receiver R1111-random@0"),
        (["--precision", "fp64"], "--precision fp64: expected one of"),
        (["--json", "."], "--json . is a folder"),
    ],
)
def test_bad_options_end_with_2(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress_display, "_debug", False)
    monkeypatch.setattr(sys, "argv", ["fastsitch", "bench", *arguments])
    assert _run() == 2
    assert message in capsys.readouterr().err
