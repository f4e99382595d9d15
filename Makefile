# make quickstart   set up .venv and train a small language model on built-in text
# make test         set up .venv and run the tests
# make lint         ruff and mypy
# make bench        measure speed and memory against peers; results in bench/results

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test lint bench clean

quickstart: .venv/.train
	$(BIN)/zero2hero quickstart

test: .venv/.dev
	$(BIN)/python -m pytest -q

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.dev
	$(BIN)/python bench/run.py

# Each stamp says: everything that pyproject.toml asks for is installed, at the versions of constraints.txt.
.venv/.train: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[train]'
	touch $@

.venv/.dev: .venv/.train pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
