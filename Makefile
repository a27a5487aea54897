# Everything a newcomer needs; each target makes .venv and installs by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help

## help: list the targets
.PHONY: help
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

# Made again when pyproject.toml changes. The torch and torchvision of one index belong together: both are plain.
$(INSTALLED): pyproject.toml
	@echo "Installing into $(VENV) (the first time takes some minutes: torch with CUDA is 6 GB unpacked)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -c 'import lightning, torchvision, fedekd'
	touch $@

## install: make .venv and install the package with its development tools
.PHONY: install
install: $(INSTALLED)

## fit: run FedeKD on the digits, from nothing to figures (options: ARGS="--seed 1")
.PHONY: fit
fit: $(INSTALLED)
	$(BIN)/python orchestrator.py fit --config digits.yaml $(ARGS)

## benchmark: run the quick grid on the digits, and hold it against the paper (options: ARGS="--processes 2")
.PHONY: benchmark
benchmark: $(INSTALLED)
	$(BIN)/python orchestrator.py benchmark --config benchmark/quick.yaml $(ARGS)
	$(BIN)/python orchestrator.py report runs/quick

## tables: make the tables in README.md again from results/
.PHONY: tables
tables: $(INSTALLED)
	$(BIN)/python orchestrator.py report results --fill README.md

## bench: time fedekd beside a bare loop and a plain script, as ratios (options: ARGS="--only phases")
.PHONY: bench
bench: $(INSTALLED)
	$(BIN)/python -m perf $(ARGS)

# On a machine whose own Python has torch with CUDA and the other packages: make gpu PYTHON_GPU=python3
PYTHON_GPU ?= $(BIN)/python

## gpu: on one GPU, in 9 minutes: its tests, times of a step, a cell of the paper's grid (options: ARGS="--only bench")
.PHONY: gpu
gpu: $(if $(filter $(BIN)/python,$(PYTHON_GPU)),$(INSTALLED))
	$(PYTHON_GPU) -m perf.gpu $(ARGS)

# Ray and Flower are large and not everybody's: without them their tests are skipped, and say so.
EXTRAS := $(VENV)/.extras
$(EXTRAS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[ray,flower]'
	touch $@

## extras: install Ray and Flower, for clusters and for real sites
.PHONY: extras
extras: $(EXTRAS)

## bench-clients: 200 clients in one process, under Ray and by Flower's simulation (options: ARGS="--clients 50")
.PHONY: bench-clients
bench-clients: $(EXTRAS)
	$(BIN)/python -m perf.clients $(ARGS)

## sites: run a federation of three sites on this machine, with TLS and keys (options: ARGS="--secure true")
.PHONY: sites
sites: $(EXTRAS)
	rm -rf runs/sites
	$(BIN)/python -m examples.flower_deployment.rehearsal $(ARGS)

## test: run all tests and the coverage of fedekd/ (options: ARGS="-m 'not slow'")
.PHONY: test
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --cov --cov-report=term:skip-covered --cov-fail-under=90 --doctest-modules --nbmake --nbmake-timeout=600 $(ARGS)

## test-extras: run the tests of Ray and of Flower, which make test skips where they are not installed
.PHONY: test-extras
test-extras: $(EXTRAS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "ray or flower" tests $(ARGS)

## lint: check style and types
.PHONY: lint
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## format: put the sources in order
.PHONY: format
format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## notebooks: run the notebooks
.PHONY: notebooks
notebooks: $(INSTALLED)
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=600 notebooks

## wheel: build the wheel and the source archive into dist/
.PHONY: wheel
wheel: $(INSTALLED)
	$(BIN)/python -m build

## clean: remove what was built and cached, but no run and no data
.PHONY: clean
clean:
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
