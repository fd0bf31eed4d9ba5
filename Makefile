# every target makes its own virtual environment when it is missing
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check fix paper-small paper-medium kernels-full gpu clean

demo: $(READY)
	$(BIN)/fastsitch demo --out demo

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python bench/compile_report.py
	$(MAKE) test

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the published study on embedded images; what is there already is kept
paper-small paper-medium: paper-%: $(READY)
	$(BIN)/fastsitch paper --scale $* --root paper-$*/fastsitch-data --out paper-$*

# every kernel, configuration, dtype, geometry and target; check builds a covering part
kernels-full: $(READY)
	$(BIN)/python bench/compile_report.py --full

gpu: $(READY)
	$(BIN)/python bench/gpu.py $(ARGS)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastsitch needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo paper-small paper-medium .pytest_cache .mypy_cache .ruff_cache
