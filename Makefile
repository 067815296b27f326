# make demo: train on handwritten digits and sample new ones.   make test: lint, types, tests.   make bench: speed.
# make test-slow: the slow tests.   make test-oldest: the tests on the oldest supported versions.   make test-gpu: those that a GPU is tested with.
# PIP_OPTIONS is handed to pip, e.g. PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_OPTIONS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_OPTIONS)

.PHONY: demo test test-slow test-oldest test-gpu bench clean

demo: .venv/installed
	@out=runs/demo; n=2; while [ -e $$out ]; do out=runs/demo-$$n; n=$$((n + 1)); done; \
	$(BIN)/ddpm-fast train --preset digits --out $$out && \
	$(BIN)/ddpm-fast sample $$out && \
	echo "new digits: $$out/samples/dpm++-20-seed0/grid.png (one by one beside it; how they grew: $$out/samples)"

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
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

bench: .venv/installed-bench
	$(BIN)/python -m pytest bench --benchmark-only

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP) --editable '.[test]'
	@touch $@

.venv/installed-bench: .venv/installed
	$(PIP) --editable '.[bench]'
	@touch $@

.venv-oldest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	sed -E 's/^(torch)==.*/\1==2.11.0/; s/^(triton)==.*/\1==3.6.0/; s/^(numpy)==.*/\1==2.3.5/' constraints.txt \
		> .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint .venv-oldest/constraints.txt $(PIP_OPTIONS) --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info
