# Every command sets up what it needs: on a fresh machine, `make demo` or `make test` is all it takes.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test check soak bench format clean

help: ## Show this
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(READY) ## Make .venv with everything for running, testing and the demo

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: install one, or name it with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	  || { echo "$(PYTHON) is not Python 3.11 or 3.12: name one with PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev,embedded,postgres]"
	@touch $(READY)

demo: setup ## Run the story: events become live, forgettable adapters
	@$(BIN)/riverdelta demo

test: setup ## Run every test but the soak
	@$(BIN)/pytest -m "not soak" -n auto --maxprocesses 4 --dist loadfile

check: setup ## Lint, format, types, import rules, doctests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy -p riverdelta
	@$(BIN)/lint-imports
	@$(BIN)/pytest --doctest-modules -q src/riverdelta --ignore-glob="*/migrations/*"

soak: setup ## Long kill and load tests
	@$(BIN)/pytest -m soak --timeout 3600

bench: setup ## List the benchmarks
	@sed -n '/^## /,$$p' benchmarks/README.md

format: setup ## Format and mend what can be mended
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Remove what was built here
	@rm -rf $(VENV) build dist *.egg-info src/*.egg-info
