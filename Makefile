# make demo    fine-tune a small model, split between three clinics and a server
# make test    the tests (not those marked slow)
# make check   format, lint, types, then the tests
# make flower-test   the tests of a Flower federation, in an environment of its own (.venv-flower)
# make bench   what the split costs against plain Transformers and PEFT, and the network against one process
#
# The first of them makes .venv; it needs Python 3.11 or later and nothing else. `make PYTHON=/path/to/python` picks one.

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
NAMES := python3 python3.14 python3.13 python3.12 python3.11 python
ifndef PYTHON
PYTHON := $(shell for name in $(NAMES); do $$name -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && { echo $$name; break; }; done)
endif
BIN := .venv/bin
STAMP := .venv/.installed
WORKERS ?= -n logical --maxprocesses 8

.DELETE_ON_ERROR:
.PHONY: demo test check bench venv flower-test

demo: $(STAMP)
	rm -rf outputs/demo
	OMP_NUM_THREADS=1 $(BIN)/cutlayer train demo/run.yaml --out outputs/demo
	OMP_NUM_THREADS=1 $(BIN)/python demo/show.py outputs/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(WORKERS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory test

bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/network.py

venv: $(STAMP)

# Flower pins other versions of shared libraries.
flower-test: .venv-flower/.installed
	OMP_NUM_THREADS=1 FLWR_TELEMETRY_ENABLED=0 .venv-flower/bin/python -m pytest tests/test_flower.py

.venv-flower/.installed: pyproject.toml constraints-flower.txt
	$(PYTHON) -m venv .venv-flower
	.venv-flower/bin/python -m pip install --disable-pip-version-check -c constraints-flower.txt -e '.[flower]' pytest
	touch $@

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later was found. Install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { echo "$(PYTHON) is older than Python 3.11, or does not run. Name another: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make environments. On Debian and Ubuntu install the package python3-venv." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,ray,privacy]'
	touch $(STAMP)
