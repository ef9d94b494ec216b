# Every target sets up .venv by itself, from pyproject.toml and constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test slow clean

demo: $(STAMP)
	$(BIN)/ip-adapter demo --output_dir demo

test: $(STAMP)
	$(BIN)/ruff check src tests examples
	$(BIN)/ruff format --check src tests examples
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# Long proofs: real pictures through SD1.5 and ViT-H/14 at their real sizes (12 GB of memory, 5 GB of disk).
slow: $(STAMP)
	$(BIN)/python -m pip install --quiet 'scikit-image<1'
	$(BIN)/python -m pytest -s -m slow tests/slow

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo
