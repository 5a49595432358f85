# Two commands do everything on a fresh machine: `make serve` and `make test`.
# Both may be run again at any time; the environment is made anew only when pyproject.toml changes.

VENV ?= .venv
PYTHON = $(VENV)/bin/python
# The environment is made by uv where it exists, else by the Python that .python-version names.
UV := $(shell command -v uv 2>/dev/null)
BASE_PYTHON ?= $(or $(shell command -v python3.12 2>/dev/null),python3)

MODEL ?= jaxserve/demo_model
HOST ?= 127.0.0.1
PORT ?= 30000
ARGS ?=
# The accelerator's runtime: cuda12, cuda13 or tpu.
EXTRA ?=

.PHONY: serve test lint check test-equality test-jax-oldest test-jax-newest test-tpu-compile \
	clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

serve: $(VENV)/.installed  ## serve MODEL (the bundled one) on HOST:PORT; more flags in ARGS
	$(VENV)/bin/jaxserve serve --model-path $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: lint check  ## everything that a change must pass

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

check: $(VENV)/.installed-test
	$(PYTHON) -m pytest $(ARGS)

test-equality: $(VENV)/.installed-test  ## the whole equality matrix, some ten minutes on two cores
	$(PYTHON) -m pytest -m 'matrix or not matrix' -rP $(ARGS) \
		tests/engine/test_equality.py tests/engine/test_deterministic.py tests/engine/test_encode.py \
		tests/engine/test_storm.py tests/server/test_equality.py

test-jax-oldest:  ## the suite on the oldest JAX that is supported
	$(MAKE) check VENV=.venv-jax-oldest JAX='jax==0.11.2 jaxlib==0.11.2 flax==0.12.10'

test-jax-newest:  ## the suite on the newest JAX that is supported
	$(MAKE) check VENV=.venv-jax-newest JAX="'jax>=0.12,<0.13'"

# A compiler that never ends is ended, and the run with it: no signal reaches it.
test-tpu-compile:  ## the kernels through the TPU's own compiler, without a TPU: some four minutes
	$(MAKE) check VENV=.venv-tpu EXTRA=tpu \
		ARGS='-m tpu -rP --timeout 120 --timeout-method thread $(ARGS) tests/tpu'

clean:  ## remove what the other targets made
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache .hypothesis

ifdef UV
INSTALL = $(UV) pip install --quiet --python $(PYTHON)
$(VENV)/bin/python: .python-version
	$(UV) venv --quiet --allow-existing $(VENV)
	@touch $@
else
INSTALL = $(PYTHON) -m pip install --quiet --disable-pip-version-check
$(VENV)/bin/python: .python-version
	$(BASE_PYTHON) -m venv $(VENV)
	@touch $@
endif

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	@echo "installing jaxserve into $(VENV), a minute or two the first time"
	$(INSTALL) -e '.$(if $(EXTRA),[$(EXTRA)])' $(JAX)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) -e '.[test]' $(JAX)
	@touch $@
