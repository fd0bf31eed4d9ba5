"""Whether the engine and every other way of training compute the same stitches; else no speed is reported."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fastsitch.benchmark.bench_pair import BenchNetworks, BenchPair, make_bench_pair
from fastsitch.benchmark.one_by_one_peers import (
    OneByOne,
    Stitches,
    apply_stitch,
    published_way,
    tuned_loop,
    untimed,
)
from fastsitch.benchmark.peer_receivers import PeerTail, peer_tail
from fastsitch.benchmark.plain_cascade import PlainCascade
from fastsitch.benchmark.stacked_peers import Grouped, Vmapped
from fastsitch.benchmark.timed_engine import Engine
from fastsitch.errors import FailedError, argument
from fastsitch.kernels.reference import conv_weight
from fastsitch.stitching.cells import Cell
from fastsitch.stitching.geometry import Rules

EXACT_STEPS, EXACT_WIDTH, EXACT_IMAGES = 3, 4, 8
"""Small ResNets are compared at a small width."""

EXACT_BOUND = 1e-8
"""Of the update of a cell's parameters after EXACT_STEPS in fp64: the largest error over the largest change."""

ACCURACY_STEPS, ACCURACY_IMAGES = 24, 64
"""Batches have at least so many images: with fewer, rounding alone sends some cells another way."""

CELL_BOUND, MEAN_BOUND = 0.1, 0.01
"""Difference of test accuracies after ACCURACY_STEPS in the timed precision: of one cell, and of the mean over cells.
Rounding differs between ways of training, which amplifies it while accuracies still rise: up to 0.05 for
single cells of narrow networks in bf16, but below 0.002 in the mean."""

CHANGE_BOUND = {torch.bfloat16: 0.3, torch.float32: 0.02}
"""Of other networks, for which so many steps take too long: of the update of a cell's parameters after EXACT_STEPS in
the timed precision, the norm of the error over that of the change."""

ENGINE, TUNED = "fastsitch", "tuned loop"

_ROUNDING = 0.05
"""A larger relative error of a convolution in bf16 is not due to rounding: 0.002 is usual."""


def require_right_convolutions(device: torch.device) -> None:
    """Raise FailedError where torch computes the peers' stitches wrongly in bf16.

    With torch 2.14 and processors that have AMX it does, for 16 and 24 channels and kernels of 4x4 and more without
    overlap; the engine computes stitches as matrix products.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(size, generator=generator).to(device, torch.bfloat16) for size in ((64, 16, 32, 32), (16, 16, 4, 4))
    )
    true = torch.nn.functional.conv2d(x.float(), weight.float(), stride=4)
    error = (torch.nn.functional.conv2d(x, weight, stride=4).float() - true).norm() / true.norm()
    if not error <= _ROUNDING:
        raise FailedError(
            f"no speed is reported: this torch computes convolutions of 4x4 pixels in bf16 wrongly on this processor "
            f"(by {100 * error.item():.0f} %), and the ways to compare with need them; set "
            f"ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16, or use {argument('precision', 'fp32')}"
        )


class Trainer(Protocol):
    """One way to train cells: ``run`` takes a step of all of them per batch of image indices."""

    def run(self, batches: Sequence[Tensor]) -> None: ...
    def stitches(self) -> Stitches: ...


MakeTrainer = Callable[[BenchPair, Sequence[Cell]], Trainer]

PEERS: dict[str, MakeTrainer] = {
    TUNED: tuned_loop,
    "plain cascade": PlainCascade,
    "published way": partial(published_way, mixed=True),
    "published way, fp32": partial(published_way, mixed=False),
    "torch.func vmap": Vmapped,
    "grouped convolutions": Grouped,
}
"""Everything that the engine is compared with."""

_SMALL_ONLY = ("torch.func vmap", "grouped convolutions")
"""Those that run no other receivers than small ResNets."""


def peer_names(dtype: torch.dtype, *, everything: bool, small: bool = True) -> list[str]:
    """The peers to compare with in a precision: the tuned loop alone unless ``everything``.

    ``small``: whether the receiver is a small ResNet.
    """
    if not everything:
        return [TUNED]
    names = [name for name in PEERS if dtype == torch.bfloat16 or name != "published way"]
    return [name for name in names if small or name not in _SMALL_ONLY]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A peer against the engine. Errors and differences are the largest of all compared cells.

    Accuracies are those of small ResNets; the updates of other networks are compared instead.
    """

    exact_error: float
    """After EXACT_STEPS in fp64, over the change of the parameters."""
    cells: int
    """Compared in the timed precision."""
    change_error: float | None = None
    """After EXACT_STEPS in the timed precision, in norm over the change of the parameters."""
    accuracy: float | None = None
    """Mean over the compared cells, in the timed precision."""
    our_accuracy: float | None = None
    mean_difference: float | None = None
    largest_difference: float | None = None


def exact_errors(networks: BenchNetworks, names: Sequence[str], device: torch.device, rules: Rules) -> dict[str, float]:
    """Train cells of the pair in fp64 with every peer; raises FailedError where one differs.

    Of small ResNets all cells, at a small width; of other networks one per sender and receiver position.
    """
    pair = make_bench_pair(
        networks,
        width=EXACT_WIDTH,
        batch_size=min(EXACT_IMAGES, len(networks.data.train)),
        images=EXACT_STEPS * EXACT_IMAGES,
        tests=EXACT_IMAGES,
        dtype=torch.float64,
        device=device,
        kernel="torch",
        rules=rules,
    )
    cells = pair.cells if networks.built_in else across(pair)
    found = {}
    for name, errors in _update_errors(pair, cells, names, _error).items():
        worst = max(errors, key=lambda cell: _rank(errors[cell]))
        if not errors[worst] <= EXACT_BOUND:
            raise FailedError(
                f"no speed is reported: after {EXACT_STEPS} steps in fp64 the stitch of cell "
                f"({worst.i}, {worst.j}) of {networks.sender} -> {networks.receiver} differs from that of the {name} "
                f"by {errors[worst]:.2e} of its change, expected at most {EXACT_BOUND:.0e}: the engine or this "
                "installation of torch is wrong; run the tests"
            )
        found[name] = errors[worst]
    return found


def change_agreement(pair: BenchPair, exact: Mapping[str, float]) -> dict[str, Agreement]:
    """Train cells across the matrix in the timed precision; raises FailedError where the updates differ too much."""
    cells, bound = across(pair), CHANGE_BOUND[pair.dtype]
    found = {}
    for name, errors in _update_errors(pair, cells, list(exact), _norm_error).items():
        worst = max(errors, key=lambda cell: _rank(errors[cell]))
        if not errors[worst] <= bound:
            raise FailedError(
                f"no speed is reported: after {EXACT_STEPS} steps in the timed precision the stitch of cell "
                f"({worst.i}, {worst.j}) differs from that of the {name} by {errors[worst]:.2g} of its change, "
                f"expected at most {bound}"
            )
        found[name] = Agreement(exact_error=exact[name], cells=len(cells), change_error=errors[worst])
    return found


Errors = dict[Cell, float]
Stitched = tuple[Tensor, Tensor]


def _update_errors(
    pair: BenchPair, cells: Sequence[Cell], names: Sequence[str], error: Callable[[Stitched, Stitched, Stitched], float]
) -> dict[str, Errors]:
    """How far the cells' updates after EXACT_STEPS by each peer are from the engine's."""
    batches = pair.batches(EXACT_STEPS)
    engine = Engine(pair, cells)
    before = engine.stitches()
    engine.run(batches)
    learned = engine.stitches()
    found = {}
    for name in names:
        exact = pair.dtype == torch.float64
        # autocast is for the timed precision
        make = partial(published_way, mixed=False) if exact and name.startswith("published") else PEERS[name]
        peer = make(pair, cells)
        with _steady(pair, peer):
            peer.run(batches)
        found[name] = {cell: error(learned[cell], stitch, before[cell]) for cell, stitch in peer.stitches().items()}
    return found


def _steady(pair: BenchPair, peer: Trainer) -> AbstractContextManager[None]:
    # vmap knows nothing of gradients that somebody else computes
    return untimed(pair.device) if isinstance(peer, OneByOne | PlainCascade) else nullcontext()


def accuracy_agreement(pair: BenchPair, exact: Mapping[str, float]) -> dict[str, Agreement]:
    """Train from the same start in the timed precision; raises FailedError where accuracies differ too much.

    The tuned loop trains all cells, and on a GPU all peers do; on a CPU the slower ones train one per sender and
    receiver position.
    """
    pair = replace(pair, batch_size=min(max(pair.batch_size, ACCURACY_IMAGES), len(pair.source.train)))
    batches = pair.batches(ACCURACY_STEPS)
    engine = Engine(pair, pair.cells)
    engine.run(batches)
    expected = engine.accuracies()
    tail = peer_tail(pair.receiver, pair.dtype, pair.device)
    found = {}
    for name, error in exact.items():
        cells = pair.cells if name == TUNED or pair.device.type == "cuda" else across(pair)
        peer = PEERS[name](pair, cells)
        with _steady(pair, peer):
            peer.run(batches)
        accuracies = {cell: _accuracy(pair, tail, cell, *stitch) for cell, stitch in peer.stitches().items()}
        differences = {cell: abs(accuracies[cell] - expected[cell]) for cell in cells}
        worst = max(differences, key=lambda cell: _rank(differences[cell]))
        mean = abs(sum(accuracies[cell] - expected[cell] for cell in cells)) / len(cells)
        if not (differences[worst] <= CELL_BOUND and mean <= MEAN_BOUND):
            raise FailedError(
                f"no speed is reported: after {ACCURACY_STEPS} steps in the timed precision cell "
                f"({worst.i}, {worst.j}) has accuracy {expected[worst]:.4f}, trained by the {name} "
                f"{accuracies[worst]:.4f} (mean difference of {len(cells)} cells {mean:.4f}), expected at most "
                f"{CELL_BOUND} ({MEAN_BOUND} in the mean)"
            )
        found[name] = Agreement(
            exact_error=error,
            accuracy=sum(accuracies.values()) / len(cells),
            our_accuracy=sum(expected[cell] for cell in cells) / len(cells),
            mean_difference=mean,
            largest_difference=differences[worst],
            cells=len(cells),
        )
    return found


def across(pair: BenchPair) -> list[Cell]:
    """Cells along the antidiagonal: every sender position, receiver position and kind of stitch is among them."""
    senders, receivers = len(pair.source.shapes), len(pair.frozen.positions)
    longest = max(senders, receivers)
    pairs = {(k * senders // longest, receivers - 1 - k * receivers // longest) for k in range(longest)}
    return [cell for cell in pair.cells if (cell.i, cell.j) in pairs]


def _error(engine: Stitched, peer: Stitched, before: Stitched) -> float:
    """The largest error of weight and bias, each over its largest change."""
    errors = []
    for found, expected, start in zip(engine, peer, before, strict=True):
        change = (expected.cpu() - start).abs().max().item()
        errors.append((found - expected.cpu()).abs().max().item() / (change or 1.0))
    return max(errors, key=_rank)


def _norm_error(engine: Stitched, peer: Stitched, before: Stitched) -> float:
    """Of weight and bias together, in norm over the change of them."""
    found, expected, start = (torch.cat([part.cpu().flatten() for part in each]) for each in (engine, peer, before))
    return float((found - expected).norm() / (expected - start).norm())


def _rank(value: float) -> float:
    """NaN is the worst of all."""
    return math.inf if math.isnan(value) else value


@torch.no_grad()
def _accuracy(pair: BenchPair, tail: PeerTail, cell: Cell, weight_FD: Tensor, bias_D: Tensor) -> float:
    """The accuracy of one stitch on all test images, computed without the engine."""
    geometry = pair.geometry(cell)
    test, shapes = pair.source.test, pair.source.shapes
    weight = conv_weight(weight_FD.to(pair.device, pair.dtype), geometry.down)
    index = list(shapes[: cell.i]).count(geometry.sender)
    correct = 0
    for start in range(0, len(test), 256):
        x = test.stack(geometry.sender)[index, start : start + 256]
        y = apply_stitch(geometry, pair.frozen.positions[cell.j], x, weight, bias_D.to(pair.device))
        correct += int((tail(y, cell.j).argmax(-1) == test.labels[start : start + 256]).sum())
    return correct / len(test)
