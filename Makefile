# Two commands do everything on a fresh machine: make demo, make test.
# The first Python of 3.11 or newer; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help demo test lint types fast slow faults fuzz bench clean

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1	\2/' | expand -t 16

demo: $(VENV)/.installed ## Answer questions about the bundled documents, the model streamed past a memory budget
	$(BIN)/layerstream demo

test: lint types fast ## Lint, types and the fast tests

lint: $(VENV)/.installed ## ruff and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed ## pyright on engine and integrations
	$(BIN)/pyright

# Threads that wait for each other sleep: spinning ones take the cores from the other worker's.
fast: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/pytest -m "not slow" --numprocesses logical --maxprocesses 4 --dist worksteal

slow: $(VENV)/.installed ## The tests that make test leaves out: fresh environments with the oldest and newest frameworks
	$(BIN)/pytest -m slow

faults: $(VENV)/.installed ## Faults of disk, database, callers and code over running engines (TRIALS=10000 SEED=0: an hour)
	$(BIN)/python -W ignore -m tests.faults --trials $(or $(TRIALS),10000) --seed $(or $(SEED),0)

fuzz: $(VENV)/.installed ## Random engines against plain transformers, and against themselves bit for bit (SECONDS=3600 SEED=0 JSON=file)
	$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),3600) --seed $(or $(SEED),0) $(if $(JSON),--json $(JSON))

bench: $(VENV)/.installed ## Sweep speed against a raw read of the same bytes (benchmarks/README.md has the rest)
	$(BIN)/python -m benchmarks.sweep $(or $(MODEL),$(error which model? make bench MODEL=folder; python -m benchmarks.grow 3B FOLDER writes one))

clean: ## Remove what make made
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "LayerStream needs Python 3.11 or newer; none found as '$(PYTHON)': make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
