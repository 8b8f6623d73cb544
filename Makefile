# Everything goes through .venv, made on first use from pyproject.toml and constraints.txt.
#   make localnet          a whole swarm on this machine      make localnet ARGS="--rounds 5 --stages 2"
#   make test              the test suite                     make lint    formatter, linter, type checker
#   make test-swarm        tests of whole swarms, of many processes each
#   make test-long         the tests that take minutes
#   make sim               25 seeds of whole swarms on a virtual clock with faults
#   make explore           every property and state machine on new examples
#   make planted           planted bugs, and whether their tests see them
#   make fuzz              a minute of fuzzing over all that takes bytes from strangers
#   make newcomer          a newcomer's first evening, every command as README and docs have it
#   make pages             every command that README and docs show, run in a fresh clone
#   make wheel             the package in dist/, installed for a try in an environment of its own
#   make bench             a swarm against one process, JSON under runs/bench
#   make bench-quick       every benchmark of speed, small, with a gate on ratios
PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready

.PHONY: install localnet test test-swarm test-long lint sim explore planted fuzz newcomer pages wheel bench bench-quick clean

install: $(READY)

# torch comes first and alone, so that no other package's range can choose its build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Orion needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

localnet: $(READY)
	@$(VENV)/bin/orion localnet $(ARGS)

# Two at a time; with ARGS just what they name.
test: $(READY)
ifeq ($(strip $(ARGS)),)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m "not long and not alone"
else
	$(VENV)/bin/python -m pytest $(ARGS)
endif

# By themselves those that fill the machine, for which the other files need not be imported again.
test-swarm: $(READY)
	$(VENV)/bin/python -m pytest -m "alone and not long" $$(grep -rl 'mark\.alone' --include='test_*.py' tests) $(ARGS)

test-long: $(READY)
	$(VENV)/bin/python -m pytest -m long $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

sim: $(READY)
	@$(VENV)/bin/orion sim --seeds 0-24 --jobs 2 $(ARGS)

explore: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m "hypothesis and not long" --hypothesis-profile explore $(ARGS)

planted: $(READY)
	@$(VENV)/bin/python -m tests.planted $(ARGS)

fuzz: $(READY)
	@$(VENV)/bin/python -c 'import atheris' 2>/dev/null || \
		$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,fuzz]'
	@$(VENV)/bin/python -m tests.fuzz $(ARGS)

newcomer: $(READY)
	$(VENV)/bin/python -m tests.pages.newcomer --venv $(VENV) $(ARGS)

pages: $(READY)
	$(VENV)/bin/python -m tests.pages.commands --venv $(VENV) $(ARGS)

wheel: $(READY)
	rm -rf dist
	$(VENV)/bin/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(VENV)/bin/python -m tests.wheel dist/*.whl

bench: $(READY)
	$(VENV)/bin/python -m scripts.bench.swarm $(ARGS)

bench-quick: $(READY)
	$(VENV)/bin/python -m scripts.bench.all --quick $(ARGS)

clean:
	rm -rf $(VENV) dist runs .mypy_cache .ruff_cache
