"""What is said of how far some work is, and of how long it will take: within a factor of two of the truth."""

import math
import time
from pathlib import Path

import pytest
import torch

import fastsitch
from fastsitch.activations.resident_source import ResidentSplit
from fastsitch.cli import progress_display
from fastsitch.data import Dataset
from fastsitch.progress import Progress
from fastsitch.stitching import product_sums
from tests.conftest import save_npz

SLOW = 0.02
"""Seconds more for every batch and every chunk of images: everything else is little beside them."""


@pytest.fixture
def root(fashion: Dataset, tmp_path: Path) -> Path:
    """A root with two networks of width 2 on 640 images."""
    save_npz(tmp_path / "few.npz", fashion.train, fashion.test, 640, 64)
    fastsitch.train("R1111", "R1112", dataset=f"npz:{tmp_path / 'few.npz'}", width=2, epochs=1, root=tmp_path)
    fastsitch.precompute("R1111", "R1112", root=tmp_path)
    return tmp_path


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that takes its time: for each batch, and for each chunk of images in order."""
    batch, load = ResidentSplit.batch, product_sums.ExpectedRows.load

    def slow_batch(self: ResidentSplit, index: torch.Tensor) -> object:
        time.sleep(SLOW)
        return batch(self, index)

    def slow_load(self: product_sums.ExpectedRows, *arguments: object) -> None:
        time.sleep(2 * SLOW)
        load(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ResidentSplit, "batch", slow_batch)
    monkeypatch.setattr(product_sums.ExpectedRows, "load", slow_load)
    for module in ("moments", "output_errors"):
        monkeypatch.setattr(f"fastsitch.stitching.{module}.chunk_images", lambda device: 16)


class Watch:
    """Notes what is reported, when."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, Progress]] = []

    def __call__(self, progress: Progress) -> None:
        self.seen.append((time.monotonic(), progress))

    def wrong(self, task: str, end: float | None = None) -> list[tuple[float, float, float]]:
        """Moments after a tenth of some work at which the time left was off by more than a factor of two.

        Each with what was said and what was true. A moment near the end, when a few hundredths are left, is none.
        """
        of_task = [(moment, progress) for moment, progress in self.seen if progress.task == task]
        assert of_task, {progress.task for _, progress in self.seen}
        begun, last = of_task[0], of_task[-1][0] if end is None else end
        wrong, judged = [], 0
        for moment, progress in of_task[1:]:
            elapsed, truth = moment - begun[0], last - moment
            if elapsed < 0.1 * (last - begun[0]) or truth < 0.1 * (last - begun[0]):
                continue
            judged += 1
            rate = (progress.done - begun[1].done) / elapsed
            left = (progress.total - progress.done) / rate if progress.left is None else progress.left
            if not truth / 2 <= left <= truth * 2:
                wrong.append((moment - begun[0], left, truth))
        assert judged >= 2, "too few reports to judge by"
        return wrong


@pytest.mark.usefixtures("slow")
def test_the_time_left_is_true_while_stitches_are_matched_and_trained(root: Path) -> None:
    watch = Watch()
    options = {"batch_size": 32, "recipe": "small", "epochs": 1, "precision": "fp32", "source": "resident"}
    fastsitch.sweep("R1111,R1112", "R1112", root=root, init="matched", report=watch, **options)
    end = time.monotonic()
    statistics = "statistics of R1111 and R1112"
    assert watch.wrong(statistics) == []
    assert [progress.unit for _, progress in watch.seen if progress.task == statistics] == ["images"] * 40
    # counted over the whole sweep, and never in pieces of cells while only statistics are accumulated
    assert watch.wrong("sweep", end) == []
    done = [progress.done for _, progress in watch.seen if progress.task == "sweep"]
    assert done == sorted(done)
    assert done[-1] == 5 * 6 + 6 * 6


@pytest.mark.usefixtures("slow")
def test_the_time_left_is_true_while_matched_stitches_are_evaluated_and_errors_measured(root: Path) -> None:
    watch = Watch()
    options = {"batch_size": 32, "recipe": "small", "precision": "fp32", "source": "resident"}
    run = fastsitch.sweep("R1111", "R1112", root=root, loss="match", report=watch, **options)
    assert watch.wrong("statistics of R1111 and R1112") == []
    trained = fastsitch.sweep("R1111", "R1112", root=root, epochs=1, report=watch, **options)
    assert run.name != trained.name
    watch.seen.clear()
    fastsitch.measure_errors(trained, root=root, report=watch)
    assert watch.wrong("errors") == []


def test_other_work_says_the_truth_too(fashion: Dataset, tmp_path: Path) -> None:
    watch = Watch()
    save_npz(tmp_path / "few.npz", fashion.train, fashion.test, 2048, 256)
    fastsitch.train("R1111", dataset=f"npz:{tmp_path / 'few.npz'}", width=4, epochs=3, root=tmp_path, report=watch)
    assert watch.wrong("train R1111") == []


def test_a_time_left_that_nobody_knows_is_not_shown() -> None:
    assert progress_display._pace(Progress(1, 4, "cells"), 1, 2.0) == ", 30.0 cells/min, 6 s left"
    assert progress_display._pace(Progress(1, 4, "cells", left=60.0), 1, 2.0) == ", 30.0 cells/min, 1:00 min left"
    assert progress_display._pace(Progress(1, 4, "cells", left=math.nan), 1, 2.0) == ", 30.0 cells/min"
