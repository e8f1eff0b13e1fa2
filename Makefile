# make quickstart   install into .venv and run the main job (README.md)
# make test         install and run the tests, a worker a core (at most 4);  make test-slow: the long ones;  make lint: ruff
# make parity       install PyTorch too, so that the tests compare vision-language models with the originals
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: install parity quickstart test test-slow lint

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[report,lerobot,dev]'
	touch $@

# pip takes PyTorch from wherever it is set up to; a CPU build (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) is a fraction of the
# default one's size, and all that the tests need.
parity: $(VENV)/.parity

$(VENV)/.parity: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[report,lerobot,dev,parity]'
	touch $@

quickstart: install
	$(RUN) -m experiments.compare --config=configs/quickstart.py --workdir=runs/quickstart

test: install
	$(RUN) -m pytest -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

test-slow: install
	$(RUN) -m pytest -m slow

lint: install
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
