# `make` alone lists what there is. Everything runs in .venv, made once from the extras in pyproject.toml.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
VENV ?= .venv
PY = $(VENV)/bin/python
STAMP = $(VENV)/.dynfuse-installed

.PHONY: help demo test fuzz lint clean

help:
	@echo "make demo   fuse a subject and a style LoRA with the boxed model; pictures in out/demo"
	@echo "make test   the tests"
	@echo "make fuzz   the fuzz tests for FUZZ_SECONDS=1200, FUZZ_EXAMPLES=1000 a test in a round, from FUZZ_SEED on"
	@echo "make lint   ruff and mypy"
	@echo "make clean  remove .venv, caches and out/"

$(STAMP): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --editable '.[demo,test]'
	touch $(STAMP)

demo: $(STAMP)
	$(PY) -m lib_dynfuse demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest

# FUZZ_PY may be another interpreter, such as one with pydantic 1.
FUZZ_PY ?= $(PY)
fuzz: $(STAMP)
	$(FUZZ_PY) tests/fuzz/campaign.py

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) out .mypy_cache .pytest_cache .ruff_cache .hypothesis
