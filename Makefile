# make demo            the whole straight line on a real model (see benchmarks/demo)
# make test            the whole suite, on two processes
# make check           lint, format, types and the import arrow
# make release-check   build, install in a clean environment, try what a new user would
# make methods-report  every method against every check, with the measured errors
# make quality         the CPU slice of the quality benchmark
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.PHONY: env demo test test-fast check build release-check format methods-report quality clean

env: $(STAMP)

$(STAMP): pyproject.toml requirements/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt --editable '.[dev]'
	touch $@

demo: env
	$(BIN)/python -m benchmarks.demo

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-fast: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

build: env
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

release-check:
	$(PYTHON) tools/release_check.py

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

methods-report: env
	$(BIN)/python -m benchmarks.methods_report --speed

quality: env
	$(BIN)/python -m benchmarks.quality.cpu_slice

clean:
	rm -rf $(VENV) .cache outputs dist build
