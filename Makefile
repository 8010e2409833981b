# Everything from a clean clone: Python 3.11 or newer with pip and venv, and make.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE ?= cxr-serve:$(VERSION)
BUILDER ?= docker build

PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.installed ## Make .venv (TORCH_INDEX=URL: also look for PyTorch there, e.g. a CPU build)

# The stamp is written last, so an interrupted setup runs again. Modules are compiled when they are
# first imported: most never are, and compiling all of them doubles the time.
$(VENV)/.installed: pyproject.toml requirements/dev.txt requirements/tools.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found; name one with PYTHON=PATH." >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) install --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --requirement requirements/dev.txt
	$(PIP) install --no-deps --requirement requirements/tools.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

.PHONY: demo
demo: setup ## Train, archive, serve, ask (DATA=FOLDER: on real images; IMAGES=FOLDER: ask about these too)
	$(BIN)/python demo/demo.py --out "$(OUT)" $(if $(DATA),--data "$(DATA)") \
		$(if $(IMAGES),--images "$(IMAGES)") $(if $(MIN_ACCURACY),--min-accuracy $(MIN_ACCURACY))

.PHONY: test
test: setup ## Run all tests
	$(PYTEST)

.PHONY: test-unit
test-unit: setup ## Run the unit tests
	$(PYTEST) tests/unit

.PHONY: test-integration
test-integration: setup ## Run the tests that start real servers
	$(PYTEST) tests/integration

.PHONY: e2e
e2e: setup ## Try everything on the cluster of KUBECONFIG (CONTRIBUTING.md: settings; ONLY=EXPRESSION: some of it)
	$(PYTEST) tests/e2e $(if $(ONLY),-k "$(ONLY)")

.PHONY: images
images: ## Build the serving image (BUILDER="podman build"; BUILD_ARGS="--build-arg DEVICE=cuda ...")
	$(BUILDER) --file server/Dockerfile --tag $(IMAGE) --build-arg VERSION=$(VERSION) \
		--build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null || echo unknown) $(BUILD_ARGS) .

.PHONY: push
push: ## Push the serving image (REGISTRY=registry.example.org/team)
	@test -n "$(REGISTRY)" || { echo "Name a registry: make push REGISTRY=registry.example.org/team" >&2; exit 1; }
	docker tag $(IMAGE) $(REGISTRY)/$(IMAGE)
	docker push $(REGISTRY)/$(IMAGE)

.PHONY: lint
lint: setup ## Check style, types and the arrows between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: setup ## Format the code and fix what can be fixed safely
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: lock
lock: ## Pin requirements/*.txt to pyproject.toml (UPGRADE=1: to the newest versions)
	test -x $(BIN)/uv || $(MAKE) setup
	mkdir -p requirements
	$(call compile,dev,--all-extras --group dev)
	$(call compile,serving,--extra serving --constraint requirements/dev.txt)
	$(call compile,training,--extra training --constraint requirements/dev.txt)

# PyTorch pins its CUDA libraries itself, in its CUDA builds only. Listed here they would be
# installed beside a CPU build too, several GB for nothing.
define compile
$(BIN)/uv --quiet pip compile pyproject.toml $(2) $(if $(UPGRADE),--upgrade) \
	--universal --python-version 3.11 --no-annotate --custom-compile-command "make lock" \
	--output-file requirements/$(1).txt
sed -i.bak -E '/^(nvidia-|cuda-|triton==)/d' requirements/$(1).txt
rm requirements/$(1).txt.bak
endef

.PHONY: clean
clean: ## Remove what was built and cached, .venv included; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
