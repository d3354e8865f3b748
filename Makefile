# Everything sets itself up in .venv; a machine needs Python 3.11+, make and, for the CPU kernels, a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: tui test lint types check bench bench-gpu screenshots clean

tui: $(STAMP)
	$(BIN)/dsv4-bench tui

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy finds the packages through a link, as their folders are mapped by pyproject.toml.
types: $(STAMP)
	mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/dsv4_bench
	cd $(VENV)/src && ../bin/mypy --config-file ../../pyproject.toml -p dsv4_bench.engine -p dsv4_bench.probes -p dsv4_bench.workbench

check: lint types test

bench: $(STAMP)
	$(BIN)/python tests/bench_cpu.py
	$(BIN)/python tests/bench_engine.py
	$(BIN)/python tests/bench_check.py

# On a machine with a Hopper GPU: builds, then microseconds, floor and peers of every CUDA op and shape; JSON into build/gpu.
bench-gpu: $(STAMP)
	PATH=$(CURDIR)/$(BIN):$$PATH tests/gpu_run.sh build/gpu build layer bench

screenshots: $(STAMP)
	$(BIN)/python tests/tui/screenshots.py docs

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
