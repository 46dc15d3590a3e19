# Two commands on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: install quickstart test test-slow lint clean

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

# Everything that is done within ten minutes on two cores.
test: install lint
	$(BIN)/python -m pytest -m "not slow and not netns"

# Real data in length, clusters that grow, die and are resumed, and several hosts (as root, in network namespaces).
test-slow: install
	$(BIN)/python -m pytest -m "slow or netns"

clean:
	rm -rf $(VENV) build dist *.egg-info
