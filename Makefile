# make demo | test | bench | lint | format | clean
# TORCH chooses the torch that is installed first: nothing after it may replace it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
# A thread that waits for another one spins briefly and then sleeps. Spinning on, as OpenMP does, is
# ten times slower where another process has the core that the other thread needs.
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test bench lint format clean

# The whole test environment holds what the demo needs too.
$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m lipkernels.demo $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-only $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis demo_output
