# Every target does its own set-up on a fresh machine: a .venv, pinned dependencies, then the work.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup browser study test bench lint clean

setup: $(READY) browser

# torch first and pinned: with it installed nothing else pulls a CUDA build.
$(READY): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

# What the tests of the viewer's page drive; a study needs none.
browser:
	command -v chromium >/dev/null || ! command -v apt-get >/dev/null || { apt-get update && apt-get install -y chromium; } \
	  || echo "no Chromium: the viewer's page is not tested"

study: $(READY)
	$(BIN)/saccade study

test: $(READY) browser lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

bench: $(READY)
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/sparse.py
	$(BIN)/python benchmarks/linear.py
	$(BIN)/python benchmarks/hosts.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
