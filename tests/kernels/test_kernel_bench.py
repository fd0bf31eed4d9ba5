"""The scripts in bench/: they can be loaded, and those that need no GPU do what they say."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastsitch.kernels.study_launches import study_launches

Load = Callable[[str], ModuleType]
SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[2] / "bench").glob("*.py"))
KEYS = (
    "kernel",
    "dtype",
    "config",
    "target",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "tensor_core",
    "vector_bytes",
    "ok",
    "why",
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_loaded(name: str, bench_script: Load) -> None:
    assert callable(bench_script(name).main)


@pytest.mark.parametrize("select", ["stitch_forward m128n64f64w4s3 equal bf16 sm_90", "equal fp16 sm_80", "reduce"])
def test_kernels_compile_for_gpus_that_this_machine_lacks(bench_script: Load, select: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert bench_script("compile_report").main(["--select", select, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert rows
    for row in rows:
        assert tuple(row) == KEYS
        assert row["ok"]
        assert (row["spill_bytes"], row["vector_bytes"]) == (0, 16)
        assert row["tensor_core"] == (row["kernel"] != "reduce_partials")
        assert 0 < row["registers"] <= 255


def test_the_report_fails_on_a_bad_kernel(bench_script: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A limit that no kernel meets makes the rows not ok, and failures are not cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script = bench_script("compile_report")
    monkeypatch.setattr(script, "VECTOR_BYTES", 64)
    assert script.main(["--select", "reduce_partials"]) == 1
    assert json.loads(script.cache_file().read_text()) == {}
    assert script.main(["--select", "nothing is called so"]) == 1


def test_designed_bytes_are_near_the_minimum(bench_script: Load, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    assert bench_script("kernel_model").main(["--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert len(rows) == 2 * len(study_launches())
    for row in rows:
        assert 1.0 <= row["ratio"] <= 1.15, row


def test_the_traffic_of_a_stitch_is_what_it_moves(bench_script: Load) -> None:
    """64 -> 64 channels of equal size, two stitches, worked out by hand."""
    rows = bench_script("kernel_model").study_rows()
    row = next(r for r in rows if r["kernel"] == "forward" and r["channels"] == r["receiver_channels"] == 64)
    pixels = 256 * 32 * 32
    assert row["flops"] == 2 * 2 * pixels * 64 * 64
    assert row["minimum_bytes"] == 2 * 2 * (2 * pixels * 64) + 2 * 2 * 65 * 64 + 8 * 256


def test_the_study_has_all_its_stitches() -> None:
    """112 positions in 16 networks: 112 squared stitches."""
    assert sum(shape.stitches * count for shape, count in study_launches().items()) == 112**2


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_no_gpu_is_said_plainly(bench_script: Load, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_script("gpu_kernels").main([]) == 2
    assert "expected a CUDA device, found none" in capsys.readouterr().err
