# make demo: train on handwritten digits and sample new ones.   make test: lint, types, tests.   make bench: speed.
# make test-slow: the slow tests.   make test-oldest: the tests on the oldest supported versions.   make test-gpu: those that a GPU is tested with.
# Without an NVIDIA GPU, and where its wheel is known by its hash, PyTorch is its CPU build; TORCH=pypi or TORCH=cpu decides.
# PIP_OPTIONS is handed to pip.

PYTHON ?= python3
PIP_OPTIONS ?=
TORCH ?= $(shell $(PYTHON) requirements/torch_build.py)
BIN := .venv/bin
PIP := -m pip install --quiet --disable-pip-version-check
# Every wheel has a hash in requirements/, or pip refuses it. An editable package cannot have one: it goes in alone.
LOCKED := $(BIN)/python $(PIP) $(PIP_OPTIONS) --require-hashes --no-deps --only-binary :all: --requirement
THIS := $(BIN)/python $(PIP) --no-deps --no-build-isolation --editable .

.PHONY: demo test coverage test-slow test-oldest test-gpu bench lock clean

demo: .venv/installed
	@out=runs/demo; n=2; while [ -e $$out ]; do out=runs/demo-$$n; n=$$((n + 1)); done; \
	$(BIN)/ddpm-fast train --preset digits --out $$out && \
	$(BIN)/ddpm-fast sample $$out && \
	echo "new digits: $$out/samples/dpm++-20-seed0/grid.png (one by one beside it; how they grew: $$out/samples)"

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# Which lines no test runs. Tracing them takes as long again as a third of the tests.
coverage: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --cov --cov-report=term

# What is slow by nature: whole compilations, every kernel for every architecture, commands from end to end.
test-slow: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# All that needs no GPU, on the oldest PyTorch, Triton and NumPy that are supported. PyPI's build for CUDA, which needs no
# GPU to run either: some gigabytes.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal -m "not compile_matrix"

test-gpu: .venv/installed-test
	$(BIN)/python -m pytest -m gpu -n 8 --dist worksteal

bench: .venv/installed-test
	$(BIN)/python -m pytest bench --benchmark-only

.venv/installed: pyproject.toml requirements/run.txt requirements/torch-$(TORCH).txt
	$(PYTHON) -m venv .venv
	$(LOCKED) requirements/torch-$(TORCH).txt
	$(LOCKED) requirements/run.txt
	$(THIS)
	@touch $@

.venv/installed-test: .venv/installed requirements/test.txt
	$(LOCKED) requirements/test.txt
	@touch $@

# As constraints, without hashes, and without what is exchanged or belongs to the newer PyTorch.
.venv-oldest/installed: pyproject.toml requirements/test.txt
	$(PYTHON) -m venv .venv-oldest
	grep -E '^[a-z]' requirements/test.txt | grep -vE '^(triton|numpy|setuptools)=' | sed 's/ \\$$//' \
		> .venv-oldest/constraints.txt
	.venv-oldest/bin/python $(PIP) --constraint .venv-oldest/constraints.txt $(PIP_OPTIONS) \
		torch==2.11.0 triton==3.6.0 numpy==2.3.5 --editable '.[test]'
	@touch $@

COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --only-binary :all: --no-annotate \
	--custom-compile-command "make lock"
WITHOUT_TORCH = --constraint requirements/torch-pypi.txt \
	$$(sed -nE 's/^(torch|(nvidia|cuda)-[a-z0-9-]+)==.*/--no-emit-package \1/p' requirements/torch-pypi.txt)

# Needs uv (https://docs.astral.sh/uv). Versions stay as they are; with UPGRADE=--upgrade they become the newest. The hash of
# another PyTorch's CPU build, from https://download.pytorch.org/whl/cpu, goes into requirements/torch-cpu.txt by hand.
lock:
	echo torch==2.13.0 | $(COMPILE) $(UPGRADE) - --output-file requirements/torch-pypi.txt
	$(COMPILE) $(UPGRADE) $(WITHOUT_TORCH) pyproject.toml --extra hub --extra test --output-file requirements/test.txt
	$(COMPILE) $(WITHOUT_TORCH) --constraint requirements/test.txt pyproject.toml --output-file requirements/run.txt

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info
