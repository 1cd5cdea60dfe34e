# sleepRL. `make` alone lists what there is.

PYTHON ?= python3
# Where torch's CPU build is looked for when pip's own sources lack it (PyPI has the CUDA build only).
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# cpu or cuda: which torch and vLLM are installed.
ifeq ($(ACCELERATOR),)
ACCELERATOR := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU' && echo cuda || echo cpu)
endif
ARGS ?=
PYTEST_ARGS ?=
# Processes that run test files side by side; 0: all in one.
TEST_WORKERS ?= 2
PYTEST = $(VENV_PYTHON) -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# Threads of several processes that spin while they wait slow each other five times and more.
export OMP_WAIT_POLICY ?= PASSIVE

VENV_PYTHON := .venv/bin/python

.PHONY: help
help:
	@echo "sleepRL: a language model that sleeps"
	@echo
	@echo "  make night           install if need be, then one night on the embedded model"
	@echo "  make test            install if need be, then all tests but the slow scenarios"
	@echo
	@echo "  make ci              lint, types, all tests: what has to be green"
	@echo "  make lint            ruff: rules and format        make format   let ruff rewrite"
	@echo "  make types           mypy over sleeprl/, benchmarks/ and tuning/"
	@echo "  make docs            the documentation, strictly, into build/site"
	@echo "  make test-slow       the slow scenarios alone"
	@echo "  make soak            campaigns of hours; what they came to is kept in benchmarks/results/"
	@echo "  make embedded-model  train the embedded model from nothing"
	@echo "  make install         only .venv                    make lock     resolve the pins again"
	@echo "  make clean           caches, build/                make distclean  and .venv"
	@echo
	@echo "  Settings:  make night ARGS='my.yaml seed=1'      what follows 'sleeprl night'"
	@echo "             make test PYTEST_ARGS='-k losses'     what follows 'pytest'"
	@echo "             make night ACCELERATOR=cpu            cpu or cuda, here: $(ACCELERATOR)"
	@echo "             make night PYTHON=python3.12          makes .venv, here: $(PYTHON)"

# --- set-up ----------------------------------------------------------------------------------------

# Quick, and silent, when nothing is to be done.
.PHONY: install
install:
	@PYTHON='$(PYTHON)' TORCH_CPU_INDEX='$(TORCH_CPU_INDEX)' tools/install.sh '$(ACCELERATOR)'

.PHONY: lock
lock: install
	@tools/lock.sh

# --- use -------------------------------------------------------------------------------------------

.PHONY: night
night: install
	@.venv/bin/sleeprl night $(ARGS)

.PHONY: embedded-model
embedded-model: install
	@$(VENV_PYTHON) -m sleeprl.worlds.train --out build/embedded-first $(ARGS)
	@$(VENV_PYTHON) -m sleeprl.worlds.train --init build/embedded-first --out sleeprl/worlds/embedded \
	  --reading 0.7 --seed 1 --lr 0.0015 --muon-lr 0.012 --warmup 0.02 --lessons 125000 --steps 2700 $(ARGS)

# --- checks ----------------------------------------------------------------------------------------

.PHONY: test
test: install
	@$(PYTEST) -m 'not slow and not soak' --junitxml=build/test.xml $(PYTEST_ARGS)

# pytest's exit status 5 is "no test selected".
.PHONY: test-slow
test-slow: install
	@$(PYTEST) -m 'slow and not soak' --junitxml=build/test-slow.xml $(PYTEST_ARGS) || [ $$? -eq 5 ]

# One after another, with the machine to themselves. Each one's last result is kept, with its commit.
.PHONY: soak
soak: install
	@$(VENV_PYTHON) -m pytest -m soak --junitxml=build/soak.xml $(PYTEST_ARGS); \
	  status=$$?; $(VENV_PYTHON) tools/test_results.py soak && exit $$status

# From the last `.ci/run`: benchmarks/results/ci.json and the tables of docs/development/testing.md.
.PHONY: test-times
test-times: install
	@$(VENV_PYTHON) tools/test_results.py ci

.PHONY: lint
lint: install
	@$(VENV_PYTHON) -m ruff check --output-format=concise
	@$(VENV_PYTHON) -m ruff format --check

.PHONY: format
format: install
	@$(VENV_PYTHON) -m ruff check --fix --exit-zero
	@$(VENV_PYTHON) -m ruff format

.PHONY: types
types: install
	@$(VENV_PYTHON) -m mypy

# From this repository alone. The variable silences an advertisement of the theme's.
.PHONY: docs
docs: install
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --quiet

.PHONY: ci
ci:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory docs
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory test-slow

# --- tidying; runs/ and generations/ are yours and are never touched --------------------------------

.PHONY: clean
clean:
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean
	@rm -rf .venv *.egg-info
