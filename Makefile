# make demo   sets everything up and runs the demonstration on a photograph
# make test   sets everything up and runs the tests
# Needs Python 3.10 or newer; uses uv where there is one, for speed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= auto

.PHONY: setup demo test lint types doctest clean

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

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

doctest: setup
	$(BIN)/python -m pytest -n $(JOBS) --doctest-modules quac_plugins

clean:
	rm -rf $(VENV) build dist demo-output
