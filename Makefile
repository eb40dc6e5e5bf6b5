# Each target prepares its own virtual environment: a clone and one command are enough.
#   make demo      a short stream and a picture of teacher and student, into demo/
#   make serve     a page on which the prompt changes the film, at http://127.0.0.1:8000/
#   make test      lint, types and tests on the CPU
#   make road      all weights of the digits recipe from nothing, into runs/digits (hours; resumable)
#   make docs      the documentation site, into site/
#   make parity    compare live against PyTorch and diffusers (a second, larger environment)
# PYTHON=/path/to/python picks the interpreter (3.11 or newer); PIP_FLAGS is handed to pip.

SUITABLE = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3 python; do \
	$$p -c '$(SUITABLE)' >/dev/null 2>&1 && { command -v $$p; break; }; done)
VENV ?= .venv
PARITY_VENV ?= .venv-parity
JOBS ?= 2
PIP_FLAGS ?=
PIP_INSTALL = -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_FLAGS)

.PHONY: demo serve test road parity lint docs clean
.DELETE_ON_ERROR:
.SECONDARY:

demo: $(VENV)/.installed
	$(VENV)/bin/python -m launch.demo --config=digits --output=demo

serve: $(VENV)/.installed-serve
	$(VENV)/bin/python -m launch.serve --config=digits

# XLA's CPU compiler rarely ends its process (a segmentation fault while it serializes a program). The tests that failed
# run once more, one at a time in a new process, and must pass there.
test: lint
	$(VENV)/bin/python -m pytest -n $(JOBS) $(TESTS) || \
		$(VENV)/bin/python -m pytest -n 0 --last-failed --last-failed-no-failures none $(TESTS)

road: $(VENV)/.installed
	$(VENV)/bin/python -m launch.road --config=digits --workdir=runs/digits

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.installed-docs
	$(VENV)/bin/mkdocs build --strict

parity: $(PARITY_VENV)/.installed-parity
	set -e; for script in tests/golden/make_*.py; do \
		echo "$$script --check"; $(PARITY_VENV)/bin/python $$script --check; done

clean:
	rm -rf $(VENV) $(PARITY_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find causvid_jax configs launch tests -name __pycache__ -type d -prune -exec rm -rf {} +

%/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with venv was found; name one: make PYTHON=/path/to/python" >&2; exit 2; }
	"$(PYTHON)" -c '$(SUITABLE)' || { echo "$(PYTHON) is not Python 3.11 or newer with venv" >&2; exit 2; }
	"$(PYTHON)" -m venv $*

%/.installed: setup.py pyproject.toml | %/bin/python
	@echo "installing causvid_jax into $* (about a minute, 1 GB)"
	$*/bin/python $(PIP_INSTALL) -e .
	@touch $@

%/.installed-dev: setup.py pyproject.toml | %/bin/python
	@echo "installing causvid_jax with its development tools into $* (about a minute, 2 GB)"
	$*/bin/python $(PIP_INSTALL) -e .[dev]
	@touch $@ $*/.installed

%/.installed-serve: setup.py pyproject.toml | %/bin/python
	@echo "installing causvid_jax with its server into $* (about a minute, 1 GB)"
	$*/bin/python $(PIP_INSTALL) -e .[serve]
	@touch $@ $*/.installed

%/.installed-docs: setup.py pyproject.toml | %/bin/python
	$*/bin/python $(PIP_INSTALL) -e .[docs]
	@touch $@

%/.installed-parity: setup.py pyproject.toml | %/bin/python
	@echo "installing causvid_jax with PyTorch and diffusers into $*"
	$*/bin/python $(PIP_INSTALL) -e .[dev,parity]
	@touch $@
