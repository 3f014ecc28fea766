# make demo   sets everything up and runs the demonstration on a photograph
# make test   sets everything up and runs the tests
# make docs   builds the site of the documentation into site/, strictly; it works offline
# make test-openmmlab   compiles MMCV's operators (half an hour) and runs the tests in mmdet and mmseg
# Needs Python 3.10 or newer; uses uv where there is one, for speed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= auto

.PHONY: setup demo test test-openmmlab lint types doctest docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(f"quac-plugins needs Python 3.10 or newer, $(PYTHON) is {sys.version.split()[0]}; try: make PYTHON=python3.11" if sys.version_info < (3, 10) else 0)'
	@if command -v uv >/dev/null 2>&1; then \
	  set -e; uv venv --quiet --allow-existing --seed --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV); \
	  uv pip install --quiet --python $(BIN)/python -e ".[dev]"; \
	  uv pip install --quiet --python $(BIN)/python --reinstall --no-deps opencv-contrib-python-headless; \
	else \
	  set -e; $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet -e ".[dev]"; \
	  $(BIN)/python -m pip install --quiet --force-reinstall --no-deps opencv-contrib-python-headless; \
	fi
# The corruptions' library depends on opencv-python; the build that has cv2.quality and needs no display comes last,
# since all of them write the same folder.
	$(BIN)/python tests/install_detectron2.py
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py --out demo-output

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# MMCV's operators are compiled against the torch that is there, and need one of C++17.
OPENMMLAB ?= .venv-openmmlab
OMM := $(OPENMMLAB)/bin
test-openmmlab: $(OPENMMLAB)/.installed
	$(OMM)/python -m pytest tests_openmmlab

$(OPENMMLAB)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OPENMMLAB)
	$(OMM)/python -m pip install --quiet torch==2.13.0 torchvision==0.28.0 "setuptools<81" wheel ninja
	$(OMM)/python -m pip install --quiet --no-build-isolation onedl-mmcv onedl-mmsegmentation onedl-mmdetection
	$(OMM)/python -m pip install --quiet -e ".[evaluate]" "pytest>=8.0" "scikit-image>=0.24"
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

doctest: setup
	$(BIN)/python -m pytest -n $(JOBS) --doctest-modules quac_plugins

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir site

clean:
	rm -rf $(VENV) $(OPENMMLAB) build dist demo-output site
