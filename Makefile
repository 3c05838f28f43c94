# Two commands do everything on a fresh machine: make demo, make test.
# The first Python of 3.11 or newer; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# Not quiet: two minutes without a word look like a hang.
INSTALL := $(BIN)/pip install --disable-pip-version-check --no-warn-script-location

.DEFAULT_GOAL := help
.PHONY: help demo test format lint types fast coverage slow families faults fuzz bench docs clean

help: ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1	\2/' | expand -t 16

demo: $(VENV)/.installed ## Answer questions about the bundled documents, the model streamed past a memory budget
	$(BIN)/layerstream demo

test: lint types fast ## Lint, types and the fast tests

format: $(VENV)/.installed ## Write the layout that lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/.installed ## ruff and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed ## pyright on engine and integrations
	$(BIN)/pyright

# Threads that wait for each other sleep: spinning ones take the cores from the other worker's.
fast: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(BIN)/pytest -m "not slow and not families" --numprocesses logical --maxprocesses 4 --dist worksteal

coverage: $(VENV)/.installed ## The fast tests once more, and which lines they run; no gate
	$(BIN)/pytest -m "not slow and not families" --numprocesses logical --maxprocesses 4 --dist worksteal --cov --cov-report term:skip-covered

slow: $(VENV)/.installed ## The tests that make test leaves out: fresh environments, all examples, more modes of devices
	$(BIN)/pytest -m slow

families: $(VENV)/.installed ## Every model family in every mode against plain transformers; make test has one mode of each
	OMP_WAIT_POLICY=passive $(BIN)/pytest -m families --numprocesses logical --maxprocesses 4 --dist worksteal

faults: $(VENV)/.installed ## Faults of disk, database, callers and code over running engines (TRIALS=10000 SEED=0: an hour)
	$(BIN)/python -W ignore -m tests.faults --trials $(or $(TRIALS),10000) --seed $(or $(SEED),0)

fuzz: $(VENV)/.installed ## Random engines against plain transformers, and against themselves bit for bit (SECONDS=3600 SEED=0 JSON=file)
	$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),3600) --seed $(or $(SEED),0) $(if $(JSON),--json $(JSON))

bench: $(VENV)/.installed ## Sweep speed against a raw read of the same bytes (benchmarks/README.md has the rest)
	$(BIN)/python -m benchmarks.sweep $(or $(MODEL),$(error which model? make bench MODEL=folder; python -m benchmarks.grow 3B FOLDER writes one))

docs: $(VENV)/.installed ## The pages as a site in build/site; a dead link is an error
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m docs.generate
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## Remove what make made
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "LayerStream needs Python 3.11 or newer; none found as '$(PYTHON)': make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into $(VENV), about 2 GB, two minutes or so: this happens once."
	@$(PYTHON) -m venv $(VENV)
	@echo "1 of 2: $(TORCH)"
	@$(INSTALL) $(TORCH)
	@echo "2 of 2: LayerStream and what its tests need"
	@$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $@
