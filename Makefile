# make demo | test | bench | gpu | test-triton | certify-fuzz | fuzz | soak | lint | format | clean
# TORCH chooses the torch that is installed first: nothing after it may replace it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
# A thread that waits for another one spins briefly and then sleeps. Spinning on, as OpenMP does, is
# ten times slower where another process has the core that the other thread needs.
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test bench gpu test-triton certify-fuzz fuzz soak lint format clean

# The whole test environment holds what the demo needs too.
$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# AutoAttack's package is large, and only `make demo ARGS=--audit` needs it.
$(VENV)/.audit: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable ".[audit]"
	touch $@

demo: $(VENV)/.demo $(if $(filter --audit,$(ARGS)),$(VENV)/.audit)
	$(BIN)/python -m lipkernels.demo $(ARGS)

# One process of tests for every core, each with the tests of whole files.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

# The other libraries name torch without a version: --no-deps keeps the one that is installed.
PEERS ?= deel-torchlip==1.0.5 orthogonium==0.0.4
$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --no-deps $(PEERS)
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-only \
		--benchmark-columns=min,median,iqr,rounds $(ARGS)
	$(BIN)/python -m bench

# On a machine with a CUDA device, with $(PYTHON) as it is (torch and Triton installed) and no network:
# the tests marked gpu, compute-sanitizer, benchmarks; JSON and summary.md go to $(OUT), in 9 minutes.
# WHEELS: a folder of wheels (pytest, the other libraries) to use besides what is installed.
OUT ?= build/gpu
gpu:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m bench.gpu --out "$(OUT)" \
		$(if $(WHEELS),--wheels "$(WHEELS)") $(ARGS)

# The tests of the Triton kernels with another version of it: make test-triton TRITON=3.9.0
TRITON ?= 3.9.0
test-triton: $(VENV)/.dev
	test -d build/triton-$(TRITON) || $(BIN)/python -m pip install --quiet --no-deps \
		--target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python -m pytest tests -k triton $(ARGS)

# 100,000 pathological matrices against exact arithmetic.
certify-fuzz: $(VENV)/.dev
	$(BIN)/python -m pytest tests/test_certify_pathological.py --matrices 100000 $(ARGS)

# Thousands of random calls of each public function; `make test` runs a few hundred in all.
fuzz: $(VENV)/.dev
	$(BIN)/python -m pytest tests/test_fuzz_functions.py tests/test_fuzz_modules.py \
		--hypothesis-profile fuzz $(ARGS)

# 10,000 training steps, the bound and the memory watched.
soak: $(VENV)/.dev
	$(BIN)/python -m pytest tests/test_soak.py --soak-steps 10000 -s $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis demo_output
