# Everything starts from a fresh clone: each target makes .venv first if it is missing or out of date.
PYTHON ?= python3
EXTRAS ?= dev
BIN := .venv/bin

.PHONY: setup demo demo-edge test lint check bench clean
.DEFAULT_GOAL := check

setup: .venv/$(EXTRAS)

.venv/$(EXTRAS): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "eckart needs Python 3.10 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	rm -rf runs/demo
	$(BIN)/eckart demo --out runs/demo

demo-edge:
	$(MAKE) setup EXTRAS=dev,export,recover
	PYTHON=$(PYTHON) BIN=$(BIN) scripts/demo_edge.sh runs/demo-edge

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

check: lint test

bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/search.py

clean:
	rm -rf .venv runs build dist src/*.egg-info
