PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test mutants zoo lint docs clean

# one environment for all targets, rebuilt when the dependencies change
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m research.demo --output runs/demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto

# faults put into the code: prints which of them no test finds
mutants: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants --minutes 15

# every pruning on every architecture, into docs/zoo.md; takes twenty minutes
zoo: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m research.zoo --anew --table docs/zoo.md

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist runs
