"""The memory of a group: predicted, measured, limited, and what happens when there is too little."""

import importlib
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastsitch
from fastsitch.data import Dataset
from fastsitch.errors import ConfigError, MemoryLimitError
from fastsitch.execution import train_units
from fastsitch.machine import native_bf16, release_memory
from fastsitch.network_names import BLOCKS
from fastsitch.networks.resnet import position_shapes
from fastsitch.planning.group_memory import (
    Pair,
    StepKind,
    group_memory,
    largest_group,
    matching_memory,
    memory_budget,
    smallest_group_memory,
)
from fastsitch.stitching.geometry import Shape
from tests.conftest import cli_environment, save_npz
from tests.processes import Ended, RunningCommand

KIND = StepKind(images=64, itemsize=2, device="cpu")


MIXED = "bfloat16" if native_bf16(torch.device("cpu")) else "float32"
"""What a sweep computes in here: without instructions for it bf16 takes ten times as long, and memory of its own."""


def shapes(architecture: str, width: int = 16) -> list[Shape]:
    return [shape for _, shape in position_shapes(BLOCKS[architecture], width, (32, 32))]


def cells(sender: list[Shape], receiver: list[Shape]) -> list[tuple[int, int]]:
    return [(i, j) for j in range(len(receiver)) for i in range(len(sender))]


MEASURE = """
import ctypes, gc, os, sys
import torch
from fastsitch.activations.image_order import ImageOrder
from fastsitch.activations.resident_source import ResidentSource
from fastsitch.receivers.batch_statistics_network import BatchStatisticsNetwork
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.stitching.engine import train_group
from fastsitch.stitching.recipe import TrainingRecipe
from fastsitch.stitching.regression import regress_group
from fastsitch.stitching.cells import Cell, Unit
from fastsitch.planning.group_memory import StepKind, group_memory
from tests.conftest import network

torch.set_grad_enabled(False)
receiver, width, images, groups, precision, kind = sys.argv[1], *map(int, sys.argv[2:5]), *sys.argv[5:]
loss, batch = "match" if kind == "match" else "task", kind == "batch"
dtype, cpu = getattr(torch, precision), torch.device("cpu")
sender = FrozenNetwork(network("R1111", width=width).float(), dtype=dtype, device=cpu)
kind = BatchStatisticsNetwork if batch else FrozenNetwork
frozen = kind(network(receiver, seed=1, width=width).float(), dtype=dtype, device=cpu)
provided = sender.representations(torch.randn(2 * images, 3, 32, 32))
labels = torch.randint(0, 10, (2 * images,))
source = ResidentSource.from_tensors(provided, provided, labels, labels)
unit = Unit(sender="R1111", receiver=receiver, setting="T2T", loss="task", seed=0)
cells = [Cell(unit, i, j) for j in range(len(frozen.positions)) for i in range(5)]
recipe = TrainingRecipe(name="small", epochs=1, batch_size=images, lr=0.01, momentum=0.9, weight_decay=0.01)
order = ImageOrder(seed=0)
if loss == "match":
    wanted = frozen.representations(torch.randn(2 * images, 3, 32, 32))
    expected = ResidentSource.from_tensors(wanted, wanted, labels, labels)

def train(cells):
    if loss == "match":
        regress_group(frozen, source, expected, cells, recipe, order)
    else:
        train_group(frozen, source, cells, recipe, order)

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

def measure():
    train(cells[-2:])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    train(cells[::groups])
    print(status("VmHWM") - before, flush=True)

print(group_memory(
    [(cell.i, cell.j) for cell in cells[::groups]], source.shapes, [p.shape for p in frozen.positions],
    StepKind(
        images=images,
        itemsize=dtype.itemsize,
        device="cpu",
        batch_statistics=batch,
        regresses=loss == "match",
    ),
), flush=True)
# in a fork, whose allocator has nothing to reuse of what was made up to here
child = os.fork()
if not child:
    measure()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize(
    "case",
    [
        f"R1111 16 192 1 {MIXED} task",
        "R1122 16 192 2 float32 task",
        f"R2222 16 96 1 {MIXED} task",
        "R1111 32 96 2 float32 task",
        f"R1111 16 192 1 {MIXED} batch",
        "R1122 16 96 2 float32 batch",
        f"R1111 16 192 1 {MIXED} match",
        "R1122 16 192 2 float32 match",
    ],
)
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(case: str) -> None:
    line = [sys.executable, "-c", MEASURE, *case.split()]
    # tensors outside the heap, which is left with other holes by each process: up to a tenth of a peak, at random
    environment = cli_environment() | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    ended = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert ended.returncode == 0, ended.stderr
    predicted, measured = map(int, ended.stdout.split())
    assert predicted == pytest.approx(measured, rel=0.1)


MEASURE_GRAPHS = """
import sys
import torch
from torchvision.models import get_model
from fastsitch import Chain
from fastsitch.benchmark.agreement import across
from fastsitch.benchmark.bench_pair import Images, pair_of
from fastsitch.benchmark.group_sizes import measured_memory, predicted_memory
from fastsitch.benchmark.short_training import short_training
from fastsitch.stitching.cells import Unit
from fastsitch.stitching.geometry import Rules

name, images = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
chain = Chain.from_module(get_model(name, num_classes=10).eval(), torch.zeros(1, 3, 64, 64))
given = Images(torch.randn(2 * images, 3, 64, 64), torch.randint(0, 10, (2 * images,)))
pair = pair_of(
    chain,
    chain,
    given,
    given,
    Unit(sender=name, receiver=name, setting="T2T", loss="task", seed=0),
    batch_size=images,
    dtype=torch.float32,
    device=torch.device("cpu"),
    rules=Rules(resample="area"),
)
cells = across(pair)
short_training(pair, cells[-2:], 1)()
print(predicted_memory(pair, cells), measured_memory(pair, cells))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("case", ["resnet18 48", "mobilenet_v3_small 96"])
def test_the_predicted_peak_of_graphs_is_within_a_tenth_of_the_measured_one(case: str) -> None:
    line = [sys.executable, "-c", MEASURE_GRAPHS, *case.split()]
    environment = cli_environment() | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    ended = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    predicted, measured = map(int, ended.stdout.split())
    assert predicted == pytest.approx(measured, rel=0.1)


def test_predicted_memory_grows_with_stitches_and_images() -> None:
    sender, receiver = shapes("R1111"), shapes("R1112")
    early = [(i, 0) for i in range(5)]
    late = [(i, 5) for i in range(5)]
    overhead = group_memory([], sender, receiver, KIND)
    one, two = (group_memory(early * n, sender, receiver, KIND) - overhead for n in (4, 8))
    assert 1.8 < two / one < 2
    assert group_memory(late, sender, receiver, KIND) < group_memory(early, sender, receiver, KIND)
    masked = StepKind(images=64, itemsize=2, device="cpu", masked=True, gathers=False)
    assert group_memory(early * 20, sender, receiver, masked) < 0.7 * group_memory(early * 20, sender, receiver, KIND)


@pytest.mark.parametrize("megabytes", [70, 100, 130, 200, 300, 400, 1000])
def test_the_largest_group_fits_and_a_larger_one_does_not(megabytes: int) -> None:
    pairs = [(shapes(a), shapes(b)) for a, b in (("R1111", "R1111"), ("R2222", "R1111"), ("R1111", "R2222"))]
    budget = megabytes * 10**6
    size = largest_group([Pair(*pair, cells(*pair)) for pair in pairs], KIND, budget)
    most = max(len(sender) * len(receiver) for sender, receiver in pairs)

    def fits(size: int) -> bool:
        groups = {
            tuple(cells(sender, receiver)[:: -(-len(sender) * len(receiver) // size)]): (sender, receiver)
            for sender, receiver in pairs
        }
        return all(group_memory(list(group), *pair, KIND) <= budget for group, pair in groups.items())

    assert size == 1 or fits(size)
    assert size == most or not fits(size + 1)
    asked = [Pair(*pair, cells(*pair)) for pair in pairs]
    assert smallest_group_memory(asked, KIND) <= group_memory(cells(*pairs[0]), *pairs[0], KIND)


def test_budgets_are_parsed_or_refused() -> None:
    assert memory_budget("auto", 1000, "cpu") == 750
    assert memory_budget("auto", 1000, "cuda") == 900
    sizes = {
        "8GB": 8e9,
        "8G": 8e9,
        "1.5 gb": 1.5e9,
        "500M": 5e8,
        "2e9": 2e9,
        "64KB": 64000,
        "64KiB": 65536,
        "8GiB": 2**33,
    }
    assert {text: memory_budget(text, 1, "cpu") for text in sizes} == sizes
    assert memory_budget(8_000_000_000, 1, "cpu") == 8e9
    for text in ("", "much", "-1GB", "0", "8XB", "1.2.3GB", "1e400"):
        with pytest.raises(ConfigError, match="expected auto or a size such as 8GB, 8GiB"):
            memory_budget(text, 1, "cpu")


def test_memory_for_matching_equals_that_worked_out_by_hand() -> None:
    # a map of 2 channels into itself, and into half its size: 2x2 and 8x8 inputs, 2x2 and 8x2 weights
    sender, receiver = [(2, 4, 4)], [(2, 4, 4), (2, 2, 2)]
    products = 8 * (2 * 2 + 8 * 8 + 2 * (2 * 2 + 8 * 2))
    assert matching_memory(sender, receiver) == products
    inverses = 4 * (2 * 2 + 8 * 8) + 3 * 8 * 8 * 8
    assert matching_memory(sender, receiver, preconditioned=True) == products + inverses


@pytest.fixture
def small_root(fashion: Dataset, tmp_path: Path) -> Path:
    save_npz(tmp_path / "small.npz", fashion.train, fashion.test, 160, 80)
    for name in ("R1111", "R1112"):
        fastsitch.train(name, dataset=f"npz:{tmp_path / 'small.npz'}", width=4, epochs=1, root=tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_budget_sets_the_size_of_groups_and_nothing_else(small_root: Path) -> None:
    options = {"batch_size": 32, "precision": "fp32", "root": small_root}
    whole = fastsitch.sweep("R1111", "R1112", run="whole", **options)  # type: ignore[arg-type]
    split = fastsitch.sweep("R1111", "R1112", run="split", memory="85MB", **options)  # type: ignore[arg-type]
    assert whole.resolved.group_size == 30
    assert split.resolved.group_size < 30
    np.testing.assert_allclose(
        split.matrix("R1111", "R1112", "accuracy"), whole.matrix("R1111", "R1112", "accuracy"), atol=2 / 80
    )
    estimate = fastsitch.estimate("R1111", "R1112", memory="85MB", **options)  # type: ignore[arg-type]
    assert estimate.group_size == split.resolved.group_size
    assert estimate.memory <= 85e6
    with pytest.raises(MemoryLimitError, match="a single one needs about 0.07 GB: allow more, or use a smaller"):
        fastsitch.sweep("R1111", "R1112", run="none", memory="20MB", **options)  # type: ignore[arg-type]
    # a size that is named has to fit the budget that is named; a refused run leaves no folder
    refusal = r"group_size=30: memory='85MB' is enough for groups of \d+; allow more, or use group_size='auto'"
    for act in (fastsitch.sweep, fastsitch.estimate):
        named = {**options, "run": "none"} if act is fastsitch.sweep else options
        with pytest.raises(MemoryLimitError, match=refusal):
            act("R1111", "R1112", group_size=30, memory="85MB", **named)  # type: ignore[operator]
    assert not list(small_root.rglob("none"))


def bound_growth(share: float, every: int) -> None:
    """Once training begins, let this process grow to no more than a share of what a part of the cells takes.

    The part is every so many-th of them. It is trained beforehand, without a limit: what convolutions take besides
    depends on the processor, and oneDNN never makes a primitive again that it once lacked memory for.
    """
    # torch loads them when they are first needed, which could not be then
    for name in ("cProfile", "sympy", "torch.fx.experimental.symbolic_shapes"):
        importlib.import_module(name)
    train = train_units.train_in_groups

    def size(field: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024

    def bounded(cells: Any, group_size: int, work: Any, report: Any) -> Any:
        before = size("VmSize")
        work(cells[::every], report)
        release_memory()
        resource.setrlimit(resource.RLIMIT_AS, (before + int(share * (size("VmPeak") - before)), -1))
        return train(cells, group_size, work, report)

    train_units.train_in_groups = bounded


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_groups_are_halved_when_memory_runs_out(fashion: Dataset, tmp_path: Path) -> None:
    """Real allocations fail: the process may take little more than half of the cells need."""
    save_npz(tmp_path / "small.npz", fashion.train, fashion.test, 640, 80)
    options = ["--senders", "R1111", "--receivers", "R1112", "--batch-size", "640", "--epochs", "1"]

    def run(name: str, width: int, prepare: Callable[[], None] | None) -> Ended:
        line = ["sweep", *options, "--precision", "fp32", "--root", tmp_path / str(width), "--run", name]
        return RunningCommand(*line, prepare=prepare).ended()

    # without a few megabytes the interpreter itself breaks, so one stitch has to need many
    for width in (4, 32):
        for name in ("R1111", "R1112"):
            dataset = f"npz:{tmp_path / 'small.npz'}"
            fastsitch.train(name, dataset=dataset, width=width, epochs=1, root=tmp_path / str(width))
        fastsitch.precompute("R1111", root=tmp_path / str(width))
    free = run("free", 4, None)
    assert free.returncode == 0, free.stderr
    assert "did not suffice" not in free.stderr
    tight = run("tight", 4, partial(bound_growth, 1.2, 2))
    assert tight.returncode == 0, tight.stderr
    assert "memory did not suffice for a group of 30 cells: going on with 15 at a time" in tight.stderr
    assert "a group of 15 cells" not in tight.stderr
    matrices = [
        fastsitch.open_run(name, root=tmp_path / "4").matrix("R1111", "R1112", "accuracy") for name in ("free", "tight")
    ]
    np.testing.assert_allclose(*matrices, atol=2 / 80)
    none = run("none", 32, partial(bound_growth, 0.8, 30))
    assert none.returncode == 2, none.stderr
    assert "memory does not suffice for a single stitch" in none.stderr
    assert "Traceback" not in none.stderr


def test_the_step_is_that_of_the_resolved_configuration() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert StepKind.of(cpu, "bf16", "torch", "off", 64) == KIND
    compiled = StepKind.of(cpu, "fp32", "torch", "on", 64)
    assert (compiled.masked, compiled.micro_batch, compiled.itemsize) == (True, 256, 4)
    gpu = StepKind.of(cuda, "bf16", "triton", "on", 256)
    assert (gpu.masked, gpu.micro_batch, gpu.gathers) == (True, 1024, False)
    unfolded = StepKind.of(cuda, "bf16", "triton", "off", 256, "batch")
    assert (unfolded.masked, unfolded.micro_batch, unfolded.batch_statistics) == (False, 1, True)
