# Everything a newcomer types. `make help` lists it.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-flare test-postgres check-crate bench-ledger screenshots check format expectations bench bench-trust docs ui clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with pinned dependencies (a few minutes, once)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: fedmat needs Python 3.11 (name it with: make PYTHON=/path/to/python3.11)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## run the example consortium from raw files to a registered model
	$(BIN)/fedmat demo

test: $(STAMP) ## the default tests
	$(BIN)/python -m pytest

test-slow: $(STAMP) ## the long tests: servers, statistics, scale
	$(BIN)/python -m pytest -m "slow or scale"

test-flare: $(STAMP) ## every fault between organisations, over FLARE on loopback
	$(BIN)/python -m pytest -m "flare or not flare" tests/flare tests/federation/test_flare.py

screenshots: $(STAMP) ## docs/images: Prefect and MLflow after a scheduled round (needs chromium)
	$(BIN)/python docs/screenshots.py

check: $(STAMP) ## format, lint, types, import rules, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@fresh=$$(mktemp -d) && $(BIN)/python -m fedmat.data.contract $$fresh >/dev/null && \
	  diff -r -x README.md expectations $$fresh && echo "expectations: as the contract generates them"; \
	  status=$$?; rm -rf $$fresh; \
	  test $$status -eq 0 || echo "expectations/ differs from fedmat/data/contract.py: run make expectations and review the change"; \
	  exit $$status

format: $(STAMP) ## rewrite the code in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

expectations: $(STAMP) ## regenerate expectations/ from the data contract
	$(BIN)/python -m fedmat.data.contract expectations

bench: $(STAMP) ## measure overheads; prints one JSON object per benchmark
	@for b in $(basename $(notdir $(wildcard benchmarks/[a-z]*.py))); do echo "# $$b"; $(BIN)/python -m benchmarks.$$b || exit 1; done

bench-trust: $(STAMP) ## what protection costs and holds off: two minutes, then hours (resumable; needs fedmat data get)
	$(BIN)/python benchmarks/trust.py --full
	$(BIN)/fedmat bench small C1 C4a
	$(BIN)/fedmat bench attacks C1 C4a

bench-ledger: $(STAMP) ## the ledger at a million entries, against a plain table: a few minutes
	$(BIN)/python -m benchmarks.ledger --entries 1000000

test-postgres: $(STAMP) ## the ledger in a real PostgreSQL server, started and stopped here (needs its programs)
	$(BIN)/python -m pytest -m postgres tests/test_ledger_postgres.py

ROCRATE := build/rocrate

check-crate: $(STAMP) ## ask the RO-Crate standard's own validator (CRATE=folder: about a crate of yours)
	@test -x $(ROCRATE)/bin/rocrate-validator || { $(PYTHON) -m venv $(ROCRATE) && \
	  $(ROCRATE)/bin/python -m pip install --disable-pip-version-check --quiet roc-validator==0.13.0 && \
	  $(ROCRATE)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps rocrate==0.9.0; }
	@test -n "$(CRATE)" || $(BIN)/python tests/check_crate.py make build/check-crate
	$(ROCRATE)/bin/python tests/check_crate.py validate $(or $(CRATE),build/check-crate)

docs: $(STAMP) ## check that every command and link in the documentation works
	$(BIN)/python -m pytest tests/test_docs.py

ui: $(STAMP) ## start the Prefect and MLflow UIs; Ctrl-C stops both
	$(BIN)/fedmat ui

clean: ## remove caches and build output; keeps .venv, .fedmat and mlruns
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
