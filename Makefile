# Plain venv and pip. Each step leaves a stamp in the venv and is repeated when pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
# The CPU build, from PyTorch's own index. Elsewhere: make test TORCH=torch TORCH_INDEX=
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu
DEMO_ARGS ?=
BENCH_ARGS ?=
# loadfile: a file stays with one worker, so what it compiled is reused; conftest.py puts the longest first, and xdist
# is to leave them in that order. Each worker imports both frameworks.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check
VENV_READY := $(VENV)/.stamp-venv
TORCH_READY := $(VENV)/.stamp-torch
DEMO_READY := $(VENV)/.stamp-demo
TEST_READY := $(VENV)/.stamp-test
LINT_READY := $(VENV)/.stamp-lint
BENCH_READY := $(VENV)/.stamp-bench

.DEFAULT_GOAL := help
.NOTPARALLEL: # two pips must not write to one venv
.PHONY: help demo test test-exhaustive lint bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(DEMO_READY) ## train in every format and write the report (DEMO_ARGS="--steps 20")
	$(BIN)/altgrad study $(DEMO_ARGS)

test: $(TEST_READY) ## run the tests, the parity tests and the doctests (PYTEST_ARGS=...)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-exhaustive: $(TEST_READY) ## run the tests that go through every float32 (long)
	$(BIN)/python -m pytest -m exhaustive $(PYTEST_ARGS)

lint: $(LINT_READY) ## check style, formatting, walls and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

bench: $(BENCH_READY) ## run the benchmarks (BENCH_ARGS=...)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

clean: ## remove the venv, caches and builds (not results)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV_READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "AltGrad needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
			"Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(DEMO_READY): pyproject.toml $(VENV_READY)
	$(PIP_INSTALL) -e ".[train,report]"
	@touch $@

# First and alone: a bare "torch" brings gigabytes of CUDA, and an extra index is asked for every package pip looks up.
$(TORCH_READY): $(VENV_READY)
	$(PIP_INSTALL) --no-deps --retries 1 $(TORCH_INDEX) "$(TORCH)"
	@touch $@

$(TEST_READY): pyproject.toml $(TORCH_READY)
	$(PIP_INSTALL) -e ".[all,test]"
	@touch $@ $(DEMO_READY)

$(BENCH_READY): $(TEST_READY)
	$(PIP_INSTALL) -e ".[bench]"
	@touch $@

# On top of the tests' packages: the type checker has to see both frameworks.
$(LINT_READY): $(TEST_READY)
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@
