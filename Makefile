# `make tune` and `make test` work on a fresh clone: each builds .venv first.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/digits_resmlp

.PHONY: test test-all lint tune bench clean

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=10 -m 'not slow'

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

tune: .venv/.installed
	$(BIN)/playbook-optax tune digits_resmlp --directory $(OUT)

bench: .venv/.installed
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
