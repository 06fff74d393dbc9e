# make serve    set up and start a registry       make test    install what the tests need and run them all
# make install  set up only                       make check   lint and types
# make bench    measure beside the peers          make crash   kill the server 200 times
# make replicas kill replicas under 50 pushes

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: serve install test check bench crash replicas clean packages

serve: install
	$(BIN)/hythe serve

install: $(VENV)/installed

test: packages $(VENV)/installed-test
	$(BIN)/python -m pytest $(TESTS)

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: packages $(VENV)/installed-test
	$(BIN)/python -m benchmarks $(BENCH)

replicas: packages $(VENV)/installed-test
	HYTHE_REPLICA_IMAGES=50 $(BIN)/python -m pytest tests/clients/test_replicas.py --timeout 3600 -s

crash: $(VENV)/installed-test
	HYTHE_CRASHES=200 $(BIN)/python -m pytest tests/crash -k campaign --timeout 3600 -s

packages:
	@deploy/test-packages

# Debian's python3 comes without venv until python3-venv is there; that it is missing is said, with what to do.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Hythe needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@deploy/python-venv $(PYTHON) $(VENV)

$(VENV)/installed: pyproject.toml $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[uvloop]'
	@touch $@

$(VENV)/installed-test: pyproject.toml $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[uvloop,postgres,s3,test]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
