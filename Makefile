# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.dev-ready
PINS := requirements/cpu.txt requirements/overrides.txt requirements/constraints.txt pyproject.toml

# Options of `make demo`; empty ones take the command's default.
ONCE ?=
PROMPT ?=
MODEL ?=
QUEUE ?=
PREFILL ?=
DECODE ?=
MIXED ?=
PORT ?=
export ONCE PROMPT MODEL QUEUE PREFILL DECODE MIXED PORT

.PHONY: help demo test check unit bench-quick demo-model clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## ?/\1\t/' | expand -t 16

$(READY): $(PINS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade uv==0.13.8
	$(BIN)/uv pip install --python $(BIN)/python --quiet --override requirements/overrides.txt \
	  --constraint requirements/constraints.txt --requirement requirements/cpu.txt --editable .
	touch $@

$(DEV_READY): $(READY) requirements/dev.txt
	$(BIN)/uv pip install --python $(BIN)/python --quiet --override requirements/overrides.txt \
	  --constraint requirements/constraints.txt --requirement requirements/dev.txt
	mkdir -p .links/penstock
	for folder in queue workers serving; do ln -sfn ../../$$folder .links/penstock/$$folder; done
	touch $@

demo: $(READY)  ## start everything on this machine and answer (ONCE=1 PROMPT=... MODEL=... QUEUE=redis|kafka PREFILL=1 DECODE=1)
	$(BIN)/penstock demo

check: $(DEV_READY)  ## format, lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.links $(BIN)/lint-imports

unit: $(DEV_READY)  ## the fast tests
	$(BIN)/pytest -m unit

test: check  ## everything: checks, then all test tiers
	$(BIN)/pytest

bench-quick: $(DEV_READY)  ## Penstock against vLLM's own server, in one run, in under six minutes
	$(BIN)/python -m tests.benchmarks quick

demo-model: $(DEV_READY)  ## train the demo model again (after a change of workers/demo_model/qa.yaml)
	$(BIN)/python -m penstock.workers.demo_model.train
	$(BIN)/python -m penstock.workers.demo_model.evaluate

clean:  ## remove the virtual environment and what builds and tests left
	rm -rf $(VENV) .links build dist *.egg-info results .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
