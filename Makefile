# What a newcomer types.  Every target sets up $(VENV) first, from nothing, with the versions of constraints.txt.
#   make demo        make test VENV=/elsewhere/venv        make test PYTEST_ARGS="-k wire -x"

VENV        ?= .venv
PYTHON      ?= $(firstword $(foreach p,python3 python3.12 python3.11,$(if $(call supported,$(p)),$(p))))
PYTEST_ARGS ?=

supported = $(shell $(1) -c 'import sys; print("yes" if (3, 11) <= sys.version_info[:2] <= (3, 12) else "")' 2>/dev/null)
BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PINS      := -c constraints.txt --build-constraint constraints.txt
CPP        = $(shell find kernels -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
PYTEST     = $(BIN)/python -m pytest $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast soak bench bench-peers check types format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: $(INSTALLED)  ## the virtual environment, and the package in it as an editable install (about 2 minutes)

# The checkout's Python is what runs; after a change to the C++ or to the requirements this installs again.
$(INSTALLED): pyproject.toml constraints.txt kernels/CMakeLists.txt $(CPP)
	@test -x $(BIN)/pip || test -n "$(PYTHON)" || \
	  { echo "No Python 3.11 or 3.12 found. Install one with its venv module, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@echo "Setting up $(VENV) with the versions of constraints.txt (about 2 minutes)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --upgrade pip
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PINS) --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## distil a real model here, serve it, ask it something
	$(BIN)/python -m bitdistill_ray.demo

test: $(INSTALLED)  ## every test except the soaks (under 30 minutes on 2 cores)
	$(PYTEST) -m "not soak"

test-fast: $(INSTALLED)  ## the tests that need no cluster, server or build (under 2 minutes)
	$(PYTEST) -m "not slow and not soak"

soak: $(INSTALLED)  ## long fuzzing, soaks, and the other sizes of what `make test` runs once
	$(PYTEST) -m soak --timeout 0

bench: $(INSTALLED)  ## kernels, decoding, teacher, training and data at small sizes; JSON in runs/bench (about 3 minutes)
	@mkdir -p runs/bench
	for kind in kernels decode teacher train data; do \
	  $(BIN)/python -m bitdistill_ray.bench $$kind --json runs/bench/$$kind.json || exit; done

bench-peers: $(INSTALLED)  ## ours beside llama.cpp, which is built first (about 15 minutes on 2 cores; JSON in runs/bench)
	@mkdir -p runs/bench
	@$(BIN)/python -c "import llama_cpp" 2>/dev/null || \
	  $(BIN)/python -m pip install $(PINS) --no-binary llama-cpp-python llama-cpp-python
	for threads in 1 2; do \
	  $(BIN)/python -m bitdistill_ray.bench peers --threads $$threads --json runs/bench/peers-$$threads.json || exit; done

check: $(INSTALLED)  ## lint, format, types and spelling, as in pre-commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/codespell

types: $(INSTALLED)  ## mypy --strict over the three packages and the cluster tools
	MYPYPATH=kernels:serve $(BIN)/mypy -p bitdistill_ray -p bitdistill_kernels -p bitdistill_serve -p cluster

format: $(INSTALLED)  ## rewrite Python and C++ in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:  ## forget the build and the caches; the environment and the runs stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
