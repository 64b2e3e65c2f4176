# Set-up and everyday commands. `make` lists them. None needs root, a compiler or an account.

VENV ?= .venv
RECIPE ?= recipes/scenes.yaml
RUN ?= checkpoints/scenes
PYTHON ?= python3 python3.13 python3.12 python3.11 python3.14
python := $(VENV)/bin/python
bindllm := $(VENV)/bin/bindllm

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test test-slow test-families lint format docs bench report clean clean-all

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo 'Settings: RECIPE=$(RECIPE)  RUN=$(RUN)  ARGS="options for the command"  PYTHON=python3.12'

train: $(VENV)/.has-quickstart ## fetch what RECIPE names, embed its images, train, and write the report
	@$(bindllm) fetch $(RECIPE)
	@$(bindllm) fit --config $(RECIPE) $(ARGS)

test: $(VENV)/.has-test checkpoints/clip-vocabulary/SOURCE.json ## run the tests; ARGS="-k store" picks some
	@$(python) -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

test-slow: $(VENV)/.has-test checkpoints/scenes/bindllm.json ## run the slow tests; trains the scenes first if needed
	@$(python) -m pytest -m slow $(ARGS)

test-families: $(VENV)/.has-test ## try each injection in every decoder family of transformers; writes the tables of docs/decoders.md and encoders.md
	@PYTHONPATH=tests $(python) tests/families.py $(ARGS)
	@PYTHONPATH=tests $(python) tests/encoder_families.py

lint: $(VENV)/.has-test ## check style and spelling
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(VENV)/bin/codespell

format: $(VENV)/.has-test ## put the code into the project's style
	@$(python) -m ruff check --fix .
	@$(python) -m ruff format .

docs: $(VENV)/.has-docs ## build the docs site into site/; a broken link or reference fails
	@NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict --quiet

bench: $(VENV)/.has-test ## measure speed and memory, and write benchmarks/results/
	@$(python) -m benchmarks $(ARGS)

report: $(VENV)/.has-quickstart ## write the report of the trained folder RUN again
	@$(bindllm) report $(RUN)

clean: ## remove caches and build outputs; data/, checkpoints/ and .venv stay
	@rm -rf build dist site .pytest_cache .ruff_cache
	@find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

clean-all: clean ## also remove .venv, downloads and stored embeddings; images, models and trained checkpoints stay
	@rm -rf $(VENV) data/downloads data/store

checkpoints/clip-vocabulary/SOURCE.json: | $(VENV)/.has-test
	@$(bindllm) fetch clip-vocabulary

checkpoints/scenes/bindllm.json:
	@$(MAKE) train RECIPE=recipes/scenes.yaml ARGS=

# One environment; a stamp for each set of extras, so that pip runs only when a set or a pinned version changed.
$(VENV)/.has-%: $(VENV)/.made setup.cfg pyproject.toml constraints.txt
	@echo "installing bindllm with its '$*' extras into $(VENV) (the first time about 3 minutes, 2 GB)"
	@$(python) -m pip --disable-pip-version-check install -qq --constraint constraints.txt --editable '.[$*]'
	@touch $@ $(if $(filter test,$*),$(VENV)/.has-quickstart) # "test" includes "quickstart"

$(VENV)/.made:
	@for python in $(PYTHON); do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; python=; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "bindllm needs Python 3.11 or newer and found none as: $(PYTHON). Name one: make PYTHON=/path/to/python3.12"; \
	  exit 1; \
	fi; \
	echo "making $(VENV) with $$($$python --version)"; \
	if ! $$python -m venv $(VENV); then \
	  echo "$$python cannot make a virtual environment: its venv or ensurepip module is missing (on Debian and"; \
	  echo "Ubuntu: the package python3-venv). Install it, or name another Python: make PYTHON=/path/to/python3.12"; \
	  rm -rf $(VENV); exit 1; \
	fi
	@touch $@
