# make demo   installs from the lock file into .venv and runs the whole job on the embedded set
# make test   the same set-up, then the tests
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test lint setup
.DEFAULT_GOAL := demo

demo: setup
	@echo "demo: token learning, contrastive training with generation in the loop, probe, OOD, report;"
	@echo "      at most 5 minutes on 2 CPU cores. Result: runs/demo/report.html"
	$(PY) trainer.py run configs/demo.yaml

test: setup
	@echo "tests: 4 to 8 minutes on 2 CPU cores"
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

setup: $(STAMP)

$(STAMP): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}. Name another one: make PYTHON=python3.12")'
	@echo "set-up: installing the versions of requirements.lock into $(VENV); about 2 minutes and 6 GB, once"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	@touch $(STAMP)
