# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.dev-ready
BENCH_VENV := .venv-bench
BENCH_READY := $(BENCH_VENV)/.ready
PINS := requirements/cpu.txt requirements/overrides.txt requirements/constraints.txt pyproject.toml

# With bytecode: each process imports vLLM or Ray, which takes 30 s of a core when they must be compiled first, and 12 when
# not; and where PYTHONDONTWRITEBYTECODE is set, as in many container images, no process leaves any behind.
INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode

# Options of `make bench`; empty ones take the command's default.
ROUNDS ?=
CONTENDERS ?=
WORKLOADS ?=
BENCH_OPTIONS = $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(WORKLOADS),--workloads $(WORKLOADS)) \
  $(if $(CONTENDERS),--contenders "$(CONTENDERS)")

# Options of `make bench-batch`.
LINES ?=

# Options of `make chaos`.
SHORT ?=
SEED ?=
ROW ?=
ENGINE ?=

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

.PHONY: help demo test test-tools check unit bench bench-quick bench-scale bench-batch bench-report bench-venv chaos demo-model clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## ?/\1\t/' | expand -t 16

$(READY): $(PINS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade uv==0.13.8
	$(INSTALL) --python $(BIN)/python --override requirements/overrides.txt \
	  --constraint requirements/constraints.txt --requirement requirements/cpu.txt --editable .
	touch $@

$(DEV_READY): $(READY) requirements/dev.txt
	$(INSTALL) --python $(BIN)/python --override requirements/overrides.txt \
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

test-tools: $(DEV_READY)  ## build the S3 server and the fault proxy that some tests need (Go); without them these are skipped
	GOBIN=$(HOME)/.cache/penstock/bin go install github.com/versity/versitygw/cmd/versitygw@v1.8.0
	$(BIN)/python -c "from tests.support.fault_proxy import toxiproxy; toxiproxy()"

test: check  ## everything: checks, then all test tiers
	$(BIN)/pytest

bench-quick: $(DEV_READY)  ## prefill/decode on Kafka against vLLM's server, three workloads; under 6 minutes (CONTENDERS=mixed-redis ROUNDS=5)
	$(BIN)/python -m tests.benchmarks run --workloads quick --no-replay $(if $(ROUNDS),--rounds $(ROUNDS)) \
	  --contenders $(or $(CONTENDERS),pd-kafka)

bench: $(DEV_READY) $(BENCH_READY)  ## all contenders, then the scale part and the page; an hour and a half, with WORKLOADS=quick half of one (ROUNDS=5 CONTENDERS=... WORKLOADS=quick|short|full|all)
	$(BIN)/python -m tests.benchmarks run $(BENCH_OPTIONS)
	$(BIN)/python -m tests.benchmarks scale
	$(BIN)/python -m tests.benchmarks report

bench-scale: $(DEV_READY)  ## everything but the model: simulated engines whose steps take no time; under 6 minutes
	$(BIN)/python -m tests.benchmarks scale

bench-batch: $(DEV_READY)  ## batches of growing size, and what a line costs; simulated engines (LINES=1000,10000,100000,1000000 QUEUE=redis|kafka)
	$(BIN)/python -m tests.benchmarks.batch_scale $(if $(LINES),--lines $(LINES)) $(if $(QUEUE),--queue $(QUEUE))

bench-report: $(DEV_READY)  ## write the newest results into docs/benchmarks.md, with plots
	$(BIN)/python -m tests.benchmarks report

$(BENCH_READY): $(READY) $(wildcard requirements/bench-ray-llm*.txt)
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(BENCH_VENV)
	$(INSTALL) --python $(BENCH_VENV)/bin/python \
	  --override requirements/bench-ray-llm-overrides.txt --constraint requirements/bench-ray-llm-constraints.txt \
	  --requirement requirements/bench-ray-llm.txt
	touch $@

bench-venv: $(BENCH_READY)  ## the virtual environment of Ray Serve LLM, which `make bench` measures against

chaos: $(DEV_READY)  ## kill, stall and cut everything, and see whether anything was lost; an hour and a half (SHORT=1: twenty minutes, SEED=..., ROW=..., ENGINE=vllm: the first three rows on real engines)
	$(BIN)/python -m tests.chaos $(if $(SHORT),--short) $(if $(SEED),--seed $(SEED)) $(if $(ROW),--row $(ROW)) $(if $(ENGINE),--engine $(ENGINE))

demo-model: $(DEV_READY)  ## train the demo model again (after a change of workers/demo_model/qa.yaml)
	$(BIN)/python -m penstock.workers.demo_model.train
	$(BIN)/python -m penstock.workers.demo_model.evaluate

clean:  ## remove the virtual environment and what builds and tests left
	rm -rf $(VENV) .venv-bench .links build dist *.egg-info results .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
