# Every target sets up .venv by itself, from pyproject.toml and constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test house smoke slow coverage audit bench bench-gpu bench-gpu-techniques faults fuzz clean

demo: $(STAMP)
	$(BIN)/ip-adapter demo --output_dir demo

test: $(STAMP)
	$(BIN)/ruff check src tests benchmarks faults tools examples
	$(BIN)/ruff format --check src tests benchmarks faults tools examples
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# The package's parts and their imports, into docs/house.svg; a test asks for it when an import or a rank has changed.
house:
	$(PYTHON) -m tools.draw_house

# Every command once on each Python found (3.11 to 3.14), each in an environment of its own under .smoke (gigabytes where
# torch comes with CUDA); a table at the end. PYTHON only starts it.
smoke:
	$(PYTHON) tests/smoke.py

# Long proofs: compiled blocks, and real pictures through SD1.5 and ViT-H/14 at their real sizes (12 GB of memory, 5 GB of disk).
slow: $(STAMP)
	$(BIN)/python -m pip install --quiet 'scikit-image<1'
	$(BIN)/python -m pytest -s -m slow tests

# Lines and branches of core, data, images and train that tests reach, commands that tests start among them.
coverage: $(STAMP)
	$(BIN)/python -m pytest --cov --cov-report=term tests/core tests/storage tests/runtime tests/images tests/manifest tests/cache tests/feed tests/train tests/prepare tests/faults

# Known vulnerabilities of the versions in constraints.txt, by PyPI's advisories; what cannot be looked up fails too.
audit: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'pip-audit>=2.9,<3'
	$(BIN)/python -m pip_audit --strict --disable-pip --no-deps --requirement constraints.txt \
	  || { echo "audit: vulnerabilities are listed above, or the advisories could not be reached; nothing is vouched for"; exit 1; }

# The published recipe's step beside ours, into bench/ratios.json and bench/ratios.md (12 GB of memory, 8 GB of disk).
bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench --sizes tiny,half,sd15 --device cpu --out bench

# The same on one GPU, ended before ten minutes are over: SD1.5 at 512 px and SDXL at 1024 px.
bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.bench --sizes sd15,sdxl --device cuda --parts counts,settings,largest --minutes 9 --out bench/gpu

# What each technique is worth there, by itself: compiling takes minutes. It ends before ten minutes are over too.
bench-gpu-techniques: $(STAMP)
	$(BIN)/python -m benchmarks.bench --sizes sd15 --device cuda --parts techniques --minutes 9 --out bench/gpu-techniques

# Real runs, killed, stopped, filled up and fed with hostile files, into faults/report.json (one and a half hours).
faults: $(STAMP)
	$(BIN)/python -m faults --lanes 2

# Mutated files for the readers of our own formats, guided by coverage where atheris is installed (minutes).
fuzz: $(STAMP)
	$(BIN)/python -m faults.fuzz --cases 200000

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .smoke demo
