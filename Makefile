PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

VIDEO ?=

.PHONY: quickstart demo test test-all lint

# Sets up, generates the built-in dataset, trains a tiny X3D with SGS on it, and tests the best checkpoint.
quickstart: $(INSTALLED)
	$(VENV)/bin/python tools/train.py

# Classifies VIDEO with a network for Kinetics-400, dense and with SGS, and draws which frames were merged.
demo: $(INSTALLED)
	$(VENV)/bin/python scripts/demo.py $(if $(VIDEO),"$(VIDEO)")

# Runs the main tests; `make test-all` also runs those that train for minutes.
# Three processes for two cores: the longest file waits for SLURM nearly all the time.
test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(INSTALLED): setup.cfg setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(VENV)/bin/python -m pip install --quiet -e ".[dev]"
	touch $@
