# Two commands on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: install quickstart quick test test-slow mutants lint clean

install: $(VENV)/.installed

# constraints.txt holds the versions that were tested together; torch and torchvision must come as a pair.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

quickstart: install
	$(BIN)/rayexp quickstart

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What needs no Ray, no browser and no second host: while one works on the code.
quick: install
	$(BIN)/python -m pytest -m "not (ray or slow or netns or browser or gpu)"

# Everything that is done within ten minutes on two cores.
test: install lint
	$(BIN)/python -m pytest -m "not slow and not netns"

# Real data in length, clusters that grow, die and are resumed, and several hosts (as root, in network namespaces).
test-slow: install
	$(BIN)/python -m pytest -m "slow or netns"

# Plants slips, one at a time, in a copy of the package: the tests must notice (tests/mutants). About half an hour on
# two quiet cores; SINCE=REV tries only those in files that changed since, or whose tests did.
mutants: install
	$(BIN)/python tests/mutants/run.py $(if $(SINCE),--since $(SINCE))

clean:
	rm -rf $(VENV) build dist *.egg-info
