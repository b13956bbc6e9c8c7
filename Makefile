# Every target does its own set-up in .venv and installs nothing when nothing has changed.
#   make up        a gateway, a neuron and a small model on this machine
#   make test      ruff, mypy and the test suite
#   make lint      ruff and mypy alone
#   make soak      the long-running tests        make bench   the gateway against its peers
#   make bench-engine   the engine against its peers, speed and quality
#   make clean     removes .venv and the caches of the tools (the models in .cache stay)
#   ARGS="..." goes to the program behind up, soak and both benches; PYTHON=... names the interpreter.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help up test lint soak bench bench-engine clean

VENV := .venv
BIN := $(VENV)/bin
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python)
ARGS ?=

# A foreign environment or pip target must not lead the work out of .venv. Index settings stay.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTEST_ADDOPTS
unexport PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_DRY_RUN PIP_NO_DEPS PIP_REQUIRE_VIRTUALENV
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

help:
	@sed -n 's/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST)) | head -8

up: $(VENV)/installed-neuron
	@exec $(BIN)/cortex up $(ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

soak: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m long --long --timeout=0 $(ARGS)

bench: $(VENV)/installed-dev
	$(BIN)/python tests/bench/gateway/run.py $(ARGS)

bench-engine: $(VENV)/installed-peers
	$(BIN)/python tests/bench/engine/run.py $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment ----------------------------------------------------------------------------
# Each stamp says that a step has ended well; $(VENV)/made holds the directory it was made in, so that
# a copied or moved clone makes its own instead of testing the one it was copied from.

ifneq ($(shell cat $(VENV)/made 2>/dev/null),$(CURDIR))
$(shell rm -f $(VENV)/made)
endif

$(VENV)/made:
	@chosen=; \
	for python in $(CANDIDATES); do \
	    if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then chosen=$$python; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	    echo "No Python 3.11 or newer with the venv module among: $(CANDIDATES)." >&2; \
	    echo "Install one (Debian: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$chosen" --version)"; \
	rm -f $(VENV)/torch $(VENV)/installed-*; \
	"$$chosen" -m venv $(VENV) && echo "$(CURDIR)" > $@

# torch goes first and by exact version: so pip takes the build at hand (CPU or CUDA) and keeps it.
$(VENV)/torch: $(VENV)/made
	$(BIN)/python -m pip install -q torch==2.13.0
	@touch $@

$(VENV)/installed-neuron: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install -q -e '.[neuron]'
	@touch $@

# All of the above and the tools; so `make up` after `make test` has nothing to install.
$(VENV)/installed-dev: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install -q -e '.[neuron,dev]'
	@touch $(VENV)/installed-neuron $@

# Other engines, for comparison alone; by exact version, so that figures of two days can be compared.
$(VENV)/installed-peers: $(VENV)/installed-dev Makefile
	$(BIN)/python -m pip install -q --only-binary :all: xllamacpp==2026.10.11549 mistralrs==0.9.5
	@touch $@
