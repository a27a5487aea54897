# Common tasks. Each target creates .venv and installs the package first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help

## help: list the targets
.PHONY: help
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

# Reinstalled when pyproject.toml changes. torch and torchvision must come from the same index.
$(INSTALLED): pyproject.toml
	@echo "Installing into $(VENV) (a few minutes the first time: torch with CUDA needs 6 GB)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -c 'import lightning, torchvision, fedekd'
	touch $@

## install: create .venv and install the package with its development tools
.PHONY: install
install: $(INSTALLED)

## fit: train FedeKD on digits, with figures (options: ARGS="--seed 1")
.PHONY: fit
fit: $(INSTALLED)
	$(BIN)/python orchestrator.py fit --config digits.yaml $(ARGS)

## benchmark: run a small grid of methods on digits, and write a report of it (options: ARGS="--processes 2")
.PHONY: benchmark
benchmark: $(INSTALLED)
	$(BIN)/python orchestrator.py benchmark --config benchmark/quick.yaml $(ARGS)
	$(BIN)/python orchestrator.py report runs/quick

## paper-report: compare results/ with the published tables of the paper (options: ARGS="--root data")
.PHONY: paper-report
paper-report: $(INSTALLED)
	$(BIN)/python -m experiments.fedekd_paper $(ARGS)

## tables: render the pages in docs/results/ from results/
.PHONY: tables
tables: $(INSTALLED)
	$(BIN)/python -m experiments.result_pages

## docs: build the documentation into docs/_build/html; warnings are errors (options: ARGS="-D nb_execution_mode=off")
.PHONY: docs
docs: $(INSTALLED)
	$(BIN)/python -m sphinx -W --keep-going -n -b html docs docs/_build/html $(ARGS)

## bench: compare the speed of fedekd with a bare loop and a typical script (options: ARGS="--only phases")
.PHONY: bench
bench: $(INSTALLED)
	$(BIN)/python -m perf $(ARGS)

# On a machine whose own Python has torch with CUDA and the other packages: make gpu PYTHON_GPU=python3
PYTHON_GPU ?= $(BIN)/python

## gpu: on one GPU, in 9 minutes: its tests, times of a step, a cell of the paper's grid (options: ARGS="--only bench")
.PHONY: gpu
gpu: $(if $(filter $(BIN)/python,$(PYTHON_GPU)),$(INSTALLED))
	$(PYTHON_GPU) -m perf.gpu $(ARGS)

# Ray, Flower, Hugging Face datasets, timm, peft, other loggers and ONNX are optional; without them their tests are skipped.
EXTRAS := $(VENV)/.extras
$(EXTRAS): $(INSTALLED) examples/serve/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[ray,flower,hf,timm,lora,loggers,export]' \
		-r examples/serve/requirements.txt
	touch $@

## extras: install Ray, Flower, Hugging Face datasets, timm, peft, TensorBoard, MLflow, ONNX and FastAPI
.PHONY: extras
extras: $(EXTRAS)

## bench-clients: compare engines with 200 clients: one process, Ray, Flower (options: ARGS="--clients 50")
.PHONY: bench-clients
bench-clients: $(EXTRAS)
	$(BIN)/python -m perf.clients $(ARGS)

## bench-many: time, memory and disk of one process with many clients (options: ARGS="--clients 1000 --against CHECKOUT")
.PHONY: bench-many
bench-many: $(INSTALLED)
	$(BIN)/python -m perf.many_clients $(ARGS)

# fluke and pfl-research have an environment of their own, which sees the packages of the other one.
PEERS := .venv-peers
$(PEERS)/.installed: $(INSTALLED) perf/peers/requirements.txt
	$(BIN)/python -m venv $(PEERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > `echo $(PEERS)/lib/python*/site-packages`/base.pth
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r perf/peers/requirements.txt
	touch $@

## bench-peers: compare FedAvg with a bare loop, fluke, pfl-research and Flower (options: ARGS="--rounds 3")
.PHONY: bench-peers
bench-peers: $(PEERS)/.installed
	$(BIN)/python -m perf.peers --peers $(PEERS)/bin/python $(ARGS)

## sites: run a federation of three sites on this machine, with TLS and keys (options: ARGS="--secure true")
.PHONY: sites
sites: $(EXTRAS)
	rm -rf runs/sites
	$(BIN)/python -m examples.flower_deployment.rehearsal $(ARGS)

## test: run the fast tests (options: ARGS="-k metrics")
.PHONY: test
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not (slow or ray or flower)" --doctest-modules tests fedekd experiments $(ARGS)

# Tests of Ray and Flower start clusters: see test-extras.
## test-all: run all tests but those of Ray and Flower, and the notebooks (options: ARGS="-k metrics")
.PHONY: test-all
test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not (ray or flower)" --doctest-modules --nbmake --nbmake-timeout=600 $(ARGS)

## coverage: run all tests with the coverage of fedekd/, at least 90%; takes a third longer than test-all
.PHONY: coverage
coverage: $(INSTALLED)
	$(MAKE) test-all ARGS="--cov --cov-report=term:skip-covered --cov-fail-under=90 $(ARGS)"

## test-extras: run the tests of Ray, Flower, Hugging Face datasets, timm, peft, TensorBoard, MLflow and exports
.PHONY: test-extras
test-extras: $(EXTRAS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "ray or flower or hf or timm or lora or loggers or export" tests $(ARGS)

## lint: check style and types
.PHONY: lint
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## format: format the sources
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

## clean: remove build and cache files; keep runs and data
.PHONY: clean
clean:
	rm -rf dist build docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
