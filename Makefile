# make demo   draw images with the embedded model
# make test   run the test suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-full check fix build clean

demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.tested-with
	$(BIN)/python -m pytest -n auto --dist worksteal

test-full: $(VENV)/.tested-with
	$(BIN)/python -m pytest -m "full or not full" -s

check: $(VENV)/.tested-with
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(VENV)/.tested-with
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(VENV)/.tested-with
	$(BIN)/pip install -q -c constraints.txt build
	rm -rf build dist
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.installed: setup.py constraints.txt
	@echo "Setting up $(VENV): pip fetches torch and what it needs; this takes minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

$(VENV)/.tested-with: $(VENV)/.installed
	@echo "Adding what the tests need."
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@
