# Everything that a developer or CI runs. `make demo` and `make test` need nothing but make and Python 3.11 or later.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install tools kernels sanitize model foreign demo test lint format protos charts clean

# The Python that makes .venv: the first found that is 3.11 or later. Override: make install PYTHON=/path/to/python
PYTHON ?= $(firstword $(foreach name,python3.11 python3 python3.12 python3.13,$(shell \
	command -v $(name) >/dev/null && $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
PY := .venv/bin/python
STAMP := .venv/.installed

PROTO_OUT ?= .
COMMON_PROTO := kvservice/v1/common.proto
SERVICE_PROTOS := kvservice/v1/sessions.proto kvservice/v1/inference.proto kvservice/v1/admin.proto \
	kvservice/internal/v1/worker.proto

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) model ## set up .venv with pinned packages, and fetch the model

KERNEL_SOURCES := setup.py $(wildcard kvservice/kernels/cpu/src/*)

$(STAMP): pyproject.toml constraints.txt $(KERNEL_SOURCES)
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later found. Install one, or run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
			echo "$(PYTHON) can't make a virtual environment: its ensurepip module is missing." >&2; \
			echo "Install it (Debian: apt-get install python3-venv), or run: make $(MAKECMDGOALS) PYTHON=/path/to/another/python" >&2; exit 1; }; \
		echo "Making .venv with $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv --clear .venv; \
	fi
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(PY) -c 'from kvservice.kernels.cpu.library import LIBRARY_FILE as f; f.exists() or print("No C++ compiler, so no CPU kernels: models run by torch alone. Install g++, then: make kernels")'
	@touch $@

HELM_STAMP := .venv/.helm

tools: $(HELM_STAMP) ## put helm and kubectl into .venv, for the chart's tests

$(HELM_STAMP): helm/install_helm.py $(STAMP)
	$(PY) helm/install_helm.py
	@touch $@

kernels: $(STAMP) ## build the CPU kernels again, and show the compiler's output
	$(PY) setup.py build_ext --inplace

# The sanitizers' library must be there before Python's own memory functions, and Python itself leaks by design.
sanitize: $(STAMP) ## run the kernels' tests under address and undefined-behaviour sanitizers
	KVSERVICE_SANITIZE=1 $(PY) setup.py -q build_ext --inplace --build-temp build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(PY) -m pytest -q -p no:cacheprovider --timeout 1200 tests/conformance/test_kernels.py tests/conformance/test_recall_kernels.py \
		tests/conformance/test_sampling_kernels.py tests/conformance/test_sharing_kernels.py; \
		status=$$?; $(PY) setup.py -q build_ext --inplace; exit $$status

model: $(STAMP)
	@$(PY) -m kvservice model fetch smollm2-135m

# Where npm isn't there the tests of a client in Node are skipped.
foreign: tests/foreign/node/node_modules ## fetch the packages of the test client in Node

tests/foreign/node/node_modules: tests/foreign/node/package-lock.json
	@{ command -v npm >/dev/null && npm ci --silent --no-audit --no-fund --ignore-scripts --prefix tests/foreign/node && touch $@; } || \
		echo "No npm, or no packages for it, so the client in Node isn't tested. Install Node 18 or later, then: make foreign"

demo: install ## a long document answered over gRPC by a real model, with the tiers in use
	$(PY) -m kvservice.demo

# Two at a time: many wait for processes that they start. A file's tests share those, so they stay together.
test: install tools foreign lint ## lint, and all tests that CI runs
	$(PY) -m pytest -n 2 --dist loadfile --durations 25

lint: $(STAMP) ## formatting, lint, types, layers, protos
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	.venv/bin/lint-imports
	.venv/bin/buf lint

format: $(STAMP) ## mend formatting and what lint can mend by itself
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

protos: $(STAMP) ## generate kvservice/v1 and kvservice/internal/v1 from protos/
	PATH=.venv/bin:$$PATH $(PY) -m grpc_tools.protoc -I protos \
		--python_out=$(PROTO_OUT) --mypy_out=$(PROTO_OUT) $(COMMON_PROTO) $(SERVICE_PROTOS)
	PATH=.venv/bin:$$PATH $(PY) -m grpc_tools.protoc -I protos \
		--grpc_python_out=$(PROTO_OUT) --mypy_grpc_out=$(PROTO_OUT) $(SERVICE_PROTOS)

charts: $(HELM_STAMP) ## generate the chart's schema and dashboards, and k8s/rendered
	PYTHONPATH=. $(PY) helm/generate.py

clean: ## remove .venv, caches and build products
	rm -rf .venv build dist *.egg-info kvservice/kernels/cpu/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
