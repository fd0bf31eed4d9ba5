"""The engine of a sweep on the cells of a pair, timed as a whole or in its parts."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsitch.activations.representation_batch import Batch
from fastsitch.benchmark.bench_pair import BenchPair
from fastsitch.benchmark.clock import Clock
from fastsitch.benchmark.one_by_one_peers import LR, MOMENTUM, WEIGHT_DECAY, Stitches
from fastsitch.receivers.frozen_network import FrozenNetwork
from fastsitch.stitching.cascade import Cascade
from fastsitch.stitching.cells import Cell, split_groups
from fastsitch.stitching.engine import evaluate, train_step
from fastsitch.stitching.recorded_step import RecordedStep
from fastsitch.stitching.stitch_bank import StitchBank

PARTS = (
    "gather",
    "stitches forward",
    "blocks forward",
    "head, loss, rest",
    "blocks backward",
    "stitches backward",
    "optimizer",
)
"""Of a training step. The optimizer's part includes the copy of the parameters in the compute dtype."""

T = TypeVar("T")


class Engine:
    """Cells in groups of at most ``group_size``, each with buffers of its own. With a clock every part is timed."""

    def __init__(
        self, pair: BenchPair, cells: Sequence[Cell], group_size: int | None = None, clock: Clock | None = None
    ) -> None:
        self._pair = pair
        self._clock = clock
        size = len(cells) if group_size is None else group_size
        self._groups = [self._group(group) for group in split_groups(cells, size)]
        self._steps = [self._step(*group) for group in self._groups]

    @torch.no_grad()
    def run(self, batches: Sequence[Tensor]) -> None:
        """One step per batch for the first group, then for the next, as a sweep goes."""
        for step in self._steps:
            for index in batches:
                if self._clock is None:
                    step(self._pair.source.train.batch(index))
                else:
                    with self._clock.part("gather"):
                        batch = self._timed(self._pair.source.train.batch(index), {"operand": "gather"})
                    with self._clock.part("head, loss, rest"):
                        step(batch)

    def stitches(self) -> Stitches:
        """What has been learned so far."""
        return {cell: stitch for _, bank, _ in self._groups for cell, stitch in bank.stitches().items()}

    @torch.no_grad()
    def accuracies(self) -> dict[Cell, float]:
        """Of every cell, on all test images."""
        found: dict[Cell, float] = {}
        for _, bank, _ in self._groups:
            bank.refresh()
            accuracy, _ = evaluate(self._pair.frozen, self._pair.source.test, bank, images=2 * self._pair.batch_size)
            found |= dict(zip(bank.cells, accuracy.tolist(), strict=True))
        return found

    def _step(self, cascade: Cascade, bank: StitchBank, optimizer: torch.optim.Optimizer) -> Callable[[Batch], Tensor]:
        """A step of a group: as in a sweep, or with a clock one whose parts are timed."""

        def step(batch: Batch) -> Tensor:
            return train_step(cascade, bank, batch, optimizer)

        return RecordedStep(step, self._pair.device) if self._clock is None else step

    def _group(self, cells: Sequence[Cell]) -> tuple[Cascade, StitchBank, torch.optim.Optimizer]:
        pair = self._pair
        bank = StitchBank(
            cells,
            pair.source.shapes,
            [position.rows for position in pair.frozen.positions],
            dtype=pair.dtype,
            device=pair.device,
            kernel=pair.kernel,
            rules=pair.rules,
        )
        optimizer = torch.optim.SGD([bank.parameters], lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        receiver = pair.frozen
        if self._clock is not None:
            receiver = self._timed_receiver(receiver)
            bank = self._timed(
                bank, {"forward": "stitches forward", "backward": "stitches backward", "refresh": "optimizer"}
            )
            optimizer.step = self._timed_call(optimizer.step, "optimizer")  # type: ignore[method-assign]
        return Cascade(receiver, bank.counts, pair.batch_size), bank, optimizer

    def _timed_receiver(self, receiver: FrozenNetwork) -> FrozenNetwork:
        """A shallow copy whose segments are timed."""
        timed = copy.copy(receiver)
        timed.segments = []
        for segment in receiver.segments:
            names = [name for name in dir(segment) if not name.startswith("_") and callable(getattr(segment, name))]
            # convolutions are callable objects inside a block, not methods of it
            methods = [name for name in names if hasattr(type(segment), name)]
            parts = {name: "blocks backward" if "backward" in name else "blocks forward" for name in methods}
            timed.segments.append(self._timed(segment, parts))
        return timed

    def _timed(self, target: T, parts: dict[str, str]) -> T:
        """A shallow copy of ``target`` whose methods add their time to parts of the step."""
        timed = copy.copy(target)
        for name, part in parts.items():
            setattr(timed, name, self._timed_call(getattr(timed, name), part))
        return timed

    def _timed_call(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        clock = self._clock
        assert clock is not None

        def call(*arguments: Any, **options: Any) -> Any:
            with clock.part(part):
                return function(*arguments, **options)

        return call
