# Two commands: `make demo` and `make test`. Both set up a virtual environment first.
PY := .venv/bin/python
PYTHON ?= python3

.PHONY: demo test test-all lint clean

demo: .venv/ready
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash demo.sh

test: .venv/ready
	$(PY) -m pytest

test-all: .venv/ready
	$(PY) -m pytest -m 'slow or not slow'

lint: .venv/ready
	$(PY) -m ruff check .

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/ready

clean:
	rm -rf runs .venv
