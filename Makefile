# Two commands do everything: `make course` and `make test`. Each sets up what it needs.
PYTHON ?= python3
VENV   ?= .venv
export OMP_WAIT_POLICY = passive
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup course test lab site prepare check clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; say which with make PYTHON=..."; exit 1; }
	@echo "Setting up $(VENV) (once; a few minutes, most of them for torch)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(READY)  ## create .venv and install everything at the versions of constraints.txt

course: $(READY)  ## execute the chapters in order on real data, training included
	$(BIN)/python tools/course.py

test: $(READY)  ## the notebooks' own tests, then pytest
	$(BIN)/python tools/course.py --data-only
	DIFFUSION_NB_RUNS=$(CURDIR)/_course/test $(BIN)/nbdev_test --n_workers 1 --do_print
	$(BIN)/python -m pytest tests

lab: $(READY)  ## open JupyterLab at the index
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs/index.ipynb

site: $(READY)  ## render the site into _docs (Quarto where it is on PATH, else smalldocs)
	$(BIN)/python tools/site.py

prepare: $(READY)  ## after editing notebooks: export, clean, README.md
	$(BIN)/python tools/prepare.py

check: $(READY)  ## fail if prepare would change anything
	$(BIN)/python tools/prepare.py --check

clean:  ## remove what the other commands made (not .venv, not the data cache)
	rm -rf _proc _docs _course build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
