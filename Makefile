# Each target prepares its own virtual environment, so it is the only command needed.
# Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv-$(VERSION)
RUN := $(VENV)/bin/python
WORKDIR ?= runs/quickstart

.PHONY: help quickstart test test-all lint clean

help:
	@echo 'make quickstart  train, evaluate and sample a small Residual Delta Net on this CPU (minutes)'
	@echo 'make test        the test suite (accelerators are simulated, interpreted or compiled for)'
	@echo 'make test-all    the same with the slow tests'
	@echo 'make lint        ruff'
	@echo 'make clean       remove the virtual environments; runs/ is kept'

quickstart: $(VENV)/train
	$(RUN) experiments/quickstart.py --workdir=$(WORKDIR)

# Two workers: most of the time goes to single-threaded compilation.
test: $(VENV)/test
	$(RUN) -m pytest -n 2 --dist worksteal -m 'not slow'

test-all: $(VENV)/test
	$(RUN) -m pytest -n 2 --dist worksteal

lint: $(VENV)/test
	$(VENV)/bin/ruff check .

$(VENV)/train $(VENV)/test: setup.py
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[$(notdir $@)]'
	touch $@

clean:
	rm -rf .venv-*
