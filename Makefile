# Everything lives in .venv; nothing is installed elsewhere.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
PROTOS := $(wildcard proto/headrace/v1/*.proto proto/headrace/backend/v1/*.proto)
KERNELS := $(wildcard backends/kernels/*.* backends/kernels/headrace_kernels/*.py backends/kernels/src/*)
GPU_VENV := .venv-gpu
NODE_FOLDERS := clients/node backends/examples/node-backend

.PHONY: run test soak gpu check lint types contracts proto docs generate clean

# Installs, builds the default model, serves it and streams a first answer. Ctrl-C stops it.
run: $(VENV)/.serve $(VENV)/.kernels
	@# In a process group of its own, so that Ctrl-C reaches it and not make, which would end with an error.
	@bash -c 'set -m; $(BIN)/headrace quickstart; exit $$?'

# Installs what the tests need and runs them.
test: $(VENV)/.dev $(VENV)/.tested-kernels $(NODE_FOLDERS:=/node_modules)
	$(BIN)/headrace models build smollm2-135m --if-missing
	$(BIN)/pytest

# What is too long for CI: kill loops, cancels by the thousand, memory over half an hour.
soak: $(VENV)/.dev $(VENV)/.tested-kernels
	$(BIN)/headrace models build smollm2-135m --if-missing
	$(BIN)/pytest -m soak --timeout 3600

# On a machine with a GPU: all that needs one, and the report gpu-report.md. In an environment of its own, since the two
# packages of ONNX Runtime exclude each other. PEER is an interpreter that has torch and transformers.
gpu: $(GPU_VENV)/.installed
	$(GPU_VENV)/bin/python -m tests.gpu $(if $(PEER),--peer-python $(PEER))

# Everything CI checks beside the tests.
check: lint types contracts proto docs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CC) -std=gnu11 -O1 -Wall -Wextra -Werror -fsyntax-only backends/kernels/src/*.c

types: $(VENV)/.dev
	$(BIN)/mypy

contracts: $(VENV)/.dev
	$(BIN)/lint-imports

# Lints the protos and fails if the committed modules are not what they generate.
proto: $(VENV)/.dev generate
	$(BIN)/buf lint
	git diff --exit-code -- proto
	@test -z "$$(git status --porcelain -- proto)" || { git status --short -- proto; echo 'commit the generated modules'; exit 1; }

# Builds the documentation into site/; a warning is an error. The variable silences a banner.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Generates the Python modules from the protos.
generate: $(VENV)/.dev
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --pyi_out=proto --grpc_python_out=proto $(PROTOS)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip

$(VENV)/.serve: $(VENV)/bin/python pyproject.toml
	@echo 'Installing headrace into $(VENV) …'
	@$(PIP) install --editable '.[serve,build]'
	@touch $@

# The compiled operators are optional: without them a model runs on ONNX Runtime's own.
$(VENV)/.kernels: $(VENV)/bin/python $(KERNELS)
	@$(PIP) install ./backends/kernels || echo 'headrace-kernels was not compiled; serving goes on without it, slower.'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(PIP) install --editable '.[serve,postgres,prices,remote,redis,build,bench,dev]'
	@touch $@ $(VENV)/.serve

# For tests they are not.
$(VENV)/.tested-kernels: $(VENV)/bin/python $(KERNELS)
	$(PIP) install ./backends/kernels
	@touch $@ $(VENV)/.kernels

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) install --editable '.[docs]'
	@touch $@

$(GPU_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip --quiet --disable-pip-version-check install --editable '.[cuda,build,dev]'
	@touch $@

%/node_modules: %/package.json %/package-lock.json
	npm ci --silent --no-audit --no-fund --prefix $*
	@touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) site backends/kernels/build backends/kernels/*.egg-info $(NODE_FOLDERS:=/node_modules)
