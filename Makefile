# `make` alone lists what there is. Everything runs in .venv, made once from the locks in requirements/: what is not as
# it was when they were made is not installed.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
VENV ?= .venv
PY = $(VENV)/bin/python
PIP = $(PY) -m pip install --quiet --no-deps
STAMP = $(VENV)/.dynfuse-installed
LOCKS = requirements/dev.txt requirements/torch.txt
TORCH = $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' requirements/torch.txt)

.PHONY: help demo test fuzz lint lock audit clean

help:
	@echo "make demo   fuse a subject and a style LoRA with the boxed model; pictures in out/demo"
	@echo "make test   the tests"
	@echo "make fuzz   the fuzz tests for FUZZ_SECONDS=1200, FUZZ_EXAMPLES=1000 a test in a round, from FUZZ_SEED on"
	@echo "make lint   ruff and mypy"
	@echo "make lock   the locks again, from the versions in pyproject.toml; needs uv"
	@echo "make audit  known holes in what is locked; asks the package registry"
	@echo "make clean  remove .venv, caches and out/"

# torch comes from this machine's own wheels where pip is told of a folder with one for this Python (PIP_FIND_LINKS), as
# one without CUDA, whose hash is not the registry's; else from the registry, by its hash.
$(STAMP): pyproject.toml $(LOCKS)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r requirements/dev.txt
	$(PIP) --no-index $(TORCH) 2>/dev/null || $(PIP) --require-hashes -r requirements/torch.txt
	$(PIP) --no-build-isolation --no-index --editable .
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

# One resolution for every Python and system, cut in two: torch.txt has torch and the CUDA that it asks for on Linux.
lock:
	cat $(LOCKS) > requirements/both.txt
	uv pip compile pyproject.toml --extra demo --extra test --universal --python-version 3.10 --generate-hashes \
		--no-header --quiet --output-file requirements/both.txt
	awk '/^[a-z]/ { torch = /^(torch==|cuda-|nvidia-)/ } { print > (torch ? "requirements/torch.txt" : "requirements/dev.txt") }' \
		requirements/both.txt
	rm requirements/both.txt
	echo 'pip-audit' | uv pip compile - --universal --python-version 3.10 --generate-hashes --no-header \
		--quiet --output-file requirements/audit.txt

audit:
	test -x $(VENV)-audit/bin/python || $(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements/audit.txt
	$(VENV)-audit/bin/python -m pip_audit --strict --disable-pip --require-hashes $(LOCKS:%=-r %)

clean:
	rm -rf $(VENV) $(VENV)-audit out .mypy_cache .pytest_cache .ruff_cache .hypothesis
