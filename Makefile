# `make demo` and `make test` do all set-up by themselves: a fresh clone needs Python 3.11 or later and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow

demo: .venv/ready
	$(BIN)/dpdm demo --workdir runs/demo

test: .venv/ready
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
