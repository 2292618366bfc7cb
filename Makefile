# Every target sets up what it needs: the Debian packages that are missing, and .venv. The second time it is quick.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?=
BENCH ?=
export PYTHON

BIN := .venv/bin
VENV := .venv/.stamp
PYTEST := $(BIN)/python -m pytest
# two at a time, the tests of a file in one process: they share hosts
BESIDE := -n 2 --dist loadfile

.PHONY: help venv packages lint format unit test bench campaign fuzz demo docs clean

help:  ## this list
	@sed -nE 's/^([a-z]+):.*  ## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

$(VENV): pyproject.toml scripts/venv scripts/packages scripts/python
	@scripts/venv
	@touch $@

venv: $(VENV)  ## the virtual environment .venv, with tcpmig in it

packages:
	@scripts/packages test

lint: $(VENV)  ## ruff and mypy; needs no root
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)  ## let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

unit: $(VENV)  ## the tests that need no root and no network
	$(PYTEST) tests/unit

test:  ## every test (root)
	@scripts/need-root test
	@$(MAKE) --no-print-directory packages $(VENV)
	$(PYTEST) $(BESIDE) -m "not alone and not long" tests/unit tests/kernel tests/system
	$(PYTEST) -m "alone and not long" tests/system

bench:  ## the measurements: tables, rows and pictures in docs/bench; `make bench BENCH=--quick`: a look (root)
	@scripts/need-root bench
	@$(MAKE) --no-print-directory packages $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -e '.[bench]' >&2
	$(BIN)/python -m tests.bench $(BENCH)

campaign:  ## hundreds of migrations under load and loss; takes long (root)
	@scripts/need-root campaign
	@scripts/packages campaign
	@$(MAKE) --no-print-directory $(VENV)
	$(PYTEST) -m long tests/system
	$(PYTEST) tests/campaign --timeout=3600

fuzz: $(VENV)  ## a million inputs, and with atheris as many again as it is told, to all that reads files and wires
	$(BIN)/python -m tests.fuzz

demo:  ## real servers move between two hosts under load; prints what their clients saw (root)
	@scripts/need-root demo
	@$(MAKE) --no-print-directory packages $(VENV)
	@$(BIN)/python -m tests.demo

docs: $(VENV)  ## write the references of errors and keywords anew from the code
	$(BIN)/python scripts/errors_reference.py docs/reference/errors.md
	$(BIN)/python scripts/keywords_reference.py docs/reference/keywords.md

clean:  ## what was made here: .venv, caches, builds
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
