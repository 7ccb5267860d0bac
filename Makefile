PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint install

demo: $(VENV)/ready  ## the whole road on the built-in digits, in a few minutes
	$(BIN)/python -m tarflow_dist.demo

test: $(VENV)/ready  ## all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install:  ## into the environment that is active, keeping the torch it has
	$(PYTHON) -m pip install -e ".[dev]"

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("Python 3.11, 3.12 or 3.13 is needed, this is %d.%d: name another with make PYTHON=…" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt -e ".[dev]"
	@touch $@
