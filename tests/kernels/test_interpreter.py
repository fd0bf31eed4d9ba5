"""Runs the interpreter cases, each file in a separate process: triton reads TRITON_INTERPRET on import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreter"


@pytest.mark.slow
@pytest.mark.parametrize("cases", sorted(path.name for path in FOLDER.glob("cases_*.py")))
def test_kernels_in_the_interpreter(cases: str) -> None:
    command = [sys.executable, "-m", "pytest", str(FOLDER / cases), "-p", "no:cacheprovider"]
    # the project's options start worker processes and look for files of another name
    options = ["-o", "addopts=--import-mode=importlib -q", "-o", "python_files=cases_*.py"]
    # the interpreter multiplies by numpy's OpenBLAS, whose kernels for AVX2 do not repeat the last bit of a product
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_CORETYPE": "Nehalem"}
    run = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
