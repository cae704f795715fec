# make demo    set up, then train, evaluate and show a small Flamingo on this machine (10 minutes on 2 cores)
# make test    set up, then run all tests
VENV   ?= .venv
PYTHON ?= python3
PY      = $(VENV)/bin/python
OUT    ?= runs/demo

.PHONY: help setup test test-fast check demo clean
help:
	@sed -n 's/^# //p' Makefile

# The marker is written last: an interrupted installation is done again.
setup: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else f"error: Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@

test: setup
	$(PY) -m pytest

test-fast: setup
	$(PY) -m pytest -m 'not slow'

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf runs .mypy_cache .ruff_cache .pytest_cache
