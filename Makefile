# Everything from a clean clone: Python 3.11 or newer with pip and venv, and make.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
SPARK_OUT ?= runs/spark-demo
BENCH_OUT ?= runs/bench
LOADTEST_OUT ?= runs/loadtest
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE ?= cxr-serve:$(VERSION)
TRAINING_IMAGE ?= cxr-training:$(VERSION)
LOADTEST_IMAGE ?= cxr-loadtest:$(VERSION)
PORTAL_IMAGE ?= cxr-portal:$(VERSION)
ENGINE ?= docker
BUILDER ?= $(ENGINE) build

PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
# Tests of one file share their servers. The servers mostly wait, so that two files do at once.
TESTS_AT_ONCE ?= 2
TESTS := $(PYTEST) --numprocesses $(TESTS_AT_ONCE) --dist loadfile
# Schemathesis gives the tests of all operations one id, and pytest-xdist would run the first only.
CONTRACT := tests/integration/portal/test_portal_contract.py

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

.PHONY: spark-demo
spark-demo: setup ## Manifest and batch predictions on two Spark executors, compared with one machine
	$(BIN)/python demo/spark_demo.py --out "$(SPARK_OUT)"

.PHONY: bench
bench: setup ## Measure us beside our peers (DATA=FOLDER: a model of real images; BENCH="--subjects inprocess ...")
	$(BIN)/python bench/bench.py --out "$(BENCH_OUT)" --page docs/benchmarks.md \
		$(if $(DATA),--data "$(DATA)" --command "make bench DATA=FOLDER") $(BENCH)

.PHONY: bench-overhead
bench-overhead: setup ## Measure what metrics, logs and traces cost (DATA=FOLDER; BENCH="--rounds 40 ...")
	$(BIN)/python bench/overhead.py --out "$(BENCH_OUT)" --page docs/benchmarks.md \
		$(if $(DATA),--data "$(DATA)" --command "make bench-overhead DATA=FOLDER") $(BENCH)

.PHONY: bench-openvino
bench-openvino: setup ## Measure whether OpenVINO would be faster (DATA=FOLDER)
	$(BIN)/python bench/providers.py --out "$(BENCH_OUT)" --page docs/benchmarks.md $(if $(DATA),--data "$(DATA)")

.PHONY: bench-gpu
bench-gpu: setup ## Measure what a GPU is worth (on one, with onnxruntime-gpu; DATA=FOLDER)
	$(BIN)/python bench/gpu.py --out "$(BENCH_OUT)/gpu" --page docs/benchmarks.md $(if $(DATA),--data "$(DATA)") $(BENCH)

.PHONY: loadtest
loadtest: setup ## Load test with a verdict (HOST=URL: a running service, else the demo's; LOADTEST="--shape step ...")
	$(if $(HOST),,test -f "$(OUT)/cxr.mar" || $(MAKE) demo)
	$(BIN)/cxr loadtest run $(if $(HOST),--host "$(HOST)",--serve "$(OUT)/cxr.mar") --shape ship \
		--out "$(LOADTEST_OUT)" $(LOADTEST)

.PHONY: bench-portal
bench-portal: setup ## Measure what the portal adds to a model (MODEL=runs/demo/cxr.mar)
	$(BIN)/python bench/portal.py $(or $(MODEL),$(OUT)/cxr.mar)

PAGE := portal/cxr_portal/static/index.html

.PHONY: page
page: $(PAGE) ## Build the portal's page

# Node.js and npm come from PyPI, too.
$(PAGE): $(VENV)/.installed portal/web/package-lock.json portal/web/openapi.json $(wildcard portal/web/*.ts portal/web/*.html portal/web/src/*)
	PATH="$(abspath $(BIN)):$$PATH" npm --prefix portal/web --silent ci
	PATH="$(abspath $(BIN)):$$PATH" npm --prefix portal/web --silent run build
	touch $@

.PHONY: portal
portal: page ## A small model behind the portal: http://127.0.0.1:8090 (OUT=FOLDER: another demo's model)
	test -f "$(OUT)/cxr.mar" || $(MAKE) demo
	$(BIN)/cxr portal "$(OUT)/cxr.mar" --database "sqlite:///$(OUT)/portal.db"

.PHONY: openapi
openapi: setup ## Write the document of the portal's API again
	$(BIN)/cxr portal openapi > portal/web/openapi.json

.PHONY: test
test: setup ## Run all tests (TESTS_AT_ONCE=2: of how many files at a time)
	$(TESTS) --ignore $(CONTRACT)
	$(PYTEST) $(CONTRACT)

.PHONY: test-unit
test-unit: setup ## Run the unit tests
	$(TESTS) tests/unit

.PHONY: test-integration
test-integration: setup ## Run the tests that start real servers
	$(TESTS) tests/integration --ignore $(CONTRACT)
	$(PYTEST) $(CONTRACT)

.PHONY: test-browser
test-browser: page ## Use the portal's page in Chromium (CXR_CHROMIUM=PATH: which); screenshots in runs/
	$(PYTEST) tests/browser

.PHONY: rules
rules: setup ## Test each alert of the chart with promtool, which must be on the PATH
	$(PYTEST) tests/rules

.PHONY: fuzz
fuzz: setup ## Ask both runtimes 10,000 times, 20 % of it hostile (REQUESTS=NUMBER)
	$(if $(REQUESTS),REQUESTS=$(REQUESTS)) $(PYTEST) tests/fuzz

.PHONY: e2e
e2e: setup ## Try everything on the cluster of KUBECONFIG (CONTRIBUTING.md: settings; ONLY=EXPRESSION: some of it)
	$(PYTEST) tests/e2e -m "not long" $(if $(ONLY),-k "$(ONLY)")

.PHONY: chaos
chaos: setup ## Faults under load on the cluster, promised against observed (settings as e2e; ONLY=EXPRESSION)
	$(PYTEST) tests/e2e/test_e2e_chaos.py $(if $(ONLY),-k "$(ONLY)")

.PHONY: test-gpu
test-gpu: setup ## Training, engine and both runtimes on an NVIDIA GPU (with onnxruntime-gpu in place of onnxruntime)
	$(PYTEST) tests/gpu

.PHONY: capacity-e2e
capacity-e2e: setup ## The simulated autoscaling beside the cluster's own (settings as e2e)
	$(PYTEST) tests/e2e/test_e2e_capacity.py

.PHONY: observe-e2e
observe-e2e: setup ## Alerts by promtool, then metrics, dashboards and alerts live; as e2e, with promtool on the PATH
	$(PYTEST) tests/rules tests/e2e/test_e2e_observe.py

.PHONY: images
images: ## Build the serving image (ENGINE=podman; BUILD_ARGS="--build-arg RUNTIME=inprocess ...")
	$(call build,server/Dockerfile,$(IMAGE))

.PHONY: training-image
training-image: ## Build the image of the training environment with JupyterLab
	$(call build,training/Dockerfile,$(TRAINING_IMAGE))

.PHONY: loadtest-image
loadtest-image: ## Build the image that charts/cxr-loadtest runs
	$(call build,loadtests/Dockerfile,$(LOADTEST_IMAGE))

.PHONY: portal-image
portal-image: ## Build the image of the portal
	$(call build,portal/Dockerfile,$(PORTAL_IMAGE))

define build
$(BUILDER) --file $(1) --tag $(2) --build-arg VERSION=$(VERSION) \
	--build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null || echo unknown) $(BUILD_ARGS) .
endef

.PHONY: push
push: ## Push the serving image (REGISTRY=registry.example.org/team; ENGINE=podman)
	@test -n "$(REGISTRY)" || { echo "Name a registry: make push REGISTRY=registry.example.org/team" >&2; exit 1; }
	$(ENGINE) tag $(IMAGE) $(REGISTRY)/$(IMAGE)
	$(ENGINE) push $(REGISTRY)/$(IMAGE)

.PHONY: sbom
sbom: ## Print what is in the serving image, as CycloneDX JSON
	@$(ENGINE) run --rm --entrypoint cat $(IMAGE) /opt/cxr/share/sbom.cdx.json

.PHONY: lint
lint: setup ## Check style, types and the arrows between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy bench/*.py demo/*.py
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
	$(call compile,serving,--extra serving --extra tracing --constraint requirements/dev.txt)
	$(call compile,torchserve,--extra torchserve --extra tracing --constraint requirements/torchserve.in --constraint <(sed '/^torch==/d' requirements/dev.txt))
	$(call compile,portal,--extra portal --extra lambda --extra tracing --constraint requirements/dev.txt)
	$(call compile,training,--extra training --extra spark --extra notebook --constraint requirements/dev.txt)
	$(call compile,loadtest,--extra loadtest --constraint requirements/dev.txt)
	$(call compile-peer,bentoml)
	$(call compile-peer,kserve)
	$(call compile-peer,litserve)
	$(call compile-peer,mlserver)
	$(call compile-peer,openvino)
	$(call compile-peer,ray)
	$(call compile-peer,stock,--no-deps)

# PyTorch pins its CUDA libraries itself, in its CUDA builds only. Listed here they would be
# installed beside a CPU build too, several GB for nothing.
define compile
$(BIN)/uv --quiet pip compile pyproject.toml $(2) $(if $(UPGRADE),--upgrade) \
	--universal --python-version 3.11 --no-annotate --custom-compile-command "make lock" \
	--output-file requirements/$(1).txt
sed -i.bak -E '/^(nvidia-|cuda-|triton==)/d' requirements/$(1).txt
rm requirements/$(1).txt.bak
endef

# The benchmark's peers, each in an environment of its own: with the engine of the serving image.
define compile-peer
$(BIN)/uv --quiet pip compile bench/requirements/$(1).in $(2) $(if $(UPGRADE),--upgrade) \
	--constraint <(grep -E '^(numpy|onnxruntime|pillow)==' requirements/serving.txt) \
	--universal --python-version 3.11 --no-annotate --custom-compile-command "make lock" \
	--output-file bench/requirements/$(1).txt
endef

.PHONY: clean
clean: ## Remove what was built and cached, .venv included; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
