# Two commands do all their own set-up: `make demo` and `make test`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
RUN = $(VENV)/bin/python
PYTEST = $(RUN) -m pytest

.PHONY: demo eval test lint parity slow tpu soak bench clean

# Images of prompts, and edits of some of them
demo: $(VENV)/.base
	$(RUN) -m fluxbatch.run manifest=jobs/demo/prompts.jsonl run_name=demo
	$(RUN) -m fluxbatch.run model=flux-mini-kontext manifest=jobs/demo/edits.jsonl run_name=demo-edits

# Do the miniatures do what they are told? 200 held-out captions and edits, scored without the models
eval: $(VENV)/.base
	$(RUN) jobs/flux-mini/evaluate.py
	$(RUN) jobs/flux-mini/evaluate_edits.py

# LLVM is told to do little: of the longest test of `make test` it took 30 of 71 s. Parity, TPU and demo run what it makes of all.
test slow: export XLA_FLAGS += --xla_backend_optimization_level=0

# More at a time than the two cores that this is made for: some wait, for clocks, disks, and others to notice that they are alone.
test: $(VENV)/.test
	$(PYTEST) -m "not parity and not slow" -n 3 --durations=5

# What pyproject.toml asks of the sources; pre-commit runs it too
lint: $(VENV)/.lint
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

parity: $(VENV)/.parity
	$(PYTEST) -m "parity and not slow" -n 2 --durations=5

slow: $(VENV)/.test
	$(PYTEST) -m "slow and not parity" -n 3 --durations=5

# What only the TPU's compiler can say, without a TPU
TPU_TESTS ?= tests/test_attention.py tests/test_plan.py tests/test_static.py
tpu: $(VENV)/.tpu
	PYTHONPATH=$(VENV)/libtpu $(PYTEST) -m slow -n 2 -k tpu $(TPU_TESTS) --durations=5

# The long form of the tests that kill: 50 times
soak: $(VENV)/.test
	FLUXBATCH_SOAK=50 $(PYTEST) tests/test_crash.py tests/test_writer.py tests/test_hosts.py -m slow -k kill --durations=5

# Figures of this machine, each way against its peer in one run
bench: $(VENV)/.bench
	$(RUN) jobs/bench/bench.py
	$(RUN) jobs/weights/bench.py --gigabytes 2
	$(RUN) jobs/bench/lora_cost.py

clean:
	rm -rf $(VENV) outputs dist build .pytest_cache .hypothesis .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "fluxbatch needs Python 3.11 or newer: none found" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@ $(VENV)/.base

$(VENV)/.lint: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[lint]"
	@touch $@ $(VENV)/.base

# torch by its exact version: a range would take a build with CUDA along
$(VENV)/.parity: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[test,parity]"
	@touch $@ $(VENV)/.test $(VENV)/.base

# where there is an NVIDIA GPU, JAX for it as torch has it
$(VENV)/.bench: $(VENV)/.parity
	! command -v nvidia-smi || $(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[cuda]"
	@touch $@

# beside the other packages: JAX looks for TPUs wherever it finds libtpu
$(VENV)/.tpu: pyproject.toml | $(VENV)/.test
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/libtpu "$$($(RUN) -c \
	    'from importlib.metadata import requires; print(*[r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")])')"
	@touch $@
