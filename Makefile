# make demo   the main job on this machine          make test   the test suite
# Both set up .venv on the first call (a few GB: PyTorch is the reference the tests compare with) and install nothing
# on the next one, until pyproject.toml or the constraints change.
#
# A GPU machine:      make demo EXTRAS=test,cuda13      its tests:      make test-gpu EXTRAS=test,cuda13
# Another Python:     make demo PYTHON=/path/to/python3.12

# The first of these that really runs (a version manager's shim may exist and fail) and is new enough.
PYTHON ?= $(shell for p in python3.12 python3; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && { echo $$p; break; }; done)
EXTRAS ?= test
PYTEST_ARGS ?=
DEMO_ARGS ?=

VENV := .venv
INSTALLED := $(VENV)/.installed-$(EXTRAS)
NEWEST := .venv-newest
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

.PHONY: help demo test test-gpu test-newest-jax lint format notebooks results clean

help:
	@echo "make demo | test | test-gpu | test-newest-jax | lint | format | notebooks | results | clean"

demo: $(INSTALLED)
	$(VENV)/bin/moe-jax demo $(DEMO_ARGS)

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# What needs a GPU, or two; says at the end what it left out and why.
test-gpu: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m gpu -rs $(PYTEST_ARGS)

# The kernels in the interpreter, with the newest JAX that pyproject.toml allows: every test with the first of its parameters.
test-newest-jax: $(NEWEST)/.installed
	$(NEWEST)/bin/python -c 'import jax; print("jax", jax.__version__)'
	$(NEWEST)/bin/python -m pytest tests/kernels -m "not once" --one-of-each $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Runs every notebook from top to bottom and keeps the outputs in the files.
notebooks: $(INSTALLED)
	$(VENV)/bin/python notebooks/execute.py

# README's tables and the pictures, of these result files of moe-jax bench.
RESULTS ?= $(addprefix benchmarks/results/, 2026-11-28-h200-bf16-layer.json 2026-11-28-h200-bf16-one-token-layer.json \
    2026-11-25-h200-bf16-layer.json 2026-11-28-h100-bf16-layer.json 2026-11-27-h100-bf16-sonicmoe-layer.json \
    2026-11-28-h100-bf16-sonicmoe-layer.json 2026-11-28-h200-fp8_block-layer.json 2026-11-28-h200-fp8_block-more-layer.json \
    2026-11-28-h100-fp8_block-layer.json 2026-11-27-h100-fp8_block-layer.json \
    2026-11-27-h100-fp8_block-equal-seconds-layer.json 2026-11-28-h200-fp8_channel-layer.json \
    2026-11-28-h200-fp8_channel-more-layer.json 2026-11-26-h100-fp8_channel-layer.json \
    2026-11-28-h200-int8_weight-layer.json 2026-11-28-h200-int8_weight-lines-layer.json \
    2026-11-28-h100-int8_channel-layer.json)
results: $(INSTALLED)
	$(VENV)/bin/python benchmarks/table.py $(RESULTS)

clean:
	rm -rf $(VENV) $(NEWEST) build dist .pytest_cache .ruff_cache .hypothesis expert_load.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# make_venv(folder): the stamp file in it is written by the caller when everything is installed.
define make_venv
	@test -n "$(PYTHON)" || { echo "moe_jax needs Python >= 3.12 and found none as python3.12 or python3;" \
	    "install it (Debian: apt install python3.12 python3.12-venv) or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "setting up $(1) with $(PYTHON) (once; this takes some minutes)"
	@$(PYTHON) -m venv $(1) || { echo "could not make a virtual environment;" \
	    "Debian: apt install python3.12-venv" >&2; exit 1; }
endef

$(INSTALLED): pyproject.toml constraints/ci.txt
	$(call make_venv,$(VENV))
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints/ci.txt -e '.[$(EXTRAS)]'
	@touch $@

$(NEWEST)/.installed: pyproject.toml
	$(call make_venv,$(NEWEST))
	$(NEWEST)/bin/python $(PIP_INSTALL) --upgrade -e '.[test-kernels]'
	@touch $@
