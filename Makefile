# Two commands on a fresh machine: `make quickstart` and `make test`.
#
#   PYTHON=python3.12                the Python that makes the environment
#   VENV=DIR                         the environment (.venv); one that exists is installed into
#   TORCH=system                     take the torch that is there already and change nothing that is installed
#   PIP_ARGS="--no-cache-dir ..."    further options for pip
PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(if $(wildcard $(VENV)/.rayexp-system),system,pinned)
PIP_ARGS ?=
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED = 0

ifeq ($(filter $(TORCH),pinned system),)
$(error TORCH=$(TORCH): allowed are pinned (the versions of constraints.txt) and system (what is there already))
endif

.PHONY: install quickstart quick test test-slow emulated ray-versions mutants lint clean

install: $(VENV)/.rayexp-$(TORCH)

# constraints.txt holds the versions that were tested together; torch and torchvision must come as a pair.
$(VENV)/.rayexp-pinned: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing: some minutes and 6 GB, in silence. Without a GPU it can be far less: docs/troubleshooting.md"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_ARGS) --editable ".[dev]"
	rm -f $(VENV)/.rayexp-system
	touch $@

$(VENV)/.rayexp-system: pyproject.toml constraints.txt constraints.py
	test -x $(BIN)/python || $(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/python constraints.py > $@.txt
	$(BIN)/python -m pip install --quiet --constraint $@.txt $(PIP_ARGS) --editable ".[dev]"
	rm -f $(VENV)/.rayexp-pinned
	touch $@

quickstart: install
	$(BIN)/rayexp quickstart

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# What needs no Ray and no second host, two tests at a time: while one works on the code.
quick: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not (ray or slow or netns or gpu)"

# Everything but what is slow. Ray and a GPU need the machine for themselves.
test: lint quick
	$(BIN)/python -m pytest -m "(ray or gpu) and not slow and not netns"

# Real data in length, clusters that grow, die and are resumed, and several hosts (as root, in network namespaces).
test-slow: install
	$(BIN)/python -m pytest -m "slow or netns"

# The tests for a GPU on an emulated one (tests/emulator); test-slow has them too.
emulated: install
	$(BIN)/python tests/emulator/run.py -m pytest -n 2 -m gpu tests/engine/test_gpu.py tests/emulator

# `train`, `compare` and `submit` on other versions of Ray, by default the lowest supported and the newest tried; each
# has an environment of its own beside everything else of this one.
RAY ?= 2.55.0 2.60.0
ray-versions: install
	$(BIN)/python tests/launch/ray_versions.py $(RAY)

# Plants slips, one at a time, in a copy of the package: the tests must notice (tests/mutants). About half an hour on
# two quiet cores; SINCE=REV tries only those in files that changed since, or whose tests did.
mutants: install
	$(BIN)/python tests/mutants/run.py $(if $(SINCE),--since $(SINCE))

clean:
	rm -rf .venv build dist *.egg-info
