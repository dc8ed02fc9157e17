# Two commands: `make demo` and `make test`. Both make a virtual environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# What three workers and their processes compile is kept; of plugins only xdist is loaded, and only what is ours rewritten.
export PYTHONDONTWRITEBYTECODE =
export PYTEST_DISABLE_PLUGIN_AUTOLOAD = 1

.PHONY: demo test test-all check docs install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/fedssl pretrain experiment=demo

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -p xdist -n 3 --dist worksteal

test-all: check
	$(BIN)/python -m pytest -p xdist -n 3 --dist worksteal -m ""

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
