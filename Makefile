# make demo   draw images with the embedded model
# make test   run the test suite
# make bench-scale   what a picture costs as work grows: tables and a plot for docs/performance.md
# make screenshots   the pictures of the page in docs/images, drawn anew
# make bench   how fast the engines are, beside diffusers and OpenVINO: minutes, small models
# make bench-full   the same with AltDiffusion-m18 at full size, and into docs/performance.md: an hour, 12 GiB
# make bench-fid   FID of the embedded model in 18 languages: hours, can be interrupted
# make bench-gpu   on a GPU, beside diffusers, as it is and compiled
# make bench-less   measure what less work saves and costs, and write it into docs/performance.md (minutes)
# make test-ray   the deployment for Ray Serve, under load
# make bench-memory   peak memory by mode, at full size: writes 6 GB and takes long
# make browser   what the tests of the page and of Node.js's clients need (Debian); they are left out without it
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-ray bench bench-fid bench-full bench-gpu bench-less bench-memory bench-scale browser screenshots test-full check fix build clean

demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.tested-with
	$(BIN)/python -m pytest -n auto --dist worksteal

bench-less: $(VENV)/.tested-with
	$(BIN)/python -m tests.benchmarks.less_work

test-ray: $(VENV)/.tested-with
	$(BIN)/pip install -q -c constraints.txt -e '.[test,ray]'
	$(BIN)/python -m pytest tests/e2e/web/test_ray.py -p no:xdist

bench-scale: $(VENV)/.tested-with
	$(BIN)/python -m tests.benchmarks.scale --write

browser: $(VENV)/.tested-with
	command -v chromium node npm curl > /dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends \
	    chromium curl fonts-noto-cjk fonts-noto-core $$(command -v node > /dev/null || echo nodejs npm); }
	npm ci --prefix examples/clients --no-audit --no-fund --ignore-scripts
	$(BIN)/pip install -q -c constraints.txt -e '.[test,browser]'

screenshots: browser
	ALTDIFF_SHOTS=$(CURDIR)/docs/images $(BIN)/python -m pytest tests/browser -k pictures_of_the_readme

test-full: $(VENV)/.tested-with
	$(BIN)/python -m pytest -m "full or not full" -s

bench-memory: $(VENV)/.tested-with
	$(BIN)/python -m tests.benchmarks.memory --sizes 512x512,1024x1024

check: $(VENV)/.tested-with
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(VENV)/.tested-with
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.benched-with
	$(BIN)/python -W ignore -m tests.benchmarks.side_by_side

bench-full: $(VENV)/.benched-with
	$(BIN)/python -W ignore -m tests.benchmarks.side_by_side --full --write

bench-fid: $(VENV)/.tested-with
	$(BIN)/python -m tests.benchmarks.fid

bench-gpu: $(VENV)/.benched-with
	$(BIN)/python -W ignore -m tests.benchmarks.gpu

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

$(VENV)/.benched-with: $(VENV)/.tested-with
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	touch $@

$(VENV)/.tested-with: $(VENV)/.installed
	@echo "Adding what the tests need."
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@
