# Everything sets itself up: a machine with Python 3.11 or newer and make is enough.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-slow lint format benchmark peers apebench clean

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "physml needs Python 3.11 or newer with venv; name one with make PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## generate Kolmogorov flow, train, roll out 200 steps, report
	$(BIN)/physml train experiments/demo.py --name demo --overwrite
	@echo "Open runs/demo/report.html"

test: $(VENV)/.installed  ## the quick suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(VENV)/.installed  ## everything else that needs no peer package
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "slow and not peers"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

peers: .venv-peers/.installed  ## an environment with the packages that benchmarks compare with

.venv-peers/.installed: pyproject.toml
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,peers]'
	@touch $@

apebench: .venv-apebench/.installed  ## an environment with APEBench, whose exponax physml cannot use

.venv-apebench/.installed:
	@test -x .venv-apebench/bin/python || $(PYTHON) -m venv .venv-apebench
	.venv-apebench/bin/python -m pip install --quiet --disable-pip-version-check apebench==0.1.1
	@touch $@

clean:
	rm -rf $(VENV) .venv-peers .venv-apebench .pytest_cache .ruff_cache
