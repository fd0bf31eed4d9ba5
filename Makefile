# every target makes its own virtual environment when it is missing
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test quick check docs notebook fix paper-small paper-medium families photos kernels-full gpu clean

demo: $(READY)
	$(BIN)/fastsitch demo --out demo

test: $(READY)
	$(BIN)/python -m pytest

# what one runs while editing
quick: $(READY)
	$(BIN)/python -m pytest -m 'not (kill or cluster or bucket or slow)'

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python bench/compile_report.py
	$(MAKE) docs test

# the documentation, in site/; a warning is an error. NO_MKDOCS_2_WARNING: the theme's advertisement
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# runs the notebook and fails where a cell does; ARGS=--write keeps the new output
notebook: $(READY)
	$(BIN)/python examples/run_notebook.py $(ARGS)

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the published study on embedded images; what is there already is kept
paper-small paper-medium: paper-%: $(READY)
	$(BIN)/fastsitch paper --scale $* --root paper-$*/fastsitch-data --out paper-$*

# three families of networks, stitched with each other: docs/families.md
NAMES := R1111,mobilenet,vit
ROOT := --root families/fastsitch-data
families: $(READY)
	$(BIN)/fastsitch add vit --from docs/families/vit.py:small $(ROOT)
	$(BIN)/fastsitch add mobilenet --from torchvision:mobilenet_v3_small \
		--positions features.0.2,features.1,features.3,features.6,features.8,features.11 $(ROOT)
	$(BIN)/fastsitch train R1111 --width 16 --epochs 8 $(ROOT)
	$(BIN)/fastsitch train mobilenet vit --epochs 10 $(ROOT)
	$(BIN)/fastsitch sweep --senders $(NAMES) --receivers $(NAMES) --recipe small --epochs 1 \
		--run families $(ROOT)
	$(BIN)/fastsitch sweep --senders $(NAMES) --receivers $(NAMES) --recipe small --epochs 1 \
		--settings R2T --run families-random $(ROOT)
	for run in families families-random; do \
		$(BIN)/fastsitch export $$run --out families $(ROOT) && \
		$(BIN)/fastsitch plot $$run --out families $(ROOT) && \
		$(BIN)/fastsitch plot $$run --figure overview --out families $(ROOT) || exit 1; \
	done

# networks at 224 pixels, on JPEGs of several sizes: docs/photos.md
IMAGES := --dataset imagefolder:photos/images@224 --root photos/fastsitch-data
photos: $(READY)
	$(BIN)/python bench/make_photos.py photos/images
	$(BIN)/fastsitch add r18 --from timm:resnet18 $(IMAGES)
	$(BIN)/fastsitch add vit --from docs/photos/vit.py:small $(IMAGES)
	$(BIN)/fastsitch train r18 --epochs 6 $(IMAGES)
	$(BIN)/fastsitch train vit --epochs 15 $(IMAGES)
	$(BIN)/fastsitch add tower --from docs/photos/vit.py:tower \
		--weights photos/fastsitch-data/models/*/vit.*.safetensors --head probe $(IMAGES)
	$(BIN)/fastsitch probe r18 vit --json photos/probes.json $(IMAGES)
	$(BIN)/fastsitch sweep --senders r18,vit --receivers vit,tower --settings T2T,R2T --recipe small --epochs 1 \
		--train-images 900 --run photos $(IMAGES)
	$(BIN)/fastsitch plot photos --figure overview --out photos --root photos/fastsitch-data
	$(BIN)/fastsitch export photos --out photos/matrices --root photos/fastsitch-data

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
	rm -rf $(VENV) build dist site *.egg-info demo paper-small paper-medium families photos .pytest_cache .mypy_cache .ruff_cache
