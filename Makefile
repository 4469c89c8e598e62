# make demo   train the quickstart recipe on generated scenes, evaluate it, write runs/quickstart/report.html
# make test   the whole test suite
# make lint   format, lint and types
# make env    only the virtual environment (.venv)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= runs/quickstart
TEST_PROCESSES ?= 2
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint env clean

demo: env
	rm -rf $(DEMO)
	$(BIN)/harmony train quickstart --out $(DEMO)
	@echo "The report: $(DEMO)/report.html"

test: env
	$(BIN)/python -m pytest -n $(TEST_PROCESSES)

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

env: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/harmony.egg-info
