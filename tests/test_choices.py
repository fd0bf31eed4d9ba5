"""The same matrix with torch or Triton stitches, eager or compiled blocks."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fastsitch
from fastsitch.data import Dataset
from fastsitch.receivers import compiled_blocks as compiled
from fastsitch.receivers.compiled_blocks import compile_blocks
from fastsitch.runs.run import Run
from fastsitch.stitching.engine import train_group
from tests.conftest import Command, cli_environment, cli_line, network
from tests.test_engine import ORDER, RECIPE, all_cells, frozen, source_of

OPTIONS = ["--recipe", "small", "--epochs", "1", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def root(fashion: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """R1111 and R1121 of width 4, trained on 128 real images shrunk to 8x8."""
    folder = tmp_path_factory.mktemp("choices")
    small = {
        f"{kind}_{split}": array
        for split, images, count in (("train", fashion.train, 128), ("test", fashion.test, 20))
        for kind, array in (
            ("x", images.images[:count, ::4, ::4].numpy()),
            ("y", images.labels[:count].numpy()),
        )
    }
    np.savez(folder / "tiny.npz", **small)
    dataset = f"npz:{folder / 'tiny.npz'}"
    fastsitch.train("R1111", "R1121", dataset=dataset, width=4, epochs=1, root=folder)
    fastsitch.precompute("R1111", dtype="fp32", root=folder)
    return folder


def arguments(root: Path, name: str, *options: str) -> list[str]:
    line = ["sweep", "--senders", "R1111", "--receivers", "R1121", "--root", str(root), "--run", name]
    return [*line, *OPTIONS, *options]


def sweep_in_process(root: Path, name: str, *options: str, environment: dict[str, str] | None = None) -> Run:
    """In a process of its own, where triton and the compiler read other variables."""
    ended = subprocess.run(
        cli_line(*arguments(root, name, *options)),
        env={**cli_environment(), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return fastsitch.open_run(name, root=root)


def sweep_here(run_cli: Command, root: Path, name: str, *options: str) -> Run:
    ended = run_cli(*arguments(root, name, *options))
    assert ended.returncode == 0, ended.stderr
    return fastsitch.open_run(name, root=root)


def assert_same_matrix(one: Run, other: Run) -> None:
    assert np.array_equal(one.matrix("R1111", "R1121"), other.matrix("R1111", "R1121"), equal_nan=True)
    assert np.isfinite(one.matrix("R1111", "R1121")).sum() >= 9
    for metric in ("loss", "train_loss"):
        np.testing.assert_allclose(
            other.matrix("R1111", "R1121", metric), one.matrix("R1111", "R1121", metric), rtol=1e-4
        )


@pytest.mark.slow
def test_triton_in_the_interpreter_gives_the_matrix_of_the_torch_path(root: Path, run_cli: Command) -> None:
    # maps of three sizes: stitches that halve them once, twice, and back
    options = ["--batch-size", "64", "--positions", "stem,layer2.0,layer3.0"]
    torch_run = sweep_here(run_cli, root, "torch", "--kernel", "torch", *options)
    triton_run = sweep_in_process(root, "triton", "--kernel", "triton", *options, environment={"TRITON_INTERPRET": "1"})
    assert triton_run.resolved.kernel == "triton"
    assert_same_matrix(torch_run, triton_run)


@pytest.mark.slow
def test_one_graph_per_block_shape_serves_every_group_and_receiver(
    fashion: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounter()
    monkeypatch.setattr(compiled, "BACKEND", counter)
    monkeypatch.setattr(compiled, "_cache", {})
    sender = network("R1111").float()
    source = source_of(sender, fashion, dtype=torch.float32)
    with torch.no_grad():
        for architecture, seed, cells, shapes in (
            ("R1111", 1, 25, 4),
            ("R1111", 1, 7, 4),
            ("R1111", 2, 11, 4),
            # three blocks of shapes that were not there yet: a second block in stages 2 to 4
            ("R2222", 3, 45, 7),
            ("R2222", 4, 13, 7),
        ):
            receiver = network(architecture, seed=seed).float()
            model = compile_blocks(frozen(receiver, torch.float32))
            train_group(model, source, all_cells(sender, receiver)[:cells], RECIPE, ORDER)
            # forward and backward of each shape
            assert counter.frame_count == 2 * shapes


@pytest.mark.slow
def test_compiled_blocks_give_the_matrix_of_eager_ones(root: Path, run_cli: Command) -> None:
    eager = sweep_here(run_cli, root, "eager", "--compile", "off", "--batch-size", "64")
    # the compiler's helpers would import torch once more
    alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    compiled = sweep_in_process(root, "compiled", "--compile", "on", "--batch-size", "64", environment=alone)
    assert (eager.resolved.compile, compiled.resolved.compile) == ("off", "on")
    assert_same_matrix(eager, compiled)
    # the precision of the comparison is not that of two equal programs by accident
    assert os.environ.get("TORCHDYNAMO_DISABLE") is None
    assert torch.isfinite(torch.tensor(compiled.matrix("R1111", "R1121", "loss"))).all()
