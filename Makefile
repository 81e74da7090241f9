# Octavo: `make demo` shows it, `make test` proves it, `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# Passed to every pip install, e.g. PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple"
PIP_ARGS ?=
# ONCE=1: `make demo` exits 0 after the answer instead of serving on.
ONCE ?=
PORT ?= 8000
ASK ?= What is the capital of France?
TESTS ?= tests
# Where `make images` names the images to be.
REGISTRY ?= ghcr.io/octavo-dev
TAG ?= 0.1.0
DOCKER_ARGS ?=

BIN := $(VENV)/bin
PACKAGES := operator/octavo_operator server/octavo_batches server/octavo_engine server/octavo_server server/octavo_gateway server/octavo_cli kernels/octavo_kernels
NATIVE := $(wildcard CMakeLists.txt kernels/octavo_kernels/cpu/src/*)

.PHONY: help demo test test-slow sanitize lint format bench crds chart locks images clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Octavo needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make demo PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "Could not create the virtual environment $(VENV). On Debian and Ubuntu: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }

# One stamp per set of extras: installing again is skipped until the project's own files change.
$(VENV)/.installed-%: pyproject.toml $(NATIVE) | $(BIN)/python
	@echo "Installing octavo[$*] into $(VENV) (the first time takes minutes: torch is large) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[$*]' || { \
	  echo "Installing failed. Check the network and the messages above; behind a mirror, set PIP_INDEX_URL or PIP_ARGS." >&2; exit 1; }
	@touch $@

demo: $(VENV)/.installed-demo ## Serve a real model on this machine and stream an answer
	@exec $(BIN)/octavo up -f examples/smollm2.yaml --port $(PORT) --ask "$(ASK)" $(if $(ONCE),--once)

test: $(VENV)/.installed-dev ## Run the tests
	@$(BIN)/python -m pytest $(TESTS) -m "not slow"

test-slow: $(VENV)/.installed-dev ## Run the heavier suites too
	@$(BIN)/python -m pytest $(TESTS)

# torch is not built with the sanitizers, so they are loaded before it and leaks are not counted.
sanitize: $(VENV)/.installed-dev ## Run the CPU kernels' tests under AddressSanitizer and UBSan
	@cmake -S . -B build/sanitize -DOCTAVO_SANITIZE=ON -DOCTAVO_NATIVE_DIR=$(CURDIR)/build/sanitize/lib > /dev/null
	@cmake --build build/sanitize --parallel
	@LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	  OCTAVO_CPU_LIBRARY=$(CURDIR)/build/sanitize/lib/_octavo_cpu.so $(BIN)/python -m pytest tests/kernels/cpu

lint: $(VENV)/.installed-dev ## Check format, style, types and who imports whom
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## Format the code and sort its imports
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

bench: $(VENV)/.installed-dev ## Measure the engine on this machine against peers
	@$(BIN)/python benchmarks/cpu_peers.py

crds: $(VENV)/.installed-dev ## Generate crds/ from the typed API
	@$(BIN)/python -m octavo_operator.api.crd

chart: ## Check the Helm chart and print what it installs (needs helm)
	@helm lint --strict charts/octavo
	@helm template octavo charts/octavo --namespace octavo-system

# torch for CPUs comes from PyTorch's own index, and brings nothing of CUDA.
LOCK := uv pip compile --quiet --upgrade --universal --python-version 3.12 --generate-hashes --no-header --no-annotate
FROM_CUDA := $(shell sed -nE 's/^(torch|triton|(nvidia|cuda)-[a-z0-9-]+)==.*/--no-emit-package \1/p' images/locks/engine-cuda.txt)

locks: ## Pin what the images install, with hashes (needs uv)
	$(LOCK) pyproject.toml --extra operator -o images/locks/operator.txt
	$(LOCK) pyproject.toml --extra gateway -o images/locks/gateway.txt
	$(LOCK) pyproject.toml --extra server --extra gpu -o images/locks/engine-cuda.txt
	$(LOCK) pyproject.toml --extra server $(FROM_CUDA) -o images/locks/engine-cpu.txt
	echo 'scikit-build-core>=0.11' | $(LOCK) - -o images/locks/build.txt

# With buildx and a registry, DOCKER_ARGS="--sbom=true --provenance=mode=max --push" attaches an SBOM and a provenance.
images: ## Build the container images, named $(REGISTRY)/octavo-* (needs docker)
	docker build $(DOCKER_ARGS) -f images/operator.Dockerfile -t $(REGISTRY)/octavo-operator:$(TAG) .
	docker build $(DOCKER_ARGS) -f images/gateway.Dockerfile -t $(REGISTRY)/octavo-gateway:$(TAG) .
	docker build $(DOCKER_ARGS) -f images/engine-cuda.Dockerfile -t $(REGISTRY)/octavo-engine:$(TAG) .
	docker build $(DOCKER_ARGS) -f images/engine-cpu.Dockerfile -t $(REGISTRY)/octavo-engine:$(TAG)-cpu .

clean: ## Remove what was built (the model cache stays)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .cmake .ninja_* .skbuild-info.json \
	  CMakeCache.txt CMakeFiles CMakeInit.txt build.ninja cmake_install.cmake kernels/octavo_kernels/cpu/*.so
