# Needs Python 3.10 or newer and make, nothing else. Another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: help demo docs gallery test test-mm clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    create $(VENV), install vssm, train a small model on real digits and show what it sees"
	@echo "make gallery trains two small models on the digits and draws the pictures of model_cards/gallery.md"
	@echo "make docs    builds the documentation as a site in docs/_build, with warnings as errors"
	@echo "make test    create $(VENV), install what checks need, run all checks (tools/ci.sh)"
	@echo "make test-mm adds mmdetection and mmsegmentation to $(VENV) and runs the tests that need them"
	@echo "make clean   remove $(VENV) and what builds leave behind"
	@echo "PYTHON=python3.12 after any of them chooses the interpreter of a new $(VENV)"

demo: $(VENV)/installed-demo
	@$(IN_VENV) python tools/demo.py

gallery: $(VENV)/installed-demo
	@$(IN_VENV) python tools/gallery.py

docs: $(VENV)/installed-docs
	@$(IN_VENV) sphinx-build --fail-on-warning --keep-going --quiet -c docs . docs/_build
	@echo "docs/_build/index.html; to look at it in a browser: $(VENV)/bin/python -m http.server -d docs/_build"

test: $(VENV)/installed-dev
	@$(IN_VENV) tools/ci.sh

test-mm: $(VENV)/installed-dev $(VENV)/installed-mm
	@$(IN_VENV) python -m pytest -q -m "mm and not slow"

# One stamp an extra: an install is repeated only when pyproject.toml asks for something else.
$(VENV)/installed-%: pyproject.toml $(VENV)/bin/python
	@echo "==> installing vssm with its extra '$*' into $(VENV) (some minutes and gigabytes the first time: torch)"
	@PYTHONWARNINGS=ignore $(VENV)/bin/python -m pip install --quiet --editable '.[$*]' # setuptools warns of any editable install
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "vssm needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo 'not a Python that runs')." \
	        "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	    exit 1; }
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) && $@ -m pip install --quiet --upgrade pip || { rm -rf $(VENV); exit 1; }

clean:
	rm -rf $(VENV) build dist docs/_build docs/generated *.egg-info
