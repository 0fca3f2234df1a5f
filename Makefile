# `make demo` and `make test` do all set-up by themselves: a fresh clone needs Python 3.11 or later and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: assurance benchmark demo quality test test-slow tests types

demo: .venv/ready
	$(BIN)/dpdm demo --workdir runs/demo

test: .venv/ready
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(MAKE) --no-print-directory --jobs 2 types tests

# Side by side, as the type checker alone would leave a core idle for a minute.
types: .venv/ready
	$(BIN)/pyright --pythonpath $(BIN)/python

tests: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

# What docs/assurance.md lists: attacks on guarantee, books and input, the quick ones of `make test` and the slow ones.
assurance: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile tests/privacy tests/hostile tests/test_audit.py \
		tests/test_verify.py tests/test_statement.py tests/test_foreign_pickles.py tests/faults tests/test_files.py tests/test_groups.py tests/test_train_privacy.py

# Nothing else should run meanwhile. Rewrites the tables of docs/performance.md that need no GPU.
benchmark: .venv/ready-to-benchmark
	$(BIN)/python benchmarks/dp_step.py --rounds 3 --peers opacus_hooks --docs
	$(BIN)/python benchmarks/sampling.py --docs
	$(BIN)/python benchmarks/scaling.py --docs

# Figures of the demo's release and of the pretrained ones for which data are given, into docs/results.md:
# make quality MNIST=path/to/mnist FMNIST=path/to/fashion_mnist
MNIST ?=
FMNIST ?=
quality: .venv/ready
	test -d runs/demo/release || $(BIN)/dpdm demo --workdir runs/demo
	$(BIN)/python benchmarks/quality.py --release runs/demo/release --name digits_eps_10.0 --data digits --docs
	@left=; for name in $$($(BIN)/python -c 'from dpdm import pretrained; print(*pretrained.names())'); do \
		case $$name in mnist_*) data='$(MNIST)' ;; fmnist_*) data='$(FMNIST)' ;; *) data= ;; esac; \
		if [ -z "$$data" ]; then left="$$left $$name"; continue; fi; \
		$(BIN)/python benchmarks/quality.py --pretrained "$$name" --data "$$data" --docs || exit 1; \
	done; [ -z "$$left" ] || echo "Left out for want of MNIST=path or FMNIST=path:$$left"

.venv/ready-to-benchmark: .venv/ready
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[benchmark]'
	touch $@

# Python compiles what is used when it is first imported; to compile all that is installed takes longer than to fetch it.
.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@
